"""Listening and editing at named points: what it may change, what it must not, and what it says when misused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import VARIANTS, random_model, tiny_config
from fixtures import tiny_opt
from torch.nn import functional as F
from twins import RELATIVE, assert_near

from optlens.checks import InputError
from optlens.config import OPTConfig
from optlens.hooks import HookError, HookPoint
from optlens.model import OPTForCausalLM
from optlens.names import UnknownHookError, hook_names
from optlens.tokenizer import OPTTokenizer

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
EXPLICIT_ATTENTION = ("hook_attn_scores", "hook_pattern")
EXPLICIT_NORM = ("hook_scale", "hook_normalized")
Z, RESID = "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"


def build(
    variant: str = "pre_ln", dtype: torch.dtype = torch.float32, **more: Any
) -> OPTForCausalLM:
    return random_model(tiny_config(**VARIANTS[variant], **more), dtype)


def zero_in_place(value: torch.Tensor, hook: HookPoint) -> None:
    value.zero_()


def double(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return 2 * value


def exactly(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def listeners(model: OPTForCausalLM) -> dict[str, tuple]:
    """Everything that is attached anywhere."""
    attached = {}
    for name, point in model.hook_dict.items():
        lists = (point.editors, point.recorders, point.gradient_hooks)
        if any(lists) or point.listening or point.edited:
            attached[name] = tuple(tuple(entries) for entries in lists)
    return attached


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """A function that makes a model tell which of its layers used fused attention."""
    current: list[int] = []
    fused: list[int] = []
    kernel = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        fused.append(current[-1])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)

    def watch(model: OPTForCausalLM) -> list[int]:
        for number, layer in enumerate(model.decoder.layers):
            layer.self_attn.register_forward_pre_hook(lambda *_, n=number: current.append(n))
        return fused

    yield watch


# --- the path that a pass takes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m"])
@torch.no_grad()
def test_attention_is_fused_unless_its_scores_or_pattern_are_listened_to(variant, attention_calls):
    model = build(variant, num_hidden_layers=3)
    fused = attention_calls(model)

    def layers_fused_in(run: Callable[[], Any]) -> list[int]:
        fused.clear()
        run()
        return list(fused)

    assert layers_fused_in(lambda: model(IDS)) == [0, 1, 2]
    assert layers_fused_in(lambda: model(IDS, output_attentions=True)) == []
    assert layers_fused_in(lambda: model.run_with_cache(IDS)) == []
    for name, point in model.hook_dict.items():
        explicit = [point.layer()] if name.endswith(EXPLICIT_ATTENTION) else []
        expected = [layer for layer in range(3) if layer not in explicit]
        assert layers_fused_in(lambda n=name: model.run_with_cache(IDS, n)) == expected, name
        edit = [(name, lambda value, hook: None)]
        assert layers_fused_in(lambda e=edit: model.run_with_hooks(IDS, e)) == expected, name
    assert layers_fused_in(lambda: model(IDS)) == [0, 1, 2]


def test_a_gradient_hook_on_the_pattern_takes_the_explicit_path(attention_calls):
    model = build(num_hidden_layers=3)
    fused = attention_calls(model)
    hooks = [("blocks.1.attn.hook_pattern", lambda gradient, hook: None)]
    model.run_with_hooks(IDS, bwd_hooks=hooks)
    assert fused == [0, 2]


@torch.no_grad()
def test_optional_values_are_computed_only_when_listened_to(monkeypatch):
    calls: list[str] = []
    einsum = torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda *args: calls.append(args[0]) or einsum(*args))
    model = build()
    model(IDS)
    model.run_with_cache(IDS)
    assert calls == []
    model.run_with_cache(IDS, "blocks.1.attn.hook_result")
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m", "no_affine"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["no padding", "padding"])
@torch.no_grad()
def test_recording_is_bitwise_neutral_to_its_path(variant, mask, dtype):
    """More listeners change no bit; only scores, pattern and the inside of a LayerNorm choose another path."""
    model = build(variant, dtype)
    names = list(model.hook_dict)
    plain = model(IDS, attention_mask=mask).logits
    same_path = [n for n in names if not n.endswith(EXPLICIT_ATTENTION + EXPLICIT_NORM)]
    exactly(model.run_with_cache(IDS, same_path, attention_mask=mask)[0], plain)

    attention, norms = (
        [n for n in names if n.endswith(e)] for e in (EXPLICIT_ATTENTION, EXPLICIT_NORM)
    )
    explicit = model(IDS, attention_mask=mask, output_attentions=True).logits
    for chosen in (attention, attention[::2], attention[1::2], attention + same_path):
        exactly(model.run_with_cache(IDS, chosen, attention_mask=mask)[0], explicit)
    by_hand = model.run_with_cache(IDS, norms[::2], attention_mask=mask)[0]
    for chosen in (norms, norms[1::2], norms + same_path):
        exactly(model.run_with_cache(IDS, chosen, attention_mask=mask)[0], by_hand)
    both = model.run_with_cache(IDS, norms + attention, attention_mask=mask)[0]
    exactly(model.run_with_cache(IDS, attention_mask=mask)[0], both)
    exactly(model.run_with_cache(IDS, names, attention_mask=mask)[0], both)
    exactly(model(IDS, attention_mask=mask).logits, plain)
    if dtype in RELATIVE:
        real = slice(None) if mask is None else mask.bool()
        for other in (explicit, by_hand, both):
            assert_near(other[real], plain[real])


@torch.no_grad()
def test_recorded_values_do_not_depend_on_what_else_is_recorded():
    model = build()
    _, everything = model.run_with_cache(IDS, list(model.hook_dict))
    for name in model.hook_dict:
        alone = model.run_with_cache(IDS, name)[1][name]
        finite = everything[name].isfinite()
        assert_near(alone[finite], everything[name][finite])


# --- editing ---------------------------------------------------------------------------------------------------------


def uneven(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    """Change every entry by its own amount: a LayerNorm undoes a common factor, a softmax a common shift."""
    noise = torch.rand(value.shape, generator=torch.manual_seed(0)).to(value)
    return value * (1 + 0.3 * noise) + 0.3 * noise


def uneven_in_place(value: torch.Tensor, hook: HookPoint) -> None:
    value.copy_(uneven(value, hook))


@torch.no_grad()
def test_editing_any_hook_changes_the_logits(variant):
    model = random_model(tiny_config(**variant))
    clean = model(IDS).logits
    for name in hook_names(model.config):
        edited = model.run_with_hooks(IDS, fwd_hooks=[(name, uneven)])
        assert (edited - clean).abs().max() > 1e-3, name
        exactly(model.run_with_hooks(IDS, fwd_hooks=[(name, uneven_in_place)]), edited)
    exactly(model(IDS).logits, clean)


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m", "no_final_ln"])
@torch.no_grad()
def test_an_edit_in_place_reaches_nothing_else(variant):
    """Neither what was recorded before, nor the same tensor under another name."""
    model = build(variant, activation_function="linear")  # then pre and post are one tensor too
    names = list(model.hook_dict)
    _, clean = model.run_with_cache(IDS, names)
    order = list(clean)
    for place, name in enumerate(order):

        def spoil(value: torch.Tensor, hook: HookPoint) -> None:
            value[:, 0] = 1.7

        with model.hooks(fwd_hooks=[(name, spoil)]):
            _, cache = model.run_with_cache(IDS, names)
        for before in order[:place]:
            exactly(cache[before], clean[before])
        assert (cache[name][:, 0] == 1.7).all(), name
        exactly(cache[name][:, 1:], clean[name][:, 1:])


@torch.no_grad()
def test_every_cached_value_has_its_own_memory():
    model = build(activation_function="linear")
    _, cache = model.run_with_cache(IDS, list(model.hook_dict))
    for variant in ("pre_ln", "post_ln_350m"):
        model = build(variant, activation_function="linear")
        _, cache = model.run_with_cache(IDS, list(model.hook_dict))
        memory = {value.untyped_storage().data_ptr() for value in cache.values()}
        assert len(memory) == len(cache) == len(model.hook_dict)
        for value in cache.values():
            value.zero_()


@torch.no_grad()
def test_what_a_hook_function_holds_on_to_is_not_what_was_recorded():
    model = build()
    held: list[torch.Tensor] = []

    def keep_returned(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        held.append(2 * value)
        return held[-1]

    def keep_argument(value: torch.Tensor, hook: HookPoint) -> None:
        held.append(value)

    for function in (keep_returned, keep_argument):
        held.clear()
        with model.hooks(fwd_hooks=[(Z, function)]):
            _, cache = model.run_with_cache(IDS)
        kept = cache[Z].clone()
        held[0].zero_()
        exactly(cache[Z], kept)


@torch.no_grad()
def test_a_patched_in_tensor_is_left_alone():
    """A value from another run's cache goes through later edits as a copy."""
    model = build()
    _, source = model.run_with_cache(IDS.flip(0))
    before = source[RESID].clone()
    hooks = [(RESID, lambda value, hook: source[RESID]), (RESID, zero_in_place)]
    edited = model.run_with_hooks(IDS, fwd_hooks=hooks)
    exactly(source[RESID], before)
    exactly(edited, model.run_with_hooks(IDS, fwd_hooks=[(RESID, zero_in_place)]))


