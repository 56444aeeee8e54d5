"""Hook functions: how they are called, come and go, and what they are told when misused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import random_model, tiny_config
from listening import IDS, RESID, Z, build, double, exactly, listeners, zero_in_place

from optlens.hooks import HookError, HookPoint
from optlens.names import UnknownHookError, hook_names


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


# --- coming and going ---------------------------------------------------------------------------------------------------


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
    assert not [name for name, _ in model.named_modules() if "hook" in name]
    assert "blocks.1.attn.hook_z" in repr(model.hook_dict[Z])


# --- misuse -------------------------------------------------------------------------------------------------------------


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


def test_a_filter_function_gets_optional_points_only_if_it_accepts_nothing_else():
    model = random_model(tiny_config())
    everything = [name for name in model.hook_dict if not model.hook_dict[name].optional]
    assert [point.name for point in model.match_hooks(lambda name: True)] == everything
    attention = [point.name for point in model.match_hooks(lambda name: ".attn." in name)]
    assert "blocks.0.attn.hook_z" in attention
    assert "blocks.0.attn.hook_result" not in attention
    results = model.match_hooks(lambda name: name.endswith("hook_result"))
    assert [point.name for point in results] == [f"blocks.{i}.attn.hook_result" for i in (0, 1)]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_that_would_never_fire_are_refused(register):
    point = build().hook_dict[Z]
    with pytest.raises(HookError, match=rf"never fire on the hook point '{Z}'; use add_hook\(fn\)"):
        getattr(point, register)(lambda *values: None)
