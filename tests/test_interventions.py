"""Interventions do what the formula says, at every site: against the NumPy reference and hand-written hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOL, VARIANTS, random_model, tiny_config
from listening import listeners
from reference_opt import reference_forward

import optlens
from optlens import Ablate, Freeze, Knockout, Patch, Scale, Steer
from optlens.checks import InputError
from optlens.interventions import resolve
from optlens.interventions.address import EDGES, SITES
from optlens.names import get_act_name

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
PADDINGS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]],
    "both": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],
}
# pre-LN, post-LN with projections, and one whose attention output has no bias to hide behind
SHAPES = ["pre_ln", "post_ln_350m", "no_bias"]
CLOSE = TOL[torch.float64]
HEADS, NEURONS, POSITIONS = (2, 0), (5, -1), (1, -1)


def build(variant: str = "pre_ln", dtype: torch.dtype = torch.float64) -> Any:
    return random_model(tiny_config(**VARIANTS[variant]), dtype)


def mask_of(padding: str) -> torch.Tensor | None:
    return None if PADDINGS[padding] is None else torch.tensor(PADDINGS[padding])


def real_of(mask: torch.Tensor | None) -> torch.Tensor:
    return torch.ones(IDS.shape, dtype=torch.bool) if mask is None else mask.bool()


def run(model: Any, mask: torch.Tensor | None, *interventions: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad(), model.intervene(interventions, **options):
        logits = model(IDS, attention_mask=mask, use_cache=False).logits
    return logits[real_of(mask)]


def reference(model: Any, mask: torch.Tensor | None, edits: dict[str, Any]) -> torch.Tensor:
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    mask_array = None if mask is None else mask.numpy()
    logits, _ = reference_forward(
        weights, model.config.to_dict(), IDS.numpy(), attention_mask=mask_array, edits=edits
    )
    return torch.tensor(logits)[real_of(mask)]


def columns(mask: torch.Tensor | None, positions: tuple[int, ...]) -> list[list[int]]:
    """Where the given positions stand in each row, counted by hand."""
    rows = real_of(mask).tolist()
    return [[[c for c, is_real in enumerate(row) if is_real][p] for p in positions] for row in rows]


def part_of(site: str) -> dict[str, Any]:
    """An address that narrows every axis of a site but its layers."""
    part: dict[str, Any] = {}
    for axis in SITES[site]:
        if axis in ("pos", "query"):
            part[axis] = POSITIONS
        part |= {"head": {"head": HEADS}, "neuron": {"neuron": NEURONS}, "key": {"key": 0}}.get(
            axis, {}
        )
    return part


def edit_by_hand(site: str, mask: torch.Tensor | None, change: Any) -> Any:
    """A NumPy edit of what `part_of` addresses; `change(number or vector, row, slot)` replaces each."""
    wanted, firsts = columns(mask, POSITIONS), columns(mask, (0,))

    def edit(value: np.ndarray) -> np.ndarray:
        for row in range(value.shape[0]):
            for slot, column in enumerate(wanted[row]):
                if SITES[site] == EDGES:
                    for head in HEADS:
                        at = (row, head, column, firsts[row][0])
                        value[at] = change(value[at], row, slot)
                elif "head" in SITES[site]:
                    for head in HEADS:
                        value[row, column, head] = change(value[row, column, head], row, slot)
                elif "neuron" in SITES[site]:
                    for neuron in NEURONS:
                        value[row, column, neuron] = change(value[row, column, neuron], row, slot)
                else:
                    value[row, column] = change(value[row, column], row, slot)
        return value

    return edit


def hook_of(site: str, layer: int = 1) -> str:
    return get_act_name(site, None if site == "embed" else layer)


def layer_of(site: str) -> dict[str, int]:
    return {} if site == "embed" else {"layer": 1}


# ------------------------------------------------------------------------------- every site


@pytest.mark.parametrize("padding", ["none", "both"])
@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("site", SITES)
def test_scaling_any_part_of_any_site(site, variant, padding):
    model, mask = build(variant), mask_of(padding)
    ours = run(model, mask, Scale(site, **layer_of(site), **part_of(site), factor=-1.5))
    edit = edit_by_hand(site, mask, lambda old, row, slot: -1.5 * old)
    expected = reference(model, mask, {hook_of(site): edit})
    torch.testing.assert_close(ours, expected, **CLOSE)
    unedited = reference(model, mask, {})
    assert (
        ours - unedited
    ).abs().max() > 1e-3  # the edit matters, so the comparison says something


@pytest.mark.parametrize("padding", ["none", "both"])
@pytest.mark.parametrize("site", SITES)
def test_patching_writes_the_value_of_each_prompt_and_position(site, padding):
    model, mask = build("post_ln_350m"), mask_of(padding)
    numbers = torch.randn(2, 2, dtype=torch.float64, generator=torch.manual_seed(1))  # row, slot
    shape = (2, 2, 1, 1) if "head" in SITES[site] else (2, 2, 1)  # [batch, pos, ...]
    shape = (2, 1, 2) if SITES[site] == EDGES else shape  # [batch, head, query]: the key is one
    patch = Patch(site, **layer_of(site), **part_of(site), value=numbers.reshape(shape))
    edit = edit_by_hand(site, mask, lambda old, row, slot: 0 * old + numbers[row, slot].item())
    expected = reference(model, mask, {hook_of(site): edit})
    torch.testing.assert_close(run(model, mask, patch), expected, **CLOSE)


@pytest.mark.parametrize("site", SITES)
def test_writing_back_what_is_there_changes_nothing(site):
    """With every axis left open, for all layers at once."""
    model = build("pre_ln")
    hooks = [hook_of(site, layer) for layer in range(2)]
    clean, cache = model.run_with_cache(IDS, names_filter=hooks)
    values = torch.stack([cache[hook] for hook in dict.fromkeys(hooks)])
    values = values[0] if site == "embed" else values
    torch.testing.assert_close(run(model, None, Patch(site, value=values)), clean.flatten(0, 1))
    # each layer has got its own
    shifted = run(model, None, Patch(site, value=values.roll(1, dims=1 if site != "embed" else 0)))
    assert (shifted - clean.flatten(0, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("padding", ["none", "both"])
@pytest.mark.parametrize("site", SITES)
def test_zero_ablation_of_any_site(site, padding):
    model, mask = build("post_ln_350m"), mask_of(padding)
    ours = run(model, mask, Ablate(site, **layer_of(site), **part_of(site)))
    expected = reference(
        model, mask, {hook_of(site): edit_by_hand(site, mask, lambda old, row, slot: 0 * old)}
    )
    torch.testing.assert_close(ours, expected, **CLOSE)


# ---------------------------------------------------------------------------- the other kinds


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", SHAPES)
def test_steering_adds_from_the_start_position_on(variant, padding):
    model, mask = build(variant), mask_of(padding)
    vector = torch.randn(32, dtype=torch.float64, generator=torch.manual_seed(2))

    def edit(value: np.ndarray) -> np.ndarray:
        real = real_of(mask)
        position = (real.cumsum(-1) - 1).numpy()
        return value + 4.0 * vector.numpy() * ((position >= 2) & real.numpy())[..., None]

    ours = run(model, mask, Steer(layer=0, vector=vector, scale=4.0, start=2))
    expected = reference(model, mask, {"blocks.0.hook_resid_post": edit})
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_steering_some_heads_at_some_positions():
    model = build()
    vector = torch.randn(8, dtype=torch.float64, generator=torch.manual_seed(2))

    def edit(value: np.ndarray) -> np.ndarray:
        value[:, 3, 1] += -2 * vector.numpy()
        return value

    steer = Steer(layer=1, vector=vector, scale=-2, site="z", pos=3, head=1)
    expected = reference(model, None, {"blocks.1.attn.hook_z": edit})
    torch.testing.assert_close(run(model, None, steer), expected, **CLOSE)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", SHAPES)
def test_knockout_cuts_edges_before_the_softmax(variant, padding):
    model, mask = build(variant), mask_of(padding)
    real = real_of(mask)
    position = (real.cumsum(-1) - 1).masked_fill(~real, -9).numpy()
    last = real.sum(-1).numpy() - 1

    def edit(value: np.ndarray) -> np.ndarray:
        for row in range(2):
            for query in np.flatnonzero((position[row] == last[row]) | (position[row] == 2)):
                for key in np.flatnonzero((position[row] == 1) | (position[row] == 2)):
                    value[row, [0, 3], query, key] = -np.inf
        return value

    ours = run(model, mask, Knockout(range(2), query=[2, -1], key=slice(1, 3), heads=[0, 3]))
    expected = reference(
        model, mask, {f"blocks.{layer}.attn.hook_attn_scores": edit for layer in range(2)}
    )
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_a_query_without_any_key_left_attends_to_nothing():
    model = build()
    rec = model.record(IDS, what=("z", "pattern"), interventions=Knockout(query=3))
    assert rec["z"][:, :, 3].abs().max() == 0
    assert rec["pattern"][:, :, :, 3].abs().max() == 0
    assert rec["pattern"][:, :, :, 4].sum(-1).allclose(torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("site", ["attn_scores", "pattern"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_masked_pairs_stay_masked(site, padding):
    """Whatever is written there, no token looks ahead and none at padding."""
    model, mask = build(), mask_of(padding)
    real = real_of(mask)
    for each in (Patch(site, value=0.3), Ablate(site), Scale(site, factor=0)):
        rec = model.record(IDS, what="pattern", attention_mask=mask, interventions=each)
        looks = rec["pattern"].abs().amax((1, 2)) > 0  # [batch, query, key]
        assert not looks.triu(1).any()
        assert not (looks & ~real[:, None]).any()


def test_numbers_are_not_rounded_on_their_way():
    rec = build().record(IDS, what="z", interventions=Patch("z", value=0.1))
    assert rec["z"].eq(0.1).all()


def test_scaling_by_one_changes_nothing():
    model = build()
    ours = run(model, None, Scale("attn_scores", factor=1), Scale("result", factor=1))
    torch.testing.assert_close(ours, reference(model, None, {}), **CLOSE)


# ----------------------------------------------------------------------------------- the list


def test_the_order_of_the_list_is_the_order_of_application():
    model, mask = build(), None
    # a vector that LayerNorm does not remove, as it would a constant
    vector = torch.randn(32, dtype=torch.float64, generator=torch.manual_seed(2))
    add = Steer(layer=0, vector=vector, scale=3.0)
    double = Scale("resid_post", layer=0, factor=2)
    add_then_double = reference(
        model, mask, {"blocks.0.hook_resid_post": lambda x: 2 * (x + 3 * vector.numpy())}
    )
    double_then_add = reference(
        model, mask, {"blocks.0.hook_resid_post": lambda x: 2 * x + 3 * vector.numpy()}
    )
    torch.testing.assert_close(run(model, mask, add, double), add_then_double, **CLOSE)
    torch.testing.assert_close(run(model, mask, double, add), double_then_add, **CLOSE)
    with model.intervene(add):
        torch.testing.assert_close(run(model, mask, double), add_then_double, **CLOSE)


def test_scaling_leaves_a_cut_edge_cut():
    """Zero times minus infinity would be NaN."""
    stack = [Knockout(query=3, key=1), Scale("attn_scores", query=3, factor=0)]
    pattern = build().record(IDS, what="pattern", interventions=stack)["pattern"][:, :, :, 3]
    even = torch.tensor([1, 0, 1, 1, 0, 0, 0]).double() / 3
    torch.testing.assert_close(pattern, even.expand_as(pattern), **CLOSE)


def test_a_patch_after_a_knockout_puts_the_edge_back():
    model = build()
    clean, cache = model.run_with_cache(IDS, names_filter="blocks.0.attn.hook_attn_scores")
    cut = Knockout(0, query=-1, key=2)
    scores = cache["attn_scores", 0][:, :, -1, 2]
    back = Patch("attn_scores", layer=0, query=-1, key=2, value=scores)
    assert (run(model, None, cut) - clean.flatten(0, 1)).abs().max() > 1e-3
    torch.testing.assert_close(run(model, None, cut, back), clean.flatten(0, 1), **CLOSE)


def test_resolved_hooks_act_as_the_context_does():
    model, mask = build(), mask_of("both")
    stack = [
        Scale("z", layer=[0, 1], head=1, pos=-1, factor=2),
        Knockout(query=-1, key=0),
        Steer(layer=-1, vector=torch.ones(32), site="resid_mid", start=1),
    ]
    pairs = resolve(stack, model, IDS, mask)
    assert [name for name, _ in pairs] == [
        "blocks.0.attn.hook_z",
        "blocks.1.attn.hook_z",
        "blocks.0.attn.hook_attn_scores",
        "blocks.1.attn.hook_attn_scores",
        "blocks.1.hook_resid_mid",
    ]
    logits = model.run_with_hooks(IDS, fwd_hooks=pairs, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(logits[real_of(mask)], run(model, mask, *stack), rtol=0, atol=0)
    with pytest.raises(InputError, match=r"resolved for tokens \[batch, pos\] = \[2, 7\]"):
        model.run_with_hooks(IDS[:, :5], fwd_hooks=pairs)


def test_the_context_leaves_nothing_behind():
    model = build()
    clean = model(IDS).logits
    stack = [Scale("z", factor=0), Freeze("pattern", source=IDS), Knockout(query=-1, key=0)]

    def interrupted() -> None:
        with model.intervene(stack):
            assert listeners(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(InputError), model.intervene(Scale("z", pos=9, factor=0)):
        model(IDS)
    with pytest.raises(InputError), model.intervene([stack[0], Scale("z", layer=7, factor=0)]):
        pass
    assert listeners(model) == {}
    assert not model.decoder._forward_pre_hooks
    assert not model.decoder._forward_hooks
    torch.testing.assert_close(model(IDS).logits, clean, rtol=0, atol=0)


def test_gradients_flow_into_what_is_written():
    model = build()
    vector = torch.randn(32, dtype=torch.float64, generator=torch.manual_seed(3)).requires_grad_()

    def objective(each: Any) -> torch.Tensor:
        with model.intervene(each):
            return model(IDS).logits[:, -1, 7].sum()

    for make in (
        lambda v: Steer(layer=0, vector=v, scale=2.0),
        lambda v: Patch("resid_mid", layer=1, pos=[2, -1], value=v),
    ):
        (ours,) = torch.autograd.grad(objective(make(vector)), vector)
        step = 1e-6 * torch.randn(32, dtype=torch.float64, generator=torch.manual_seed(4))
        with torch.no_grad():
            up, down = objective(make(vector + step)), objective(make(vector - step))
        # central differences: an error of the order of the step squared
        torch.testing.assert_close(ours @ step, (up - down) / 2, rtol=1e-6, atol=1e-14)


def test_all_models_and_precisions_take_interventions():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = build(dtype=dtype)
        stack = [Steer(layer=0, vector=torch.ones(32)), Scale("z", factor=0.5), Patch("q", value=1)]
        with model.intervene([*stack, Ablate("mlp_out", mode="mean", reference=IDS)]):
            assert model(IDS).logits.dtype == dtype
    bare = optlens.OPTModel(tiny_config()).eval()
    clean = bare(IDS).last_hidden_state
    with bare.intervene(Scale("mlp_out", factor=0)):
        assert not bare(IDS).last_hidden_state.allclose(clean)


@pytest.mark.parametrize("failure", [ArithmeticError, KeyboardInterrupt])
def test_a_block_called_alone_is_refused(failure: type[BaseException]):
    model = build()

    def fail(value: torch.Tensor, hook: Any) -> None:
        raise failure

    with model.intervene(Scale("resid_post", factor=2)):
        model(IDS)
        # nor is anything known of a pass that failed
        with pytest.raises(failure):
            model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_attn_out", fail)])
        with pytest.raises(InputError, match="called alone"):
            model.hook_dict["blocks.0.hook_resid_post"](torch.ones(2, 7, 32))