@torch.no_grad()
def test_hook_functions_run_in_the_order_in_which_they_were_added():
    model = build()
    add = lambda value, hook, number: value + number  # noqa: E731
    seen: list[torch.Tensor] = []
    hooks = [
        (Z, partial(add, number=1.0)),
        (Z, double),
        (Z, lambda value, hook: seen.append(value.clone())),
    ]
    _, clean = model.run_with_cache(IDS, Z)
    model.run_with_hooks(IDS, fwd_hooks=hooks)
    exactly(seen[0], 2 * (clean[Z] + 1.0))


@torch.no_grad()
def test_recorders_see_the_value_after_all_edits():
    model = build()
    with model.hooks(fwd_hooks=[(Z, double)]):
        _, cache = model.run_with_cache(IDS, Z)
        with model.hooks(fwd_hooks=[(Z, zero_in_place)]):
            _, zeroed = model.run_with_cache(IDS, Z)
    _, clean = model.run_with_cache(IDS, Z)
    exactly(cache[Z], 2 * clean[Z])
    assert (zeroed[Z] == 0).all()


@torch.no_grad()
def test_a_hook_function_gets_its_hook_by_name():
    model = build()
    seen: dict[str, Any] = {}

    def note(value: torch.Tensor, *, hook: HookPoint) -> None:
        hook.ctx["sum"] = hook.ctx.get("sum", 0) + 1
        seen[hook.name] = hook.layer() if hook.name.startswith("blocks") else None

    model.run_with_hooks(IDS, fwd_hooks=[([Z, "hook_embed"], note)])
    model.run_with_hooks(IDS, fwd_hooks=[(Z, note)])
    assert seen == {Z: 1, "hook_embed": None}
    assert model.hook_dict[Z].ctx == {"sum": 2}
    model.reset_hooks(clear_contexts=False)
    assert model.hook_dict[Z].ctx == {"sum": 2}
    model.reset_hooks()
    assert model.hook_dict[Z].ctx == {}
    with pytest.raises(ValueError, match="'hook_embed' belongs to no block"):
        model.hook_dict["hook_embed"].layer()


