"""Figures of sweeps: what they show, and what they refuse."""

import pytest
import torch

from optlens import plots
from optlens.checks import InputError
from optlens.patching import PatchResult


def make_result(*axes, corrupt=-1.0):
    sizes = {"component": 2, "layer": 3, "pos": 4, "head": 5}
    shape = [sizes[axis] for axis in axes]
    values = torch.linspace(-1, 3, int(torch.tensor(shape).prod())).view(*shape, 1)
    labels = {axis: [f"{axis[0]}{n}" for n in range(sizes[axis])] for axis in axes}
    choices = {axis: list(range(sizes[axis])) for axis in axes}
    about = {"site": "z", "metric": "logit_diff"}
    ends = torch.tensor([3.0]), torch.tensor([corrupt])
    return PatchResult(values, *ends, axes, labels, choices, about)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_table_shows_normalized_values_and_labels():
    figure = make_result("layer", "pos").plot()
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["p0", "p1", "p2", "p3"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["l0", "l1", "l2"]
    assert texts(axes)[0] == "0.00"
    assert texts(axes)[-1] == "1.00"
    assert "normalized" in figure.axes[-1].get_ylabel()


def test_an_ablation_shows_the_change_of_the_metric():
    figure = make_result("layer", "head", corrupt=float("nan")).plot()
    assert texts(figure.axes[0])[0] == "-4.00"
    assert "change of logit_diff" in figure.axes[-1].get_ylabel()


def test_one_axis_is_a_row_and_three_are_panels():
    assert len(texts(make_result("layer").plot().axes[0])) == 3
    figure = make_result("component", "layer", "pos").plot()
    assert len(figure.axes) == 3  # two panels and the colour bar
    assert "c1" in texts(figure.axes[1])


def test_the_name_of_a_panel_stands_above_the_column_labels():
    figure = plots.sweep_heatmap(torch.ones(2, 2, 4), panels=["one", "two"])
    figure.canvas.draw()
    (name,) = figure.axes[0].texts[-1:]
    assert name.get_text() == "one"
    ticks = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert name.get_window_extent().y0 > max(box.y1 for box in ticks) - 1


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_the_colour_bar_is_inside_the_figure(rows):
    figure = plots.sweep_heatmap(torch.ones(rows, 3), columns=["incomprehensible", "b", "c"])
    assert all(axes.get_position().y0 > 0 for axes in figure.axes)


@pytest.mark.parametrize(("least", "shown"), [(0.0, 0.0), (-1.0, -4.0)])
def test_the_colour_bar_has_no_blue_where_nothing_is_negative(least, shown):
    figure = plots.sweep_heatmap([[least, 4.0]])
    assert figure.axes[-1].get_ylim() == (shown, 4.0)


def test_values_that_are_missing_are_masked():
    result = make_result("layer", "pos")
    result.per_prompt[1, 2] = torch.nan
    axes = result.plot().axes[0]
    assert axes.images[0].get_array().mask[1, 2]
    assert "" in texts(axes)


def test_more_than_three_axes_are_refused():
    with pytest.raises(InputError, match="three at most"):
        make_result("component", "layer", "head", "pos").plot()


def test_zero_has_the_colour_of_the_paper_whatever_the_values():
    figure = plots.sweep_heatmap([[0.0, 5.0]])
    picture = figure.axes[0].images[0]
    assert picture.to_rgba(0.0)[:3] == pytest.approx((1, 1, 1), abs=0.01)
    with pytest.raises(ValueError, match="rows has 1 entries for 2"):
        plots.sweep_heatmap([[0.0], [1.0]], rows=["a"])


def test_a_scatter_shows_each_estimate_over_the_truth_and_names_the_worst():
    truth = torch.tensor([[0.0, 1.0], [2.0, float("nan")]])
    estimates = {"AtP": [[0.1, 1.0], [-1.0, 5.0]], "AtP*": truth * 2}
    figure = plots.estimate_scatter(truth, estimates, names="abcd", named=2)
    axes = figure.axes[0]
    drawn = [points.get_offsets().data.tolist() for points in axes.collections]
    assert drawn[0][:3] == [[0.0, 0.1], [1.0, 1.0], [2.0, -1.0]]
    assert drawn[1][:3] == [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
    assert [text.strip() for text in texts(axes)] == ["c", "b"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["AtP", "AtP*"]
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim()[0] < -1 and axes.get_xlim()[1] > 5
    (line,) = axes.lines
    assert list(line.get_xdata()) == list(line.get_ydata())


def test_a_scatter_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="truth has 2 places and the estimates {'AtP': 3}"):
        plots.estimate_scatter([0.0, 1.0], {"AtP": [0.0, 1.0, 2.0]})
    with pytest.raises(ValueError, match="1 to 6 estimates, not 0"):
        plots.estimate_scatter([0.0], {})
    with pytest.raises(ValueError, match="names has 1 entries for 2"):
        plots.estimate_scatter([0.0, 1.0], {"AtP": [0.0, 1.0]}, names=["a"])
    assert texts(plots.estimate_scatter([1.0], {"AtP": [3.0]}).axes[0]) == []  # no names, no words
