"""Sweeps over the neurons with the largest estimated effect, against sweeps over all of them."""

import pytest
import torch

from optlens import Ablate, Scale, metrics
from optlens.checks import InputError
from optlens.patching import PatchResult, SweepPlan, SweepStream, ablate_sweep, patch_sweep
from tests.patching.test_attribution import make_close_pair
from tests.patching.test_sweep import (
    METRIC,
    VARIANTS,
    last_difference,
    make_model,
    make_prompts,
    padded_as_text,
)

CLOSE = 1e-5  # how far embeddings differ: a change's second order is as much smaller than its first
SITES = ["mlp_pre", "mlp_post"]
OVER = [("layer", "neuron"), ("layer", "pos", "neuron"), ("neuron", "pos", "layer")]


def largest(truth: PatchResult, unpatched: float, count: int) -> list[int]:
    """The neurons with the largest true effect; they must stand out from the next."""
    effect = (truth.values - unpatched).abs().movedim(truth.axes.index("neuron"), 0)
    size, order = effect.flatten(1).amax(1).sort(descending=True)
    assert size[count - 1] > 1.01 * size[count]
    return sorted(order[:count].tolist())


def entries_of(truth: PatchResult, neurons: list[int]) -> torch.Tensor:
    dim = truth.axes.index("neuron")
    return truth.per_prompt.index_select(dim, torch.tensor(neurons))


def assert_top_of(truth, found, unpatched, count):
    """The right neurons were swept, and their numbers are those of the sweep over all."""
    assert found.choices["neuron"] == largest(truth, unpatched, count)
    assert found.labels["neuron"] == [str(each) for each in found.choices["neuron"]]
    assert found.complete
    expected = entries_of(truth, found.choices["neuron"])
    torch.testing.assert_close(found.per_prompt, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["pre-LN", "350m"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("over", OVER, ids="-".join)
@pytest.mark.parametrize("site", SITES)
def test_they_are_those_with_the_largest_true_effect(site, over, direction, variant):
    model = make_model(**VARIANTS[variant])
    clean, corrupt, _ = make_close_pair(model, CLOSE)
    arguments = (model, clean, corrupt, site, over, METRIC, direction)
    truth = patch_sweep(*arguments, progress=False)
    unpatched = truth.corrupt if direction == "denoise" else truth.clean
    for count in (1, 4):
        found = patch_sweep(*arguments, top_neurons=count, progress=False)
        assert_top_of(truth, found, unpatched, count)


@pytest.mark.parametrize(
    "chosen",
    [{"layers": [2]}, {"layers": [0]}, {"positions": [3]}, {"layers": [1, 2], "positions": [-1]}],
    ids=str,
)
def test_layers_and_positions_that_are_not_swept_do_not_count(chosen):
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, CLOSE)
    arguments = (model, clean, corrupt, "mlp_post", ("layer", "pos", "neuron"), METRIC)
    truth = patch_sweep(*arguments, **chosen, progress=False)
    found = patch_sweep(*arguments, **chosen, top_neurons=3, progress=False)
    assert_top_of(truth, found, truth.corrupt, 3)
    assert (
        found.choices["neuron"]
        != patch_sweep(*arguments, top_neurons=3, progress=False).choices["neuron"]
    )


def test_effects_are_averaged_over_prompts_like_the_result():
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, CLOSE)
    over = ("layer", "neuron")
    options = {"top_neurons": 3, "progress": False}
    together, *alone = (
        patch_sweep(model, *pair, "mlp_post", over, METRIC, **options).choices["neuron"]
        for pair in ((clean, corrupt), (clean[:1], corrupt[:1]), (clean[1:], corrupt[1:]))
    )
    assert together not in alone
    truth = patch_sweep(model, clean, corrupt, "mlp_post", over, METRIC, progress=False)
    assert together == largest(truth, truth.corrupt, 3)