@torch.no_grad()
def test_a_name_given_twice_is_edited_once():
    model = build()
    once = model.run_with_hooks(IDS, fwd_hooks=[(Z, double)])
    exactly(model.run_with_hooks(IDS, fwd_hooks=[([Z, Z], double)]), once)


@torch.no_grad()
def test_removing_itself_while_running_is_allowed():
    model = build()
    clean = model(IDS).logits
    handle = model.add_hook(Z, lambda value, hook: handle.remove() or 2 * value)
    assert not model(IDS).logits.equal(clean)
    exactly(model(IDS).logits, clean)


def test_edits_pass_gradients_on():
    model = build()
    vector = torch.zeros(32, requires_grad=True)
    with model.hooks(fwd_hooks=[(RESID, lambda value, hook: value + vector)]):
        model.loss(IDS).backward()
    assert vector.grad.abs().min() > 0


# --- coming and going ------------------------------------------------------------------------------------------------


def test_contexts_nest_and_remove_only_their_own():
    model = build()
    clean = model(IDS).logits
    stays = model.add_hook("hook_embed", double)
    outermost = listeners(model)
    doubled = model(IDS).logits
    with model.hooks(fwd_hooks=[(Z, double), ("hook_embed", zero_in_place)]):
        outer = listeners(model)
        with model.hooks(fwd_hooks=[(Z, double)], bwd_hooks=[(RESID, double)]):
            assert len(model.hook_dict[Z].editors) == 2
            model.run_with_cache(IDS)
            model.run_with_hooks(IDS, fwd_hooks=[(Z, zero_in_place)])
        assert listeners(model) == outer
        assert not model(IDS).logits.equal(doubled)
    assert listeners(model) == outermost
    exactly(model(IDS).logits, doubled)
    stays.remove()
    stays.remove()
    assert listeners(model) == {}
    exactly(model(IDS).logits, clean)


