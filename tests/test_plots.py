"""Figures say what the arrays say, print any token, and fit from one token to a hundred."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from optlens import plots
from optlens.plots import draw, style

RAMPS = [pytest.param(look, id=name) for name, look in plots.STYLES.items()]
WORDS = ["</s>", "When", "·Mary", "·and", "·John", "·went", "·to", "·the", "·store", ","]
HOSTILE = [
    "</s>",
    "$x^2$",
    "$\\frac{$",
    "中文",
    "א\u202eb",
    "\t\n\x07",
    "<b>&amp;",
    "👍",
    "a" * 300,
]


def causal(n_tokens: int, *lead: int) -> np.ndarray:
    """Return attention weights [*lead, query, key] that look like a model's."""
    scores = np.random.default_rng(0).normal(size=(*lead, n_tokens, n_tokens))
    weights = np.tril(np.exp(2 * scores))
    return weights / weights.sum(-1, keepdims=True)


def every_figure(tokens: list[str], look: str):
    """Draw one figure of each kind for a prompt."""
    count = len(tokens)
    random = np.random.default_rng(1)
    table = random.random((7, count))
    words = [tokens for _ in range(7)]
    return {
        "attention_grid": plots.attention_grid(causal(count, 2, 3), style=look),
        "attention_head": plots.attention_head(causal(count), tokens, style=look),
        "head_scores": plots.head_scores(random.normal(size=(6, 8)), style=look),
        "lens_heatmap": plots.lens_heatmap(words, table, tokens, style=look),
        "lens_entropy": plots.lens_heatmap(words, table, tokens, quantity="entropy", style=look),
        "residual_norms": plots.residual_norms(np.exp(4 * table), tokens, style=look),
        "lens_trace": plots.lens_trace(
            {f"{i}{t}": table[:, 0] for i, t in enumerate(tokens[:6])}, style=look
        ),
        "estimate_scatter": plots.estimate_scatter(
            table[0], {t: table[i] for i, t in enumerate(tokens[:6])}, names=tokens, style=look
        ),
        "next_tokens": plots.next_tokens(tokens[:5], table[0, :5], style=look),
        "waterfall": plots.waterfall(random.normal(size=count), tokens, style=look),
        "contribution_graph": plots.contribution_graph(
            [(1.0, "L0H0", (0, i), (1, count - 1)) for i in range(count)],
            tokens,
            rows=["embed", "0 mid"],
            style=look,
        ),
        "stages": plots.stages(  # a model has few of them, whatever the prompt
            tokens[:20],
            tokens[:20],
            table[:4, :20].T,
            table[:, :20].T,
            stream=[False] * len(tokens[:20]),
            groups=tokens[:20],
            style=look,
        ),
    }


def picture_colors(figure, axes: int = 0) -> np.ndarray:
    """Return the colours of the cells of a heat map as drawn, [row, column] of "#rrggbb"."""
    picture = figure.axes[axes].images[0]
    rgba = picture.to_rgba(picture.get_array())
    return np.array([[to_hex(cell) for cell in row] for row in rgba])


# --- colours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("look", RAMPS)
def test_ramp_starts_at_the_paper_and_its_lightness_never_turns(look):
    assert look.ramp[0] == look.paper
    levels = [style.lightness(style.mix(look.ramp, step / 40)) for step in range(41)]
    steps = np.diff(levels)
    assert (steps < 0).all() or (steps > 0).all()
    # From end to end it spans enough of the 100 steps of L* to tell small weights from none.
    assert abs(levels[-1] - levels[0]) > 70


