"""Attribution patching against true patching: equal for small differences, exact where all is linear."""

import pytest
import torch

import optlens
from optlens import metrics
from optlens.checks import InputError
from optlens.names import get_act_name
from optlens.patching import attribution_patch, patch_sweep, softmax_fix
from optlens.prompts import ioi
from tests.patching.test_sweep import (
    CASES,
    METRIC,
    VARIANTS,
    last_difference,
    make_model,
    make_prompts,
    padded_as_text,
)

ONE_LAYER = [case for case in CASES if "layer" in case[1] or case[0] == "embed"]


def make_close_pair(model, size, padded=False):
    """Two pairs of prompts whose differing tokens have nearly the same embeddings."""
    clean, corrupt, mask, _ = make_prompts(padded)
    differs = clean != corrupt
    corrupt[differs] = torch.tensor([2, 3, 4])
    table = model.decoder.embed_tokens.weight
    noise = torch.randn(3, table.shape[1], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        table[corrupt[differs]] = table[clean[differs]] + size * noise.to(table)
    return clean, corrupt, mask


def assert_same_changes(estimate, truth, direction, fraction):
    """Compare what patches change, up to a fraction of the largest change."""
    end = truth.corrupt_per_prompt if direction == "denoise" else truth.clean_per_prompt
    found, expected = estimate.per_prompt - end, truth.per_prompt - end
    largest = float(expected.abs().max())
    assert largest > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=fraction * largest)
    assert (estimate.axes, estimate.choices) == (truth.axes, truth.choices)
    assert estimate.labels == truth.labels
    torch.testing.assert_close(estimate.clean_per_prompt, truth.clean_per_prompt)
    torch.testing.assert_close(estimate.corrupt_per_prompt, truth.corrupt_per_prompt)


@pytest.mark.parametrize("variant", ["pre-LN", "350m"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("site", "over"), ONE_LAYER)
def test_small_patches_are_estimated_to_first_order(site, over, direction, variant):
    model = make_model(**VARIANTS[variant])
    clean, corrupt, _ = make_close_pair(model, 1e-7)
    arguments = (model, clean, corrupt, site, over, METRIC)
    truth = patch_sweep(*arguments, direction=direction, progress=False)
    for method in ("atp", "atp+qk"):
        estimate = attribution_patch(*arguments, method=method, direction=direction)
        # the second order is 1e-7 of the first, times curvatures that reach a thousand
        assert_same_changes(estimate, truth, direction, 1e-3)


@pytest.mark.parametrize(
    ("site", "over"), [c for c in ONE_LAYER if c[1] in (("layer", "head", "pos"), ("layer", "pos"))]
)
def test_left_padded_prompts(site, over, monkeypatch):
    model = make_model()
    clean, corrupt, mask = make_close_pair(model, 1e-7, padded=True)
    names = padded_as_text(model, monkeypatch, clean, corrupt, mask)
    truth = patch_sweep(model, *names, site, over, METRIC, progress=False)
    for method in ("atp", "atp+qk"):
        estimate = attribution_patch(model, *names, site, over, METRIC, method)
        assert_same_changes(estimate, truth, "denoise", 1e-3)


def test_several_sites_and_chosen_entries():
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, 1e-7)
    chosen = {"layers": [2, 0], "positions": [-1, 3]}
    arguments = (model, clean, corrupt, ["attn_out", "mlp_out"], ("pos", "layer"), METRIC)
    truth = patch_sweep(*arguments, **chosen, progress=False)
    estimate = attribution_patch(*arguments, **chosen)
    assert estimate.axes == ("component", "pos", "layer")
    assert_same_changes(estimate, truth, "denoise", 1e-3)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_positions_carry_the_tokens_of_both_runs(direction):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean[:1], corrupt[:1], "z", ("layer", "pos"), METRIC)
    estimate = attribution_patch(*arguments, direction=direction)
    truth = patch_sweep(*arguments, direction=direction, progress=False)
    assert estimate.labels == truth.labels
    assert estimate.labels["pos"][3] == f"3: ⟨{clean[0, 3]}⟩|⟨{corrupt[0, 3]}⟩"