@torch.no_grad()
def test_contexts_that_end_out_of_order_remove_only_their_own():
    model = build()
    first, second = (model.hooks(fwd_hooks=[(Z, double)]) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(model.hook_dict[Z].editors) == 1
    second.__exit__(None, None, None)
    assert listeners(model) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_no_listener_survives_an_exception(error):
    model = build()
    model.add_hook("hook_embed", double)
    before = listeners(model)

    def fail(value: torch.Tensor, hook: HookPoint) -> None:
        raise error("stop")

    runs = [
        lambda: model.run_with_hooks(IDS, fwd_hooks=[(Z, fail)], bwd_hooks=[(RESID, double)]),
        lambda: model.run_with_hooks(IDS, bwd_hooks=[(RESID, fail)]).sum().backward(),
        lambda: in_context(lambda: model.run_with_cache(IDS)),
        lambda: in_context(lambda: model.run_with_cache(IDS, return_type="loss", incl_bwd=True)),
        lambda: in_context(fail_by_hand),
    ]

    def in_context(run: Callable[[], Any]) -> None:
        with model.hooks(fwd_hooks=[(Z, fail)]):
            run()

    def fail_by_hand() -> None:
        raise error("stop")

    for run in runs:
        with pytest.raises(error, match="stop"):
            run()
        assert listeners(model) == before


@torch.no_grad()
def test_a_misspelt_name_attaches_nothing():
    model = build()
    for hooks in ([(Z, double), ("blocks.1.attn.hook_x", double)], [(Z, double), ([], double)]):
        with pytest.raises(UnknownHookError):
            model.run_with_hooks(IDS, fwd_hooks=hooks)
        assert listeners(model) == {}
    with pytest.raises(UnknownHookError):
        model.add_hook([Z, "nonsense"], double)
    assert listeners(model) == {}


@torch.no_grad()
def test_handles_and_reset():
    model = build()
    clean = model(IDS).logits
    group = model.add_hook(lambda name: name.endswith("hook_z"), zero_in_place)
    other = model.add_hook(Z, double)
    assert set(listeners(model)) == {"blocks.0.attn.hook_z", Z}
    group.remove()
    assert set(listeners(model)) == {Z}
    exactly(model(IDS).logits, model.run_with_hooks(IDS))
    model.reset_hooks()
    other.remove()
    assert listeners(model) == {}
    exactly(model(IDS).logits, clean)
    model.hook_dict[Z].add_hook(double)  # a point by itself
    assert not model(IDS).logits.equal(clean)
    model.hook_dict[Z].remove_hooks()
    exactly(model(IDS).logits, clean)
    with pytest.raises(ValueError, match="dir must be 'fwd' or 'bwd', got 'forward'"):
        model.add_hook(Z, double, dir="forward")


@torch.no_grad()
def test_paused_hooks_are_deaf_and_wake_up():
    model = build()
    clean = model(IDS).logits
    with model.hooks(fwd_hooks=[("ln_final.hook_scale", double)]):
        edited = model(IDS).logits
        with model.paused_hooks():
            exactly(model(IDS).logits, clean)
        with pytest.raises(RuntimeError, match="stop"), model.paused_hooks():
            raise RuntimeError("stop")
        exactly(model(IDS).logits, edited)


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own():
    model = build()
    model.add_hook(Z, double)
    twin = copy.deepcopy(model)
    model.reset_hooks()
    assert set(listeners(twin)) == {Z} and listeners(model) == {}
    twin.reset_hooks()
    with twin.hooks(fwd_hooks=[(Z, zero_in_place)]):
        assert listeners(model) == {}
        assert not twin(IDS).logits.equal(model(IDS).logits)
    exactly(twin(IDS).logits, model(IDS).logits)


def test_hooks_are_no_part_of_the_weights():
    model = build()
    model.add_hook(Z, double)
    assert not [name for name in model.state_dict() if "hook" in name]
    assert not any(module.training for module in model.modules())
    assert list(model.hook_dict) == hook_names(model.config)
    assert all(name == point.name for name, point in model.hook_dict.items())
    assert "blocks.1.attn.hook_z" in repr(model)


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result, message",
    [
        (
            lambda v: v[:, :3],
            r"returned a tensor of shape \(2, 3, 4, 8\); expected shape \(2, 7, 4, 8\)",
        ),
        (lambda v: v.sum(), r"shape \(\); expected shape \(2, 7, 4, 8\)"),
        (lambda v: v.double(), r"dtype torch.float64; expected dtype torch.float32"),
        (lambda v: v.to("meta"), r"device meta; expected device cpu"),
        (lambda v: v.detach().numpy(), r"returned a ndarray; it must return a tensor, or None"),
        (lambda v: (v, v), r"returned a tuple"),
        (lambda v: 0.0, r"returned a float"),
    ],
    ids=["shape", "scalar", "dtype", "device", "numpy", "tuple", "number"],
)
def test_a_wrong_result_raises_naming_the_hook(result, message):
    model = build()
    hooks = [(Z, lambda value, hook: result(value))]
    with pytest.raises(HookError, match=f"'{Z}' .*{message}"):
        model.run_with_hooks(IDS, fwd_hooks=hooks)
    assert listeners(model) == {}
    with pytest.raises(HookError, match=f"'{Z}' .*{message}"):
        model.run_with_hooks(IDS, bwd_hooks=hooks, return_type="loss").backward()


