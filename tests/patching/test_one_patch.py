"""Any patch of a sweep, made again as an intervention and as code, measures what the sweep found."""

import random

import pytest
import torch

import optlens
from optlens import Ablate, Freeze, Patch, Steer
from optlens.checks import InputError
from optlens.patching import ablate_sweep, attribution_patch, causal_trace, knockout_sweep
from optlens.patching.one_patch import OnePatch, one_patch, text_of
from optlens.patching.patch_code import code_of
from optlens.patching.patch_run import GivenAgain, final_logits
from tests.patching.test_sweep import CASES, METRIC, make_model, make_prompts

patch_sweep = optlens.patch_sweep


def difference(logits):
    return float(logits[5] - logits[6])  # as METRIC


def check(model, result, count=6, interventions=(), spans=None):
    """Make some patches of a result again, those that do something and some that do not."""
    drawn = random.Random(0)
    standing = GivenAgain(result, model, interventions, spans)
    shape = result.per_prompt.shape
    for _ in range(count):
        *index, prompt = (drawn.randrange(size) for size in shape)
        patch = one_patch(result, index, prompt, model)
        found = final_logits(model, patch, standing, prompt)
        expected = float(result.per_prompt[(*index, prompt)])
        assert difference(found) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert run_code(code_of(patch, model, standing.interventions), model, interventions) == (
            pytest.approx(expected, rel=1e-9, abs=1e-9)
        )
    ends = {"source": result.clean_per_prompt, "base": result.corrupt_per_prompt}
    if result.metadata.get("direction") == "noise":
        ends = {"base": result.clean_per_prompt, "source": result.corrupt_per_prompt}
    if "direction" not in result.metadata:
        ends = {"base": result.clean_per_prompt}
    for which, values in ends.items():
        found = final_logits(
            model, one_patch(result, [0] * len(index), 0, model), standing, 0, which
        )
        assert difference(found) == pytest.approx(float(values[0]), rel=1e-9, abs=1e-9)


def run_code(code, model, interventions):
    names = {"model": model, "interventions": list(interventions)}
    exec(code, names)
    return difference(names["logits"])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("site", "over"), CASES)
def test_a_patch_made_again_measures_the_same(site, over, direction):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    options = {"direction": direction, "progress": False}
    check(model, patch_sweep(model, clean, corrupt, site, over, METRIC, **options))


@pytest.mark.parametrize("over", [("layer", "pos"), ("pos",)])
@pytest.mark.parametrize("window", [2, 3])
def test_windows_and_chosen_layers(over, window):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    options = {"layers": [1, 2], "window": window, "positions": [-1, 2, -3], "progress": False}
    check(model, patch_sweep(model, clean, corrupt, "attn_out", over, METRIC, **options))


def test_several_sites():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    sites = ["attn_out", "mlp_out", "resid_mid"]
    result = patch_sweep(model, clean, corrupt, sites, metric=METRIC, progress=False)
    check(model, result, count=12)


@pytest.mark.parametrize("site", ["z", "mlp_post", "pattern"])
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_an_ablation_made_again_measures_the_same(site, mode):
    model = make_model()
    prompts = make_prompts()[0]
    others = torch.randint(7, 40, (4, 6), generator=torch.Generator().manual_seed(9))
    reference = None if mode == "zero" else others
    options = {"mode": mode, "reference": reference, "seed": 3, "progress": False}
    over = ("layer", "head") if site != "mlp_post" else ("layer", "pos")
    check(model, ablate_sweep(model, prompts, site, over, metric=METRIC, **options), count=8)


@pytest.mark.parametrize("over", [("layer", "key"), ("head", "key"), ("query",)])
def test_a_knockout_made_again_measures_the_same(over):
    model = make_model()
    options = {"window": 2, "progress": False}
    queries = None if "query" in over else -1
    result = knockout_sweep(model, make_prompts()[0], METRIC, queries, over=over, **options)
    check(model, result)