@pytest.mark.parametrize("site", ["q", "k", "resid_pre", "embed"])
@pytest.mark.parametrize("variant", ["pre-LN", "350m"])
def test_padded_prompts_get_what_they_get_alone(site, variant, monkeypatch):
    model = make_model(**VARIANTS[variant])
    clean, corrupt, mask, _ = make_prompts(padded=True)
    over = {"resid_pre": ("layer", "pos"), "embed": ("pos",)}.get(site, ("layer", "head", "pos"))
    names = padded_as_text(model, monkeypatch, clean, corrupt, mask)
    # counted from the end they are in the same columns of both prompts, from the start in others
    for method, places in [("atp", [1, 3]), ("atp+qk", [1, 3]), ("atp*", range(-4, 0))]:
        arguments = {"method": method, "positions": places}
        together = attribution_patch(model, *names, site, over, METRIC, **arguments)
        for row, real in enumerate(mask.bool()):
            pair = clean[row, real][None], corrupt[row, real][None]
            alone = attribution_patch(model, *pair, site, over, METRIC, **arguments)
            torch.testing.assert_close(alone.per_prompt[..., 0], together.per_prompt[..., row])


def patterns_of_patched(model, base, source, site, place, layer):
    """Run with queries or keys of one place patched, and return the pattern that comes of it."""
    name, pattern = get_act_name(site, layer), get_act_name("pattern", layer)
    values, kept = model.run_with_cache(source, name)[1][name], {}

    def write(value, hook):
        value[:, *place] = values[:, *place]

    def keep(value, hook):
        kept["pattern"] = value.clone()

    with torch.no_grad():
        model.run_with_hooks(base, fwd_hooks=[(name, write), (pattern, keep)])
    return kept["pattern"]


@pytest.mark.parametrize("method", ["atp+qk", "atp*"])
@pytest.mark.parametrize("variant", ["pre-LN", "350m"])
@pytest.mark.parametrize("site", ["q", "k"])
def test_queries_and_keys_count_by_the_pattern_that_they_make(site, variant, method):
    """In every layer: the pattern of a true run, less the unpatched one, times the gradient."""
    model = make_model(**VARIANTS[variant])
    clean, corrupt, _, _ = make_prompts()
    names = [get_act_name("pattern", layer) for layer in range(3)]

    def gradients(held):
        kept = {}
        hooks = [(n, lambda value, hook: value.detach()) for n in held]
        hooks += [(n, lambda value, hook: kept.setdefault(hook.name, value)) for n in names]
        value = last_difference(model.run_with_hooks(corrupt, fwd_hooks=hooks)).sum()
        found = torch.autograd.grad(value, [kept[n] for n in names], materialize_grads=True)
        return [kept[n].detach() for n in names], found

    before, plain = gradients([])
    held = [[get_act_name(part, layer) for part in ("attn_out", "mlp_out")] for layer in range(3)]
    dropped = [gradients(each)[1] for each in held]
    result = attribution_patch(
        model, clean, corrupt, site, ("layer", "pos", "head"), METRIC, method
    )
    change = result.per_prompt - result.corrupt_per_prompt
    for layer, pos, head in [(0, 1, 2), (0, 3, 0), (1, 4, 3), (1, 1, 1), (2, 3, 1), (2, 5, 0)]:
        after = patterns_of_patched(model, corrupt, clean, site, (pos, head), layer)
        moved = after - before[layer]
        expected = (moved * plain[layer]).sum((1, 2, 3))
        if method == "atp*":
            size = sum((moved * each[layer]).sum((1, 2, 3)).abs() for each in dropped) / 2
            expected = torch.where(expected < 0, -size, size)
        torch.testing.assert_close(change[layer, pos, head], expected)


def make_linear_end():
    """A model in which the logits are linear in what the last block's attention adds."""
    model = make_model(_remove_final_layer_norm=True)
    with torch.no_grad():
        model.decoder.layers[-1].fc2.weight.zero_()
    return model


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("method", "site", "over"),
    [
        ("atp", "resid_mid", ("pos",)),
        ("atp", "z", ("head", "pos")),
        ("atp", "v", ("head", "pos")),
        ("atp", "pattern", ("head", "pos", "key")),
        ("atp", "attn_out", ("pos",)),
        ("atp+qk", "q", ("head",)),
        ("atp+qk", "q", ("head", "pos")),
        ("atp+qk", "k", ("head",)),
        ("atp+qk", "k", ("head", "pos")),
        ("atp+qk", "k", ("pos",)),
    ],
)
def test_where_the_rest_is_linear_estimates_are_exact(method, site, over, direction):
    model = make_linear_end()
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean, corrupt, site, over, METRIC)
    truth = patch_sweep(*arguments, direction=direction, layers=[2], progress=False)
    estimate = attribution_patch(*arguments, method, direction, layers=[2])
    # float64, but for orders of summation
    assert_same_changes(estimate, truth, direction, 1e-10)