@torch.no_grad()
def test_a_wrong_result_in_place_is_seen_too():
    model = build()

    def grow(value: torch.Tensor, hook: HookPoint) -> None:
        value.resize_(2, 7, 4, 9)

    with pytest.raises(HookError, match=rf"'{Z}' .*shape \(2, 7, 4, 9\)"):
        model.run_with_hooks(IDS, fwd_hooks=[(Z, grow)])


@pytest.mark.parametrize(
    "name, near",
    [
        ("blocks.1.attn.hook_patern", "blocks.1.attn.hook_pattern"),
        ("blocks.0.hook_resid_pst", "blocks.0.hook_resid_post"),
        ("blocks.1.hook_pattern", "blocks.1.attn.hook_pattern"),
        ("blocks.7.attn.hook_z", "blocks.1.attn.hook_z"),
        ("embed", "hook_embed"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, near):
    model = build()
    for run in (model.run_with_cache, lambda ids, n: model.run_with_hooks(ids, [(n, double)])):
        with pytest.raises(
            UnknownHookError, match=f"no hook named '{name}'. Did you mean .*'{near}'"
        ):
            run(IDS, name)
    with pytest.raises(UnknownHookError, match="`model.hook_dict` lists them"):
        model.add_hook("xyz", double)


def test_a_name_that_this_variant_lacks_is_unknown():
    model = build("no_final_ln")
    with pytest.raises(UnknownHookError, match="no hook named 'ln_final.hook_scale'"):
        model.run_with_cache(IDS, "ln_final.hook_scale")


def test_a_filter_that_matches_nothing_raises():
    model = build()
    for run in (model.run_with_cache, lambda ids, f: model.run_with_hooks(ids, [(f, double)])):
        with pytest.raises(
            UnknownHookError, match=f"accepts none of the {len(model.hook_dict)} hook"
        ):
            run(IDS, lambda name: name.startswith("block."))
        with pytest.raises(UnknownHookError, match="list of hook names is empty"):
            run(IDS, [])


def test_a_name_behind_the_stop_is_refused():
    model = build()
    with pytest.raises(
        UnknownHookError, match=rf"Nothing was computed at '{Z}' with stop_at_layer=1"
    ):
        model.run_with_cache(IDS, ["hook_embed", Z], stop_at_layer=1)
    with pytest.raises(UnknownHookError, match="Nothing was computed at 'hook_embed'"):
        model.run_with_cache(torch.zeros(1, 3, 32), "hook_embed", start_at_layer=1)
    _, cache = model.run_with_cache(IDS, stop_at_layer=1)
    assert list(cache)[-1] == "blocks.0.hook_resid_post"


# --- gradients -------------------------------------------------------------------------------------------------------


def gradient_by_autograd(model: OPTForCausalLM, name: str) -> torch.Tensor:
    """Differentiate the loss by the value that a forward hook function handed on."""
    held: list[torch.Tensor] = []
    with model.hooks(fwd_hooks=[(name, lambda value, hook: held.append(value))]):
        return torch.autograd.grad(model.loss(IDS), held[0])[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_autograds(variant):
    """Through a backward hook, and in the cache under the name plus "_grad"."""
    model = build(variant, torch.float64)
    for name in model.hook_dict:
        expected = gradient_by_autograd(model, name)
        seen: list[torch.Tensor] = []
        hooks = [(name, lambda gradient, hook: seen.append(gradient))]  # noqa: B023
        loss = model.run_with_hooks(IDS, bwd_hooks=hooks, return_type="loss")
        assert listeners(model) == {}  # and yet it acts in the backward pass
        loss.backward()
        assert len(seen) == 1, name
        assert_near(seen[0], expected)
        _, cache = model.run_with_cache(IDS, name, return_type="loss", incl_bwd=True)
        assert list(cache) == [name, f"{name}_grad"]
        assert_near(cache[f"{name}_grad"], expected)
        model.zero_grad()


def test_incl_bwd_keeps_every_gradient_last_layer_first():
    model = build(dtype=torch.float64)
    loss, cache = model.run_with_cache(IDS, return_type="loss", incl_bwd=True)
    values = [name for name in cache if not name.endswith("_grad")]
    gradients = [name.removesuffix("_grad") for name in cache if name.endswith("_grad")]
    assert set(gradients) == set(values) == set(hook_names(model.config, optional=False))
    assert gradients.index("blocks.1.hook_resid_post") < gradients.index("blocks.0.hook_resid_post")
    for name, value in cache.items():
        assert not value.requires_grad, name
    assert_near(cache["resid_pre_grad", 1], gradient_by_autograd(model, RESID))
    assert model.decoder.embed_tokens.weight.grad is not None
    assert_near(loss, model.loss(IDS))


def test_gradients_with_padding_are_finite():
    """A query that sees no key divides nothing by nothing, in the gradient as well."""
    model = build(dtype=torch.float64)
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    options = {"return_type": "loss", "incl_bwd": True}
    names = list(model.hook_dict)
    _, cache = model.run_with_cache(IDS, names, attention_mask=left, **options)
    for name, value in cache.items():
        assert value.isfinite().all() or name.endswith("attn_scores"), name
    model.zero_grad()
    _, alone = model.run_with_cache(IDS[:1, 2:], names, **options)
    model.zero_grad()
    _, again = model.run_with_cache(IDS[:1], names, attention_mask=left[:1], **options)
    for name in (f"{Z}_grad", f"{RESID}_grad"):
        assert_near(again[name][:, 2:], alone[name])
        assert (again[name][:, :2] == 0).all()


def test_backward_hooks_change_the_gradient():
    """Returned, as a tuple of one, or in place; and only upstream."""
    model = build(dtype=torch.float64)
    model.loss(IDS).backward()
    weights = [model.decoder.layers[layer].fc1.weight for layer in (0, 1)]
    clean = [weight.grad.clone() for weight in weights]
    for edit in (double, lambda gradient, hook: (2 * gradient,)):
        model.zero_grad()
        with model.hooks(bwd_hooks=[(RESID, edit)]):
            model.loss(IDS).backward()
        assert_near(weights[0].grad, 2 * clean[0])
        assert_near(weights[1].grad, clean[1])
    model.zero_grad()

    def scale_in_place(gradient: torch.Tensor, hook: HookPoint) -> None:
        gradient.mul_(2)

    loss = model.run_with_hooks(IDS, bwd_hooks=[(RESID, scale_in_place)], return_type="loss")
    loss.backward()
    assert_near(weights[0].grad, 2 * clean[0])
    assert_near(weights[1].grad, clean[1])


def test_gradients_of_one_tensor_with_two_names_are_apart():
    """resid_post of a block is resid_pre of the next: an edit at one is not seen at the other before it."""
    model = build(dtype=torch.float64)
    expected = gradient_by_autograd(model, RESID)
    post = "blocks.0.hook_resid_post"
    with model.hooks(bwd_hooks=[(post, double)]):
        _, cache = model.run_with_cache(IDS, [post, RESID], return_type="loss", incl_bwd=True)
    assert_near(cache[f"{RESID}_grad"], expected)
    assert_near(cache[f"{post}_grad"], 2 * expected)  # recorders come after the edits


def test_the_gradient_is_that_of_the_edited_value():
    model = build(dtype=torch.float64)
    with model.hooks(fwd_hooks=[(Z, double)]):
        _, cache = model.run_with_cache(IDS, Z, return_type="loss", incl_bwd=True)
        expected = gradient_by_autograd(model, Z)
    assert_near(cache[f"{Z}_grad"], expected)
    assert_near(cache[Z], 2 * model.run_with_cache(IDS, Z)[1][Z])


def test_a_backward_hook_without_gradients_says_so():
    model = build()
    with torch.no_grad(), pytest.raises(HookError, match=f"'{Z}', but no gradient flows there"):
        model.run_with_hooks(IDS, bwd_hooks=[(Z, double)])
    assert listeners(model) == {}
    for wrong in ({"return_type": "logits"}, {"return_type": "loss", "stop_at_layer": 1}):
        with pytest.raises(InputError, match="incl_bwd=True differentiates the loss"):
            model.run_with_cache(IDS, incl_bwd=True, **wrong)


def test_gradients_follow_torchs_mode():
    model = build()
    assert model(IDS).logits.requires_grad
    assert model.run_with_hooks(IDS).requires_grad
    logits, cache = model.run_with_cache(IDS)
    assert logits.requires_grad and not cache[Z].requires_grad
    with torch.no_grad():
        assert not model(IDS).logits.requires_grad
    with torch.inference_mode():
        exactly(
            model.run_with_hooks(IDS, [(Z, zero_in_place)]),
            model.run_with_hooks(IDS, [(Z, zero_in_place)]),
        )


# --- running with a cache --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_names_filters_agree():
    model = build()
    names = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    for names_filter in (names, tuple(names), lambda name: name.endswith("mlp_out")):
        assert list(model.run_with_cache(IDS, names_filter)[1]) == names
    assert list(model.run_with_cache(IDS, names[1])[1]) == names[1:]
    everything = model.run_with_cache(IDS)[1]
    assert set(everything) == set(hook_names(model.config, optional=False))


@torch.no_grad()
def test_what_is_returned():
    model = build()
    loss = model.loss(IDS)
    for run in (model.run_with_hooks, lambda *a, **k: model.run_with_cache(*a, **k)[0]):
        exactly(run(IDS, return_type="logits"), run(IDS))
        assert_near(run(IDS, return_type="loss"), loss)
        logits, same = run(IDS, return_type="both")
        assert_near(same, loss)
        assert logits.shape == (2, 7, 101)
        exactly(run(IDS, return_type=None).logits, run(IDS))
        assert_near(run(IDS, logits_to_keep=1), run(IDS)[:, -1:])
        embeds = model.decoder.embed_tokens(IDS)
        exactly(run(None, inputs_embeds=embeds), run(IDS))
        assert run(IDS, stop_at_layer=1).shape == (2, 7, 32)


@torch.no_grad()
def test_the_base_model_runs_with_hooks_too():
    model = build(dtype=torch.float64)
    hidden = model.model(IDS).last_hidden_state
    exactly(model.model.run_with_hooks(IDS), hidden)
    last, cache = model.model.run_with_cache(IDS)
    assert_near(last, hidden)
    assert list(cache) == list(model.run_with_cache(IDS)[1])
    assert not model.model.run_with_hooks(IDS, fwd_hooks=[(Z, double)]).equal(hidden)


@torch.no_grad()
def test_remove_batch_dim_needs_a_batch_of_one():
    model = build()
    _, cache = model.run_with_cache(IDS[0], remove_batch_dim=True)
    assert cache["pattern", 0].shape == (4, 7, 7)
    assert cache["embed"].shape == (7, 32)
    assert not cache.has_batch_dim
    with pytest.raises(ValueError, match="needs a batch of one prompt"):
        model.run_with_cache(IDS, remove_batch_dim=True)


@torch.no_grad()
def test_where_values_are_kept():
    model = build()
    _, cache = model.run_with_cache(IDS, Z, device="meta")
    assert cache[Z].device.type == "meta"
    _, cache = model.run_with_cache(IDS, Z, device="cpu")
    exactly(cache[Z], model.run_with_cache(IDS, Z)[1][Z])


@torch.no_grad()
def test_keys_and_values_of_earlier_tokens():
    """Hooks see the new tokens; scores and pattern run over all keys."""
    model = build(dtype=torch.float64)
    _, whole = model.run_with_cache(IDS)
    past = model(IDS[:, :4], use_cache=True).past_key_values
    logits, cache = model.run_with_cache(IDS[:, 4:], past_key_values=past)
    assert cache["k", 1].shape == (2, 3, 4, 8)
    assert cache["pattern", 1].shape == (2, 4, 3, 7)
    assert_near(logits, model(IDS).logits[:, 4:])
    assert_near(cache["pattern", 1], whole["pattern", 1][:, :, 4:])
    assert_near(cache["resid_post", 1], whole["resid_post", 1][:, 4:])


@torch.no_grad()
def test_an_edited_key_stays_in_the_cache():
    model = build(dtype=torch.float64)

    def shift(value: torch.Tensor, hook: HookPoint) -> None:
        value[:, 1] += 1.0

    name = "blocks.0.attn.hook_k"
    whole = model.run_with_hooks(IDS, fwd_hooks=[(name, shift)])
    first = model.run_with_hooks(
        IDS[:, :4], fwd_hooks=[(name, shift)], return_type=None, use_cache=True
    )
    rest = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
    assert_near(rest, whole[:, 4:])


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking() -> OPTForCausalLM:
    model = random_model(OPTConfig(**tiny_opt.CONFIG), torch.float64)
    model.tokenizer = OPTTokenizer.from_tokenizers(tiny_opt.tokenizer())
    return model


@torch.no_grad()
def test_text_runs_as_its_tokens_do(speaking):
    text = tiny_opt.TEXT
    for bos in (True, False):
        tokens = speaking.to_tokens(text, prepend_bos=bos)
        logits = speaking(tokens).logits
        _, expected = speaking.run_with_cache(tokens)
        with_text, cache = speaking.run_with_cache(text, prepend_bos=bos)
        assert_near(with_text, logits)
        exactly(cache[Z], expected[Z])
        exactly(speaking.run_with_hooks(text, prepend_bos=bos), logits)
        assert_near(speaking.loss(text, prepend_bos=bos), speaking.loss(tokens))
    exactly(speaking(text).logits, speaking(speaking.to_tokens(text)).logits)


@torch.no_grad()
def test_texts_of_unequal_length_run_as_each_alone(speaking):
    texts = [tiny_opt.TEXT, " the cat", tiny_opt.CLEAN]
    logits, cache = speaking.run_with_cache(texts)
    together = speaking(texts).logits
    assert_near(together, speaking.run_with_hooks(texts))
    for row, text in enumerate(texts):
        alone, own = speaking.run_with_cache(text)
        length = alone.shape[1]
        assert_near(logits[row, -length:], alone[0])
        assert_near(together[row, -length:], alone[0])
        assert_near(cache["resid_post", 1][row, -length:], own["resid_post", 1][0])
        assert_near(cache["pattern", 1][row, :, -length:, -length:], own["pattern", 1][0])
    with pytest.raises(InputError, match="text makes its own"):
        speaking(texts, attention_mask=torch.ones(3, 5))
    with pytest.raises(InputError, match="text makes its own"):
        speaking.run_with_cache(texts, attention_mask=torch.ones(3, 5))


@torch.no_grad()
def test_text_that_continues_gets_no_second_beginning(speaking):
    whole = speaking(" the cat saw the dog").logits
    past = speaking(" the cat", use_cache=True).past_key_values
    assert_near(speaking(" saw the dog", past_key_values=past).logits, whole[:, 3:])
    past = speaking(" the cat", use_cache=True).past_key_values
    rest = speaking.run_with_hooks(" saw the dog", past_key_values=past)
    assert_near(rest, whole[:, 3:])


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match="no tokenizer"):
        build()("text")


def test_a_filter_function_gets_optional_points_only_if_it_accepts_nothing_else():
    model = random_model(tiny_config())
    everything = [name for name in model.hook_dict if not model.hook_dict[name].optional]
    assert [point.name for point in model.match_hooks(lambda name: True)] == everything
    attention = [point.name for point in model.match_hooks(lambda name: ".attn." in name)]
    assert "blocks.0.attn.hook_z" in attention
    assert "blocks.0.attn.hook_result" not in attention
    results = model.match_hooks(lambda name: name.endswith("hook_result"))
    assert [point.name for point in results] == [f"blocks.{i}.attn.hook_result" for i in (0, 1)]