def test_padded_prompts(monkeypatch):
    model = make_model()
    clean, corrupt, mask = make_close_pair(model, CLOSE, padded=True)
    names = padded_as_text(model, monkeypatch, clean, corrupt, mask)
    arguments = (model, *names, "mlp_pre", ("layer", "pos", "neuron"), METRIC)
    truth = patch_sweep(*arguments, progress=False)
    found = patch_sweep(*arguments, top_neurons=3, progress=False)
    assert_top_of(truth, found, truth.corrupt, 3)


@pytest.mark.parametrize("each", [Scale("mlp_post", layer=2, factor=3.0), Ablate("z", layer=2)])
def test_under_interventions(each):
    """They decide which neurons matter: the estimate is that of runs under them."""
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, CLOSE)
    arguments = (model, clean, corrupt, "mlp_post", ("layer", "neuron"), METRIC)
    plain = patch_sweep(*arguments, top_neurons=3, progress=False)
    options = {"interventions": each, "progress": False}
    truth = patch_sweep(*arguments, **options)
    found = patch_sweep(*arguments, top_neurons=3, **options)
    assert_top_of(truth, found, truth.corrupt, 3)
    assert found.choices != plain.choices
    assert not model.edited_hooks


def test_several_sites_have_one_list():
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, CLOSE)
    arguments = (model, clean, corrupt, SITES, ("layer", "neuron"), METRIC)
    truth = patch_sweep(*arguments, progress=False)
    found = patch_sweep(*arguments, top_neurons=3, progress=False)
    assert found.axes == ("component", "layer", "neuron")
    assert_top_of(truth, found, truth.corrupt, 3)


def test_where_several_blocks_are_written_each_counts_by_itself():
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, CLOSE)
    arguments = (model, clean, corrupt, "mlp_post")
    options = {"top_neurons": 3, "progress": False}
    single = patch_sweep(*arguments, ("layer", "neuron"), METRIC, **options)
    window = patch_sweep(*arguments, ("layer", "neuron"), METRIC, window=2, **options)
    at_once = patch_sweep(*arguments, ("neuron",), METRIC, **options)
    assert single.choices["neuron"] == window.choices["neuron"] == at_once.choices["neuron"]
    expected = patch_sweep(
        *arguments, "neuron", METRIC, neurons=at_once.choices["neuron"], progress=False
    )
    assert torch.equal(at_once.per_prompt, expected.per_prompt)


def test_functions_of_the_logits_and_kl():
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, CLOSE)
    over = ("layer", "neuron")
    for metric in (last_difference, lambda logits: last_difference(logits).sum(), metrics.kl()):
        arguments = (model, clean, corrupt, "mlp_post", over, metric)
        truth = patch_sweep(*arguments, progress=False)
        found = patch_sweep(*arguments, top_neurons=2, progress=False)
        assert_top_of(truth, found, truth.corrupt, 2)


# -------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("site", SITES)
def test_resampling_of_a_close_prompt(site):
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, CLOSE)
    arguments = {"mode": "resample", "reference": corrupt[:1], "metric": METRIC, "progress": False}
    truth = ablate_sweep(model, clean[:1], site, ("layer", "neuron"), **arguments)
    found = ablate_sweep(model, clean[:1], site, ("layer", "neuron"), top_neurons=3, **arguments)
    assert_top_of(truth, found, truth.clean, 3)


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablations_where_all_is_linear(mode):
    """After the last block's MLP nothing but a sum follows, so that estimates are exact."""
    model = make_model(_remove_final_layer_norm=True)
    clean, corrupt, _, _ = make_prompts()
    arguments = {"mode": mode, "metric": METRIC, "layers": [2], "progress": False}
    arguments |= {} if mode == "zero" else {"reference": corrupt}
    truth = ablate_sweep(model, clean, "mlp_post", ("layer", "neuron"), **arguments)
    found = ablate_sweep(model, clean, "mlp_post", ("layer", "neuron"), top_neurons=3, **arguments)
    assert_top_of(truth, found, truth.clean, 3)
    other = [Scale("mlp_post", layer=1, factor=-3.0)]
    truth = ablate_sweep(
        model, clean, "mlp_post", ("layer", "neuron"), interventions=other, **arguments
    )
    under = ablate_sweep(
        model,
        clean,
        "mlp_post",
        ("layer", "neuron"),
        interventions=other,
        top_neurons=3,
        **arguments,
    )
    assert_top_of(truth, under, truth.clean, 3)