def test_the_softmax_fix_sees_what_a_gradient_through_the_softmax_misses():
    model = make_linear_end()
    with torch.no_grad():
        model.decoder.layers[2].self_attn.q_proj.weight.mul_(40)  # saturates the softmax
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean, corrupt, "q", ("head",), METRIC)
    truth = patch_sweep(*arguments, layers=[2], progress=False)
    plain, fixed = (attribution_patch(*arguments, m, layers=[2]) for m in ("atp", "atp+qk"))
    largest = (truth.values - truth.corrupt).abs().max()
    assert largest > 0.1
    assert (fixed.values - truth.values).abs().max() < 1e-9 * largest
    assert (plain.values - truth.values).abs().max() > 0.5 * largest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_one_key_at_a_time_equals_a_softmax_for_each(dtype, size):
    from optlens.attention_mask import AttentionMask

    draw = torch.Generator().manual_seed(0)
    q, k, patched = (torch.randn(2, 5, 3, 4, generator=draw).double() * size**0.5 for _ in "qkp")
    gradient = torch.randn(2, 3, 5, 5, generator=draw).double()
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = AttentionMask(padding, 2, 5, 5, q.device)

    def rows(keys):
        scores = torch.einsum("bqhe,bkhe->bhqk", q, keys)
        return scores.masked_fill(~mask.allowed, -torch.inf).softmax(-1).nan_to_num(0.0)

    expected = torch.zeros(2, 5, 3, dtype=torch.float64)
    for place in range(5):
        one = k.clone()
        one[:, place] = patched[:, place]
        expected[:, place] = ((rows(one) - rows(k)) * gradient).sum((2, 3))
    given = [x.to(dtype) for x in (patched, q, k, gradient)]
    found = softmax_fix.single_key_effect(*given, mask, 1.0)
    # scores reach 500 and are rounded to 2**-24 of that in float32
    atol = 1e-12 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


def test_the_softmax_of_half_precision_is_computed_in_float32():
    from optlens.attention_mask import AttentionMask

    given = [torch.randn(1, 5, 2, 4).bfloat16() for _ in range(3)]
    gradient = torch.randn(1, 2, 5, 5).bfloat16()
    mask = AttentionMask(None, 1, 5, 5, gradient.device)
    for effect in ("query_effect", "all_keys_effect", "single_key_effect"):
        found = getattr(softmax_fix, effect)(*given, gradient, mask, 0.5)
        assert found.dtype == torch.float32, effect


@pytest.mark.parametrize(("site", "streams"), [("z", 2), ("resid_mid", 3), ("mlp_post", 2)])
def test_dropping_blocks_equals_holding_what_they_add_constant(site, streams):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    names = [get_act_name({"mlp_post": "post"}.get(site, site), layer) for layer in range(3)]
    sources = model.run_with_cache(clean, names)[1]

    def term(held):
        kept = {}
        hooks = [(n, lambda value, hook: value.detach()) for n in held]
        hooks += [(n, lambda value, hook: kept.setdefault(hook.name, value)) for n in names]
        value = last_difference(model.run_with_hooks(corrupt, fwd_hooks=hooks))
        found = torch.autograd.grad(value.sum(), [kept[n] for n in names], materialize_grads=True)
        products = [((sources[n] - kept[n]) * g) for n, g in zip(names, found, strict=True)]
        return torch.stack([p.flatten(1).sum(-1) for p in products]).detach()

    held = [[get_act_name(part, layer) for part in ("attn_out", "mlp_out")] for layer in range(3)]
    sizes = sum(term(names_held).abs() for names_held in held) / streams
    result = attribution_patch(model, clean, corrupt, site, "layer", METRIC, "atp*")
    change = result.per_prompt - result.corrupt_per_prompt
    torch.testing.assert_close(change, torch.where(term([]) < 0, -sizes, sizes))


def test_dropping_blocks_finds_what_cancels():
    model = make_model(_remove_final_layer_norm=True)
    with torch.no_grad():
        for layer in (1, 2):
            model.decoder.layers[layer].self_attn.out_proj.weight.zero_()
        model.decoder.layers[2].fc2.weight.zero_()
    clean, corrupt, _, _ = make_prompts()

    # the MLP of block 1 reads the stream before its norm and takes nearly all of it away again
    held = model.decoder.layers[1]
    forward = held.fc2.forward
    resid = {}
    handle = model.hook_dict["blocks.1.hook_resid_mid"].add_recorder(
        lambda value, hook: resid.update(mid=value)
    )
    held.fc2.forward = lambda x: forward(x) * 0 - 0.999 * resid["mid"]
    plain, star = (
        attribution_patch(model, clean, corrupt, "z", "layer", METRIC, m, layers=[0])
        for m in ("atp", "atp*")
    )
    held.fc2.forward = forward
    handle.remove()
    small = (plain.per_prompt - plain.corrupt_per_prompt).abs()
    large = (star.per_prompt - star.corrupt_per_prompt).abs()
    # one of two passes (without block 1) sees the direct effect alone: a thousand times as large
    torch.testing.assert_close(large, small * (1 + 1000) / 2, rtol=1e-9, atol=0)


