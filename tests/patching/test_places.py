"""Positions of a sweep given by a token's text or by name."""

import pytest
import torch

import optlens
from optlens import metrics, prompts
from optlens.checks import InputError
from optlens.patching import PatchResult
from optlens.patching.one_patch import one_patch

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
METRIC = metrics.logit_diff(" Mary", " John")


@pytest.fixture(scope="module")
def demo():
    return optlens.load()


@pytest.fixture(scope="module")
def pairs(demo):
    """Pairs of several lengths, with names in several places."""
    found = prompts.ioi(demo, 6, seed=1, corruption="abc")
    assert len({len(ids) for ids in found.clean_ids}) > 2
    assert len(set(found.spans["IO"])) > 2
    return found


def sweep(model, **options):
    return optlens.patch_sweep(model, CLEAN, CORRUPT, metric=METRIC, progress=False, **options)


def test_tokens_of_a_prompt_are_the_positions_that_they_have(demo):
    named = sweep(demo, positions=[" Mary", (" John", 1), "who", -1], spans={"who": 5})
    numbered = sweep(demo, positions=[3, 11, 5, 15])
    assert named.choices == numbered.choices
    assert named.labels == numbered.labels
    assert torch.equal(named.per_prompt, numbered.per_prompt)
    alone = sweep(demo, positions=" Mary")  # looked up in the clean prompt
    assert alone.choices["pos"] == [3]


def test_names_mean_a_position_of_each_prompt(demo, pairs, tmp_path):
    metric = metrics.logit_diff(pairs.answers, pairs.wrong)
    names = ["IO", "S2", "end"]
    result = optlens.patch_sweep(
        demo, pairs.clean, pairs.corrupt, metric=metric, positions=names, spans=pairs.spans,
        progress=False,
    )  # fmt: skip
    assert result.choices["pos"] == result.labels["pos"] == names
    for prompt, pair in enumerate(pairs):
        alone = optlens.patch_sweep(
            demo, pair.clean, pair.corrupt, metric=metrics.logit_diff(pair.answer, pair.wrong),
            positions=[pair.spans[name] for name in names], progress=False,
        )  # fmt: skip
        # float32; logit differences of the order of ten, other batch sizes
        torch.testing.assert_close(
            result.per_prompt[..., prompt], alone.per_prompt[..., 0], atol=1e-4, rtol=1e-4
        )
    result.save(tmp_path / "r.safetensors")
    assert PatchResult.load(tmp_path / "r.safetensors").metadata == result.metadata
    patch = one_patch(result, (2, 0), prompt=1, model=demo)
    assert patch.intervention.pos == pairs.spans["IO"][1]


SWEEPS = {
    "ablate_sweep": lambda model, pairs, metric, **at: optlens.ablate_sweep(
        model, pairs.clean, "z", ("layer", "pos"), "zero", metric=metric, progress=False, **at
    ),
    "causal_trace": lambda model, pairs, metric, **at: optlens.causal_trace(
        model, pairs.clean, pairs.spans["S1"], metric, samples=2, progress=False, **at
    ),
    "path_patch": lambda model, pairs, metric, **at: optlens.path_patch(
        model, pairs.clean, pairs.corrupt, "mlps", [(4, head) for head in range(8)], metric,
        over=("layer", "pos"), progress=False, **at,
    ),
    "attribution_patch": lambda model, pairs, metric, **at: optlens.attribution_patch(
        model, pairs.clean, pairs.corrupt, "resid_pre", ("layer", "pos"), metric, **at
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_with_positions_takes_names(demo, pairs, name):
    chosen = pairs[[0, 3]]  # of which only the places of the names are unlike
    assert chosen.spans["IO"][0] != chosen.spans["IO"][1]
    metric = metrics.logit_diff(chosen.answers, chosen.wrong)
    found = SWEEPS[name](demo, chosen, metric, positions=["IO", "end"], spans=chosen.spans)
    at_first, at_second = (
        SWEEPS[name](demo, chosen, metric, positions=[place, -1]) for place in chosen.spans["IO"]
    )
    assert found.labels["pos"] == ["IO", "end"]
    assert (found.per_prompt[:, 0] - found.clean_per_prompt).abs().amax(0).min() > 0.01
    assert found.metadata["positions"]["IO"] == chosen.spans["IO"]
    expected = torch.stack([at_first.per_prompt[..., 0], at_second.per_prompt[..., 1]], -1)
    torch.testing.assert_close(found.per_prompt, expected, atol=1e-4, rtol=1e-4)


def test_a_span_of_several_positions_is_gone_through_one_by_one(demo, pairs):
    metric = metrics.logit_diff(pairs.answers, pairs.wrong)
    ends = [[place - 1, place] for place in pairs.spans["end"]]
    found, numbered = (
        optlens.patch_sweep(
            demo, pairs.clean, pairs.corrupt, metric=metric, progress=False, **options
        )
        for options in ({"positions": "ends", "spans": {"ends": ends}}, {"positions": [-2, -1]})
    )
    assert found.labels["pos"] == ["ends 0", "ends 1"]
    assert torch.equal(found.per_prompt, numbered.per_prompt)
    with pytest.raises(InputError, match=r"\[2, 2, 1, 2, 2, 2\] positions.*as many in each"):
        spans = {"ends": [*ends[:2], ends[2][:1], *ends[3:]]}
        optlens.patch_sweep(
            demo, pairs.clean, pairs.corrupt, metric=metric, positions="ends", spans=spans
        )


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (" John", "occurs 2 times"),
        ("Mary", "' Mary' does"),
        ([3, "who"], "Spans have the names what"),
        ([" Mary", 16], "0 to 15"),
        ([" Mary", 1.5], "whole number"),
    ],
)
def test_what_is_not_there_is_said(demo, positions, message):
    with pytest.raises(InputError, match=message):
        sweep(demo, positions=positions, spans={"what": 1})