# ------------------------------------------------------------------------ results and bad input


def test_a_saved_result_tells_and_can_be_completed(tmp_path, monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean, corrupt, "mlp_post", ("layer", "neuron"), METRIC)
    options = {"top_neurons": 5, "progress": False}
    whole = patch_sweep(*arguments, **options)
    assert "5 of 12" in whole.metadata["top_neurons"]
    whole.to_html(tmp_path / "page.html")
    assert whole.metadata["top_neurons"] in (tmp_path / "page.html").read_text(encoding="utf-8")
    monkeypatch.setattr("optlens.patching.plan.MOST_TOKENS", 1)
    stream = patch_sweep(*arguments, top_neurons=5, stream=True)
    assert isinstance(stream, SweepStream)
    next(stream).save(tmp_path / "part.safetensors")
    part = PatchResult.load(tmp_path / "part.safetensors")
    assert not part.complete and part.metadata == whole.metadata
    again = patch_sweep(*arguments, **options, resume=part)
    torch.testing.assert_close(again.per_prompt, whole.per_prompt)
    named = {"neurons": whole.choices["neuron"], "progress": False}
    for other in ({"top_neurons": 4, "progress": False}, named):
        with pytest.raises(InputError, match="another sweep"):
            patch_sweep(*arguments, **other, resume=part)


def test_the_plan_is_of_the_chosen_neurons():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    plan = patch_sweep(
        model, clean, corrupt, "mlp_post", ("layer", "neuron"), METRIC, top_neurons=5, dry_run=True
    )
    assert isinstance(plan, SweepPlan) and plan.patches == 3 * 5 * 2


def test_all_of_them_may_be_asked_for():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean, corrupt, "mlp_post", ("layer", "neuron"), METRIC)
    found = patch_sweep(*arguments, top_neurons=12, progress=False)
    assert torch.equal(found.per_prompt, patch_sweep(*arguments, progress=False).per_prompt)


def by_argmax(logits):
    return logits[:, -1].argmax(-1).double()


def root(logits):
    return (logits[:, -1, 5] - logits[:, -1, 5]).sqrt()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neurons": [1]}, "one of the two"),
        ({"over": ("layer", "pos")}, "not among over=.*add it"),
        ({"top_neurons": 0}, "from 1 to 12"),
        ({"top_neurons": 13}, "from 1 to 12"),
        ({"top_neurons": 2.0}, "from 1 to 12"),
        ({"top_neurons": True}, "from 1 to 12"),
        ({"metric": metrics.rank(5)}, "moves in steps.*neurons="),
        ({"metric": by_argmax}, "without a gradient.*neurons="),
        ({"metric": root}, "NaN or infinite.*neurons="),
        ({"metric": None}, "^Say what to measure"),
        ({"site": "resid_pre"}, "means nothing there"),
        ({"metric": metrics.kl(), "direction": "noise"}, "vanishes.*neurons="),
    ],
    ids=str,
)
def test_what_cannot_be_chosen_from_says_what_to_do(changes, message):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    options = {"site": "mlp_post", "over": ("layer", "neuron"), "metric": METRIC, "top_neurons": 2}
    with pytest.raises(InputError, match=f"(?s){message}"):
        patch_sweep(model, clean, corrupt, **(options | changes), progress=False)
    if "direction" not in changes:
        with pytest.raises(InputError, match=f"(?s){message}"):
            ablate_sweep(model, clean, mode="zero", **(options | changes), progress=False)
    assert not model.edited_hooks