def test_on_the_demo_model_the_softmax_fix_finds_the_heads_that_queries_matter_in():
    model = optlens.load()
    prompts = ioi(model, 8, seed=0)
    texts = list(prompts.clean), list(prompts.corrupt)
    arguments = (model, *texts, "q", ("layer", "head"), prompts.metric())
    truth = patch_sweep(*arguments, progress=False)
    change = truth.values - truth.corrupt

    def likeness(method):
        found = attribution_patch(*arguments, method)
        pair = torch.stack([(found.values - found.corrupt).flatten(), change.flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    assert change.abs().max() > 1
    assert likeness("atp") < 0.7  # measured: 0.19
    assert likeness("atp+qk") > 0.95  # measured: 0.999
    assert likeness("atp*") > 0.95


# ------------------------------------------------------------------------- metrics of all kinds


@pytest.mark.parametrize(
    "function",
    [
        lambda logits: logits[:, -1, 5] - logits[:, -1, 6],
        lambda logits: (logits[:, -1, 5] * logits[:, 2, 9]).mean(),
        lambda logits: logits[:, -1, 5] * logits[:, -1, 6].mean(),
    ],
    ids=["one number a prompt", "one for all", "each from all prompts"],
)
def test_callables(function):
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, 1e-7)
    arguments = (model, clean, corrupt, "z", ("layer", "head"), function)
    truth = patch_sweep(*arguments, progress=False)
    assert_same_changes(attribution_patch(*arguments), truth, "denoise", 1e-3)


@pytest.mark.parametrize("name", ["prob", "log_prob", "cross_entropy", "entropy"])
def test_metrics_that_are_not_linear(name):
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, 1e-7)
    metric = getattr(metrics, name)(*([5] if "prob" in name else []))
    arguments = (model, clean, corrupt, "z", ("layer", "head"), metric)
    truth = patch_sweep(*arguments, progress=False)
    assert_same_changes(attribution_patch(*arguments), truth, "denoise", 1e-3)


def test_the_divergence_is_from_the_clean_run():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with torch.no_grad():
        target = model(clean).logits[:, -1].log_softmax(-1)

    def divergence(logits):
        found = logits[:, -1].log_softmax(-1)
        return (target.exp() * (target - found)).sum(-1)

    found, expected = (
        attribution_patch(model, clean, corrupt, metric=metric)
        for metric in (metrics.kl(), divergence)
    )
    torch.testing.assert_close(found.per_prompt, expected.per_prompt)
    assert (expected.per_prompt - expected.corrupt_per_prompt).abs().max() > 0.1


# ------------------------------------------------------------------------------- the model's state


def test_nothing_is_left_behind_and_frozen_parameters_will_do():
    model = make_model().train().requires_grad_(False)
    clean, corrupt, _, _ = make_prompts()
    with torch.no_grad():
        result = attribution_patch(model, clean, corrupt, metric=METRIC, method="atp*")
    assert model.training
    assert not any(point.listening for point in model.hook_dict.values())
    assert not result.per_prompt.requires_grad
    model.requires_grad_(True)
    again = attribution_patch(model, clean, corrupt, metric=METRIC, method="atp*")
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(result.per_prompt, again.per_prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": None}, "what to measure"),
        ({"metric": metrics.rank(5)}, "moves in steps"),
        ({"metric": metrics.kl(), "direction": "noise"}, "vanishes there"),
        ({"metric": lambda logits: logits[:, -1].argmax(-1).double()}, "without a gradient"),
        ({"method": "atp-star"}, r"atp, atp\+qk, atp\*"),
        ({"direction": "forward"}, "'denoise' or 'noise'"),
        ({"over": ("head",)}, "layers 0 to 2 at once.*patch_sweep"),
        ({"site": "mlp_out", "over": ("layer", "head")}, "axes pos, d_model"),
    ],
)
def test_bad_arguments_say_what_would_be_right(changes, message):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with pytest.raises(InputError, match=message):
        attribution_patch(model, clean, corrupt, **({"metric": METRIC} | changes))


def test_one_block_cannot_be_dropped_and_inference_mode_has_no_gradients():
    clean, corrupt, _, _ = make_prompts()
    with pytest.raises(InputError, match="only one"):
        attribution_patch(
            make_model(num_hidden_layers=1), clean, corrupt, metric=METRIC, method="atp*"
        )
    with torch.inference_mode(), pytest.raises(InputError, match="leave that block"):
        attribution_patch(make_model(), clean, corrupt, metric=METRIC)