@pytest.mark.parametrize("mode", ["patch", "mean"])
def test_under_interventions_of_the_sweep(mode):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    vector = torch.ones(16, dtype=torch.float64)
    given = [Ablate("z", layer=0, head=1), Steer(layer=0, vector=vector, pos="late")]
    more = {"interventions": given, "spans": {"late": [3, 4]}, "progress": False}
    if mode == "patch":
        result = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), METRIC, **more)
    else:
        others = torch.randint(7, 40, (4, 6), generator=torch.Generator().manual_seed(9))
        more |= {"mode": "mean", "reference": others}
        result = ablate_sweep(model, clean, "z", ("layer", "head"), metric=METRIC, **more)
    standing = GivenAgain(result, model, given, more["spans"])
    for prompt in range(len(clean)):
        patch = one_patch(result, (1, 2), prompt)
        found = difference(final_logits(model, patch, standing, prompt))
        assert found == pytest.approx(float(result.per_prompt[1, 2, prompt]), rel=1e-9)
    with pytest.raises(InputError, match="ran under 2 interventions"):
        GivenAgain(result, model, given[:1])
    only = {"interventions": given[:1], "progress": False}
    plain = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), METRIC, **only)
    check(model, plain, interventions=given[:1])


def test_it_equals_writing_the_recorded_value():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    clean, corrupt = clean[:1], corrupt[:1]
    options = {"progress": False}
    result = patch_sweep(model, clean, corrupt, "z", ("layer", "head", "pos"), METRIC, **options)
    patch = one_patch(result, (1, 2, 4))
    assert patch.intervention == Freeze("z", layer=1, head=2, pos=4, source=clean)
    _, cache = model.run_with_cache(clean)
    value = cache["z", 1][0, 4, 2]
    with model.intervene(Patch("z", layer=1, head=2, pos=4, value=value)):
        expected = model(corrupt).logits[0, -1]
    found = final_logits(model, patch, GivenAgain(result, model))
    torch.testing.assert_close(found, expected)


def test_prompts_of_unequal_length_are_taken_without_their_padding():
    model = optlens.load()
    clean = ["When Mary and John went out, John gave it to", "Mary and John met. John spoke to"]
    corrupt = [
        text.replace(" John gave", " Mary gave").replace(". John", ". Mary") for text in clean
    ]
    metric = optlens.metrics.logit_diff(" Mary", " John")
    more = {"progress": False}
    result = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), metric, **more)
    answers = [model.to_single_token(name) for name in (" Mary", " John")]
    for prompt, text in enumerate(corrupt):
        patch = one_patch(result, (2, 3), prompt, model)
        assert patch.tokens == model.tokenizer.encode(text)
        logits = final_logits(model, patch, GivenAgain(result, model), prompt)
        found = float(logits[answers[0]] - logits[answers[1]])
        assert found == pytest.approx(float(result.per_prompt[2, 3, prompt]), abs=1e-4)
        assert f"corrupt = {text!r}" in code_of(patch, model)
        assert "torch.tensor" in code_of(patch)  # without the model, ids
    ablated = ablate_sweep(model, clean, mode="mean", reference=clean, metric=metric, **more)
    patch = one_patch(ablated, (2, 3), 1, model)
    assert patch.intervention.reference == tuple(clean)
    logits = final_logits(model, patch, GivenAgain(ablated, model), 1)
    found = float(logits[answers[0]] - logits[answers[1]])
    assert found == pytest.approx(float(ablated.per_prompt[2, 3, 1]), abs=1e-4)


def test_what_is_no_single_intervention_says_why():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    traced = causal_trace(model, clean[:1], [1], METRIC, samples=2, progress=False)
    estimated = attribution_patch(model, clean, corrupt, "z", ("layer", "head"), METRIC)
    for result, reason in ((traced, "draws of noise"), (estimated, "by gradients")):
        with pytest.raises(InputError, match=reason):
            one_patch(result, (0, 0))
    fine = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), METRIC, progress=False)
    with pytest.raises(InputError, match=r"the result has the shape \(3, 4\)"):
        one_patch(fine, (3, 0))


def test_hooks_on_the_model_are_refused():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    result = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), METRIC, progress=False)
    patch, standing = one_patch(result, (0, 0)), GivenAgain(result, model)
    with model.intervene(Ablate("z", layer=0)), pytest.raises(InputError, match="Hook functions"):
        final_logits(model, patch, standing)


def test_code_holds_texts_only_where_they_give_the_same_tokens():
    model = optlens.load()
    ids = model.tokenizer.encode("The cat")
    assert text_of(ids, model) == "The cat"
    assert text_of(ids[1:], model) is None and text_of(ids, None) is None
    turned = model.tokenizer.encode("The \u202ecat\n")
    code = code_of(OnePatch(Ablate("z", layer=0), turned, "prompt"), model)
    assert "prompt = 'The \\u202ecat\\n'\n" in code