@pytest.mark.parametrize("look", RAMPS)
def test_diverging_table_has_the_paper_in_the_middle_and_equal_arms(look):
    levels = [style.lightness(style.mix(look.diverging, step / 40)) for step in range(41)]
    assert look.diverging[len(look.diverging) // 2] == look.paper
    steps = np.sign(np.diff(levels))
    assert (steps[:20] == -steps[20:]).all() and len(set(steps[:20])) == 1
    # Equal distance from zero must look equally strong on both sides.
    assert np.abs(np.array(levels[:20]) - np.array(levels[:20:-1])).max() < 13


def test_lightness_agrees_with_its_definition():
    assert style.lightness("#ffffff") == pytest.approx(100)
    assert style.lightness("#000000") == 0
    assert style.lightness("#777777") == pytest.approx(50.0, abs=0.1)  # CIE L* of middle grey


@pytest.mark.parametrize("name", ["light", "dark"])
def test_future_is_masked_and_zero_is_paper(name):
    look = plots.STYLES[name]
    pattern = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [np.nan, 0.25, 0.75]])
    colors = picture_colors(plots.attention_head(pattern, ["a", "b", "c"], style=name))
    assert colors[1, 0] == look.paper  # visible, weight 0
    assert colors[0, 1] == colors[0, 2] == colors[1, 2] == look.masked
    assert colors[2, 0] == look.masked  # NaN
    assert colors[0, 0] == look.ramp[-1]
    assert look.masked not in colors[[2], 1:]


def test_chosen_queries_are_masked_by_their_own_position():
    weights = causal(6)[[2, 5]]
    figure = plots.attention_head(weights, list("abcdef"), query_positions=[2, 5])
    masked = picture_colors(figure) == plots.STYLES["light"].masked
    assert masked.tolist() == [[False] * 3 + [True] * 3, [False] * 6]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["c", "f"]
    with pytest.raises(ValueError, match="query_positions"):
        plots.attention_head(weights, list("abcdef"))


@pytest.mark.parametrize("rows", [[2, -1], [2, 6], [2, 4.5]], ids=str)
def test_positions_that_are_no_columns_are_refused(rows):
    weights = causal(6)[[2, 5]]
    with pytest.raises(ValueError, match=rf"query_positions holds {rows[1]}; .* 0 to 5"):
        plots.attention_head(weights, list("abcdef"), query_positions=rows)
    with pytest.raises(ValueError, match=rf"query_positions holds {rows[1]}; .* 0 to 5"):
        plots.attention_grid(weights[None, None], query_positions=rows)


def test_scores_of_both_signs_have_equal_limits():
    norm = plots.head_scores([[-0.5, 2.0]]).axes[0].images[0].norm
    assert (norm.vmin, norm.vmax) == (-2.0, 2.0)
    norm = plots.head_scores([[0.5, 2.0]]).axes[0].images[0].norm
    assert (norm.vmin, norm.vmax) == (0.0, 2.0)


def test_a_score_that_rounds_to_zero_has_no_sign():
    words = plots.head_scores([[-0.001, 2.0]]).axes[0].texts
    assert [word.get_text() for word in words] == ["0.00", "2.00"]


# --- what is drawn is what was given -----------------------------------------------------------


def test_grid_places_each_head_in_its_row_and_column():
    patterns = np.zeros((2, 3, 2, 2))
    patterns[..., 0, 0] = 1
    patterns[1, 2, 1, 0] = 1.0
    figure = plots.attention_grid(patterns, layers=[4, 7], heads=[0, 1, 5])
    hot = [number for number in range(6) if picture_colors(figure, number)[1, 0] != "#ffffff"]
    assert hot == [5]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "4"]
    assert [text.get_text() for text in figure.axes[3].texts] == ["7"]
    assert [text.get_text() for text in figure.axes[2].texts] == ["5"]


def test_pooling_keeps_the_single_hot_cell():
    weights = np.zeros((300, 300))
    weights[250, 111] = 0.9
    small = draw.pool_max(weights, 96)
    assert small.shape[0] <= 96 and small.max() == 0.9 and np.count_nonzero(small) == 1
    picture = plots.attention_grid(weights[None, None]).axes[0].images[0].get_array()
    assert picture.max() == 0.9


def test_lens_breaks_a_long_prompt_into_lines_without_losing_a_cell():
    tokens = [f"t{position}" for position in range(60)]
    table = np.arange(120).reshape(2, 60) / 120
    figure = plots.lens_heatmap([tokens, tokens], table, tokens, rows=["embed", "0"])
    panels = [axes for axes in figure.axes if axes.images and axes.texts]
    labels = [label.get_text() for axes in panels for label in axes.get_xticklabels()]
    assert labels == tokens
    drawn = np.concatenate([axes.images[0].get_array() for axes in panels], axis=1)
    np.testing.assert_array_equal(drawn, table)
    written = [text.get_text() for axes in panels for text in axes.texts]
    assert sorted(written) == sorted(2 * tokens)


