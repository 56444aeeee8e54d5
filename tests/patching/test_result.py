"""What a result says of its numbers: means, ends, intervals, labels, tables."""

import pytest
import torch

import optlens
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


def test_positions_carry_tokens_where_there_is_one_prompt():
    choices = {"layer": [2], "pos": [1, 0]}
    alone = make_labels(choices, [["A", " b"]])
    assert alone == {"layer": ["2"], "pos": ["1:  b", "0: A"]}
    assert make_labels(choices, [["A", " b"], ["C", " d"]])["pos"] == ["1", "0"]


def test_a_result_carries_the_texts_of_its_tokens():
    model = optlens.load()
    prompts = "The capital of France is", "The capital of Italy is"
    sweep = patch_sweep(model, *prompts, metric=logit_diff(" Paris", " Rome"), progress=False)
    estimate = optlens.attribution_patch(model, *prompts, metric=logit_diff(" Paris", " Rome"))
    for result in (sweep, estimate):
        tokens = {token for row in result.metadata["clean"] for token in row}
        assert {result.metadata["labels"][str(token)] for token in tokens} > {"·France", "·is"}
