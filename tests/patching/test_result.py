"""What a result says of its numbers: means, ends, intervals, labels, tables."""

import pytest
import torch

import optlens
from optlens.checks import InputError
from optlens.metrics import logit_diff
from optlens.patching import PatchResult, patch_sweep
from optlens.patching.result import make_labels


def make_result(per_prompt, clean=4.0, corrupt=0.0):
    shape = dict(zip(("layer", "head"), per_prompt.shape, strict=False))
    labels = {axis: [f"{axis[0]}{n}" for n in range(size)] for axis, size in shape.items()}
    choices = {axis: list(range(size)) for axis, size in shape.items()}
    ends = (torch.full(per_prompt.shape[-1:], end) for end in (clean, corrupt))
    return PatchResult(per_prompt, *ends, tuple(shape), labels, choices, {"site": "z"})


def test_values_are_means_over_prompts_and_normalized_by_the_ends():
    result = make_result(torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[4.0, 4.0], [-2.0, 0.0]]]))
    assert result.values.tolist() == [[2.0, 0.0], [4.0, -1.0]]
    assert result.normalized.tolist() == [[0.5, 0.0], [1.0, -0.25]]


def test_an_ablation_is_normalized_by_its_only_end():
    result = make_result(torch.tensor([[[1.0, 3.0]]]), clean=8.0, corrupt=float("nan"))
    assert result.normalized.tolist() == [[0.25]]


def test_a_table_has_a_row_for_each_patch():
    pandas = pytest.importorskip("pandas")
    frame = make_result(torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])).to_dataframe()
    expected = {"layer": ["l0", "l0"], "head": ["h0", "h1"]}
    expected |= {"value": [2.0, 0.0], "normalized": [0.5, 0.0]}
    pandas.testing.assert_frame_equal(frame, pandas.DataFrame(expected), check_dtype=False)


def test_the_interval_is_symmetric_in_probability():
    """Of many draws as many means lie below it as above it."""
    values = torch.randn(1, 1, 60, generator=torch.Generator().manual_seed(0)).double()
    values -= values.mean()
    low, high = (float(end) for end in make_result(values).interval(0.6, samples=20000))
    assert low < 0 < high
    # 0.84 standard errors to each side; skewness and 20,000 draws leave a few hundredths
    expected = 0.8416 * float(values.std(correction=0)) / 60**0.5
    assert -low == pytest.approx(expected, rel=0.1)
    assert high == pytest.approx(expected, rel=0.1)
    assert make_result(values).interval(0.6)[0] != make_result(values).interval(0.6, seed=1)[0]


def test_the_normalized_interval_draws_effect_and_gap_together():
    """Where each prompt gets a fixed share of its own gap back, there is nothing to be unsure of."""
    gap = torch.rand(40, generator=torch.Generator().manual_seed(0)).double() * 8 + 1
    corrupt = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    noisy = torch.randn(40, generator=torch.Generator().manual_seed(2)).double() * gap
    result = make_result(torch.stack([corrupt + 0.25 * gap, corrupt + noisy])[None])
    result.clean_per_prompt, result.corrupt_per_prompt = corrupt + gap, corrupt
    low, high = result.normalized_interval()
    torch.testing.assert_close(low[0, 0], torch.tensor(0.25).double())
    torch.testing.assert_close(high[0, 0], torch.tensor(0.25).double())
    # the delta method's standard error of a ratio of means, for the other patch
    rest = (result.per_prompt[0, 1] - corrupt) - result.normalized[0, 1] * gap
    expected = 2 * 1.96 * float(rest.std(correction=0)) / 40**0.5 / float(gap.mean())
    assert float(high[0, 1] - low[0, 1]) == pytest.approx(expected, rel=0.1)
    assert low[0, 1] < result.normalized[0, 1] < high[0, 1]
    narrow = result.normalized_interval(0.5)
    assert narrow[1][0, 1] - narrow[0][0, 1] < high[0, 1] - low[0, 1]
    assert torch.equal(result.normalized_interval()[0], low)
    assert not torch.equal(result.normalized_interval(seed=1)[0], low)


def test_the_normalized_interval_of_an_ablation_is_relative_to_its_only_end():
    values = torch.rand(1, 2, 30, generator=torch.Generator().manual_seed(0))
    result = make_result(values, clean=8.0, corrupt=float("nan"))
    low, high = result.normalized_interval()
    plain = result.interval()
    torch.testing.assert_close(low, plain[0] / 8)
    torch.testing.assert_close(high, plain[1] / 8)


def test_the_normalized_interval_is_missing_where_there_is_no_gap():
    result = make_result(torch.rand(1, 2, 30), clean=2.0, corrupt=2.0)
    with pytest.warns(RuntimeWarning):
        low, high = result.normalized_interval()
    assert low.isnan().all() and high.isnan().all()
    with pytest.raises(InputError, match="several"):
        make_result(torch.rand(1, 2, 1)).normalized_interval()


def test_positions_carry_tokens_where_there_is_one_prompt():
    choices = {"layer": [2], "pos": [1, 0]}
    alone = make_labels(choices, [["A", " b"]])
    assert alone == {"layer": ["2"], "pos": ["1:  b", "0: A"]}
    assert make_labels(choices, [["A", " b"], ["C", " d"]])["pos"] == ["1", "0"]
    assert make_labels(choices, [["A", " b"]], [["A", " c"]])["pos"] == ["1:  b| c", "0: A"]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_where_two_prompts_differ_a_position_carries_both_tokens(direction):
    """The clean one first, whichever run is patched; the figure says so."""
    model = optlens.load()
    prompts = "The capital of France is", "The capital of Italy is"
    options = {"metric": logit_diff(" Paris", " Rome"), "direction": direction}
    over = {"site": "resid_pre", "over": ("layer", "pos")}
    results = [
        patch_sweep(model, *prompts, **over, **options, progress=False),
        optlens.attribution_patch(model, *prompts, **over, **options),
        optlens.path_patch(
            model, *prompts, [(0, "mlp")], "final", over=("pos",), **options, progress=False
        ),
    ]
    for result in results:
        assert result.labels["pos"][3:5] == ["3:  of", "4:  France| Italy"]
    figure = results[0].plot()
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert "4:  France| Italy" in names  # not cut
    assert any("clean|corrupt" in text.get_text() for text in figure.texts)
    heads = patch_sweep(model, *prompts, "z", ("layer", "head"), **options, progress=False)
    assert not any("clean|corrupt" in text.get_text() for text in heads.plot().texts)


def test_a_result_carries_the_texts_of_its_tokens():
    model = optlens.load()
    prompts = "The capital of France is", "The capital of Italy is"
    sweep = patch_sweep(model, *prompts, metric=logit_diff(" Paris", " Rome"), progress=False)
    estimate = optlens.attribution_patch(model, *prompts, metric=logit_diff(" Paris", " Rome"))
    for result in (sweep, estimate):
        tokens = {token for row in result.metadata["clean"] for token in row}
        assert {result.metadata["labels"][str(token)] for token in tokens} > {"·France", "·is"}