def test_norms_are_logarithmic_only_when_they_spread():
    assert plots.residual_norms([[1.0, 200.0]], ["a", "b"]).axes[0].images[0].norm.vmin == 1 / 1.5
    assert plots.residual_norms([[1.0, 2.0]], ["a", "b"]).axes[0].images[0].norm.vmin == 0


def test_lens_trace_draws_each_series_and_names_it():
    figure = plots.lens_trace({"·Mary": [0, 0.5, 0.9], "·John": [0.2, 0.3, 0.1]})
    lines = figure.axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [[0, 0.5, 0.9], [0.2, 0.3, 0.1]]
    assert lines[0].get_marker() != lines[1].get_marker()
    assert [text.get_text() for text in figure.axes[0].texts] == ["·Mary", "·John"]


def bars(figure) -> list[tuple[float, float]]:
    """Return where each bar of a waterfall begins and ends."""
    boxes = [patch.get_bbox() for patch in figure.axes[0].patches]
    return [(box.x0, box.x0 + box.width) for box in boxes]


def test_waterfall_bars_begin_where_the_one_above_ended_and_reach_the_sum():
    values = np.array([1.0, -2.0, 0.25, 3.0, -0.25])
    ends = bars(plots.waterfall(values, list("abcde")))
    assert ends[0][0] == 0.0
    assert [start for start, _ in ends[1:-1]] == [end for _, end in ends[:-2]]
    assert ends[-1] == (0.0, 2.0) and ends[-2][1] == 2.0


def test_waterfall_puts_small_terms_together_without_losing_them():
    values = np.array([0.1, 4.0, 0.2, -5.0, 0.3, 3.4])
    figure = plots.waterfall(values, list("abcdef"), most=2, total="logit")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["b", "d", "4 others", "logit"]
    assert bars(figure)[-1] == (0.0, pytest.approx(3.0))
    assert [text.get_text() for text in figure.axes[0].texts] == ["+4.00", "−5.00", "+4.00", "3.00"]
    alone = plots.waterfall(values, list("abcdef"), most=5)  # a single other keeps its name
    names = [label.get_text() for label in alone.axes[0].get_yticklabels()]
    assert names == [*"abcdef", "sum"]


def test_waterfall_tells_signs_by_colour_and_a_sum_below_zero():
    figure = plots.waterfall([1.0, -3.0], ["up", "down"], style="dark")
    up, down, total = (to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches)
    look = plots.STYLES["dark"]
    assert (up, down, total) == (look.diverging[-2], look.diverging[1], look.muted)
    assert [text.get_text() for text in figure.axes[0].texts] == ["+1.00", "−3.00", "−2.00"]
    assert plots.waterfall([0.0, 0.001]).axes[0].texts[0].get_text() == "0.00"


def test_names_at_line_ends_do_not_cover_each_other():
    figure = plots.lens_trace({"a": [0, 0.5], "b": [0, 0.501], "c": [1, 0.502]})
    heights = sorted(text.get_position()[1] for text in figure.axes[0].texts)
    low, high = figure.axes[0].get_ylim()
    assert min(np.diff(heights)) > 0.05 * (high - low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_of_any_dtype_are_taken(dtype):
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=dtype)
    drawn = plots.attention_head(weights, ["a", "b"]).axes[0].images[0].get_array()
    assert drawn[1].tolist() == [0.25, 0.75]


# --- sizes and texts -----------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "look"), [(1, "light"), (15, "dark"), (100, "light")])
def test_nothing_is_cut_off_or_warned_about(count, look):
    tokens = [WORDS[position % len(WORDS)] for position in range(count)]
    for name, figure in every_figure(tokens, look).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.savefig(io.BytesIO())
        width, height = figure.get_size_inches()
        inner = figure.get_tightbbox()
        assert inner.x0 > -0.02 and inner.y0 > -0.02, name
        assert inner.x1 < width + 0.02 and inner.y1 < height + 0.02, name
        assert max(width, height) < 24, name
        assert to_hex(figure.get_facecolor()) == plots.STYLES[look].paper, name


def test_any_token_can_be_drawn():
    for name, figure in every_figure(HOSTILE, "light").items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a missing glyph warns
            figure.savefig(io.BytesIO())
        texts = [text for axes in figure.axes for text in axes.texts]
        assert not any(text.get_parse_math() for text in texts), name


def test_labels_show_what_is_invisible_and_keep_what_is_not():
    assert draw.legible("a\u202eb\x07") == "a⟨U+202E⟩b⟨U+0007⟩"
    assert draw.legible("·Mary") == "·Mary"
    assert draw.legible("a$b$c") == "a$b$c"
    assert draw.legible("x" * 50) == "xxxxxxx…xxxxxx"


# --- what the caller gets ------------------------------------------------------------------------


def test_figures_belong_to_the_caller_and_show_themselves():
    import matplotlib.pyplot as plt

    figure = plots.next_tokens(["a"], [1.0])
    assert plt.get_fignums() == []
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_importing_plots_does_not_load_matplotlib():
    code = "import optlens.plots, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.attention_grid(causal(3)), r"shape \[3, 3\].*4 axes"),
        (lambda: plots.attention_head(causal(3, 1), ["a"]), "2 axes"),
        (lambda: plots.attention_head(np.zeros((0, 0)), []), "none of them empty"),
        (lambda: plots.attention_head(causal(3), ["a"]), "tokens has 1 entries for 3"),
        (lambda: plots.lens_heatmap([["a"]], [[1.0]], ["a"], rows=["x", "y"]), "rows has 2"),
        (lambda: plots.lens_heatmap([["a", "b"]], [[1.0]], ["a"]), "words has 2"),
        (lambda: plots.lens_heatmap([["a"]], [[1.0]], ["a"], quantity="rank"), "'entropy'"),
        (lambda: plots.lens_trace({}), "1 to 6 series, not 0"),
        (lambda: plots.lens_trace({"a": [1, 2], "b": [1]}), "differ in length"),
        (lambda: plots.head_scores([[1.0]], style="sepia"), "'light', 'dark'"),
        (lambda: plots.waterfall([1.0, np.nan], ["a", "b"]), "the term of 'b' is not finite"),
        (lambda: plots.waterfall([1.0], ["a", "b"]), "labels has 2 entries for 1"),
        (lambda: plots.waterfall([1.0], most=0), "most=0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- graphs and stages ---------------------------------------------------------------------------


def test_edges_differ_by_form_and_are_as_wide_as_their_weight():
    edges = [
        (0.5, "residual", (0, 3), (1, 3)),
        (0.2, "L0H1", (0, 0), (1, 3)),
        (0.9, "mlp0", (1, 3), (2, 3)),
    ]
    axes = plots.contribution_graph(edges, list("abcd"), rows=["embed", "0 mid", "0 post"]).axes[0]
    widths = [patch.get_linewidth() for patch in axes.patches]
    assert widths == sorted(widths) and widths[-1] == pytest.approx(0.5 + 6 * 0.9)
    assert len({to_hex(patch.get_edgecolor()) for patch in axes.patches}) == 3
    assert [line.get_marker() for line in axes.lines] == ["D"]  # the MLP's
    # tokens that no edge reaches are left out
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a 0", "d 3"]
    with pytest.raises(ValueError, match="row 3, column 0"):
        plots.contribution_graph([(0.1, "mlp0", (0, 0), (3, 0))], ["a"], rows=["embed"])
    with pytest.raises(ValueError, match="weight 1.5"):
        plots.contribution_graph([(1.5, "mlp0", (0, 0), (0, 0))], ["a"], rows=["embed"])


def test_stages_of_the_stream_sit_on_it_and_the_others_beside():
    measures = [[0.0, 1.0, -2.0, 2.0], [3.0, 0.5, 1.0, 5.0]]
    figure = plots.stages(
        ["resid_pre", "q"], ["4 × 8", "4 × 2"], measures, [[1, 2], [2, 1]], stream=[True, False]
    )
    boxes = [patch for patch in figure.axes[0].patches if hasattr(patch, "get_boxstyle")]
    stream, beside = (patch.get_x() for patch in boxes)
    assert stream < 1.75 < stream + boxes[0].get_width() and beside > 1.75
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "0 ± 1" in texts and "3 ± 0.5" in texts and "−2" in texts
    with pytest.raises(ValueError, match="counts has 1 rows for 2"):
        plots.stages(["a", "b"], ["", ""], measures, [[1]], stream=[True, False])
