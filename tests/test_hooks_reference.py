"""Every hook of optlens against the NumPy reference: its value, what an edit there does, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, VARIANTS, random_model, tiny_config
from reference_opt import ACTIVATIONS as REFERENCE_ACTIVATIONS
from reference_opt import reference_forward

from optlens.activations import ACTIVATIONS
from optlens.model import OPTForCausalLM
from optlens.names import shape_of

PADDINGS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]],
    "both": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],
}
# Rounding relative to the largest value at a hook: two layers are some ten products of 32 to 64 terms. The
# bounds are the ones optlens promises: 1e-10 in float64, 1e-5 in float32.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}
IDS = torch.from_numpy(np.random.default_rng(5).integers(3, TINY["vocab_size"], size=(2, 7)))


def build(variant: str = "pre_ln", dtype: torch.dtype = torch.float64, **more: Any):
    return random_model(tiny_config(**{**VARIANTS[variant], **more}), dtype=dtype)


def mask_of(padding: str) -> torch.Tensor | None:
    return None if PADDINGS[padding] is None else torch.tensor(PADDINGS[padding])


def reference(model: OPTForCausalLM, input_ids: torch.Tensor | None = IDS, **kwargs: Any):
    weights = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    arrays = {k: v.numpy() if torch.is_tensor(v) else v for k, v in kwargs.items()}
    ids = None if input_ids is None else input_ids.numpy()
    return reference_forward(weights, model.config.to_dict(), ids, **arrays)


def close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float, name: str = "logits") -> None:
    """Equal up to a fraction of the largest finite value; infinities must stand at the same places."""
    theirs = torch.tensor(theirs)
    assert ours.shape == theirs.shape, name
    largest = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0
    torch.testing.assert_close(
        ours.detach().double(),
        theirs,
        rtol=0,
        atol=tolerance * largest,
        msg=lambda text: f"{name}: {text}",
    )


def at_real_positions(name: str, value: Any, mask: torch.Tensor | None) -> Any:
    """Drop rows of padding: nothing is promised of them, but that they are finite."""
    if mask is None:
        return value
    if name.endswith(("hook_attn_scores", "hook_pattern")):  # [b, h, q, k], one row for each query
        value = value.swapaxes(1, 2)
    return value[mask.bool() if torch.is_tensor(value) else mask.bool().numpy()]


def shake(value: Any) -> Any:
    """An edit that treats every entry differently, the same for arrays and tensors; -inf stays -inf."""
    noise = 0.1 * np.cos(np.arange(value.size if isinstance(value, np.ndarray) else value.numel()))
    noise = noise.reshape(value.shape)
    if isinstance(value, np.ndarray):
        return value * 1.3 + noise
    return value * 1.3 + torch.from_numpy(noise).to(value.dtype)


def shake_hook(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return shake(value)


def shake_in_place(value: torch.Tensor, hook: Any) -> None:
    value.copy_(shake(value))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hook_equals_the_reference(variant, padding, dtype):
    model, mask = build(variant, dtype), mask_of(padding)
    logits, cache = model.run_with_cache(
        IDS, names_filter=list(model.hook_dict), attention_mask=mask
    )
    expected_logits, expected = reference(model, attention_mask=mask)

    assert set(cache) == set(expected)
    real = mask if mask is None else mask.bool()
    kept = (logits, expected_logits) if mask is None else (logits[real], expected_logits[real])
    close(*kept, RELATIVE[dtype])
    for name, value in cache.items():
        assert value.dtype == dtype, name
        assert value.shape == shape_of(name, model.config, *IDS.shape), name
        if name == "hook_pos_embed":  # padding stands at position -1 whatever the side
            close(value, expected[name], RELATIVE[dtype], name)
        ours, theirs = (at_real_positions(name, v, mask) for v in (value, expected[name]))
        close(ours, theirs, RELATIVE[dtype], name)


@pytest.mark.parametrize("activation", ["relu", "linear"])  # "linear" hands on what it was given
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_recorded_value_has_its_own_memory(variant, activation):
    """Otherwise changing one entry of a cache in place would change another."""
    model = build(variant, **{"activation_function": activation})
    with torch.no_grad():
        _, cache = model.run_with_cache(IDS, names_filter=list(model.hook_dict))
    before = {name: value.clone() for name, value in cache.items()}
    for name, value in cache.items():
        value.fill_(7.0)
        before[name] = value.clone()
        for other in cache:
            assert torch.equal(cache[other], before[other]), f"{name} reaches {other}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_default_recording_keeps_the_order_of_computation(variant):
    model = build(variant)
    _, cache = model.run_with_cache(IDS)
    _, expected = reference(model)
    optional = ("_input", "hook_mlp_in", "hook_result")
    assert list(cache) == [name for name in expected if not name.endswith(optional)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_recording_everything_keeps_the_order_of_computation(variant):
    model = build(variant)
    _, cache = model.run_with_cache(IDS, names_filter=list(model.hook_dict))
    assert list(cache) == list(reference(model)[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_that_see_nothing_get_nothing(variant):
    model, mask = build(variant), mask_of("both")
    _, cache = model.run_with_cache(IDS, attention_mask=mask)
    for layer in range(TINY["num_hidden_layers"]):
        assert (cache["pattern", layer][0, :, :3] == 0).all()
        assert (cache["z", layer][0, :3] == 0).all()
    for name, value in cache.items():
        if not name.endswith("attn_scores"):
            assert value.isfinite().all(), name


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_equals_the_reference(name):
    model = build(activation_function=name)
    logits, cache = model.run_with_cache(IDS)
    expected_logits, expected = reference(model)
    close(logits, expected_logits, 1e-10)
    for layer in range(TINY["num_hidden_layers"]):
        full = f"blocks.{layer}.mlp.hook_post"
        close(cache[full], expected[full], 1e-10, full)
    # and where the clipped ones clip and the exponentials would overflow
    far = np.linspace(-40, 40, 1601)
    ours = ACTIVATIONS[name](torch.from_numpy(far))
    np.testing.assert_allclose(ours, REFERENCE_ACTIVATIONS[name](far), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m", "pre_ln_proj"])
def test_position_ids_and_inputs_embeds_reach_every_hook(variant):
    model = build(variant)
    positions = torch.tensor([[0, 5, 6, 7, 20, 21, 63], [9, 8, 7, 6, 5, 4, 3]])
    embeds = torch.randn(
        *IDS.shape,
        model.config.word_embed_proj_dim,
        dtype=torch.float64,
        generator=torch.manual_seed(0),
    )
    for given in ({"input_ids": IDS, "position_ids": positions}, {"inputs_embeds": embeds}):
        seen: dict[str, torch.Tensor] = {}

        def see(value: torch.Tensor, hook: Any, seen: dict = seen) -> None:
            seen[hook.name] = value.clone()

        with torch.no_grad(), model.hooks(fwd_hooks=[(list(model.hook_dict), see)]):
            logits = model(**given).logits
        expected_logits, expected = reference(model, **{"input_ids": None, **given})
        close(logits, expected_logits, 1e-10)
        for name, value in seen.items():
            close(value, expected[name], 1e-10, name)


# --- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "both"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_edit_at_every_hook_equals_the_references(variant, padding):
    model, mask = build(variant), mask_of(padding)
    real = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        clean = model(IDS, attention_mask=mask).logits[real]
        for name in model.hook_dict:
            expected, _ = reference(model, attention_mask=mask, edits={name: shake})
            for hook_function in (shake_hook, shake_in_place):
                logits = model.run_with_hooks(
                    IDS, fwd_hooks=[(name, hook_function)], attention_mask=mask
                )
                close(logits[real], expected[real], 1e-10, name)
            assert (logits[real] - clean).abs().max() > 1e-4 * clean.abs().max(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_edit_at_every_hook_in_float32(variant):
    model = build(variant, torch.float32)
    with torch.no_grad():
        for name in model.hook_dict:
            logits = model.run_with_hooks(IDS, fwd_hooks=[(name, shake_hook)])
            expected, _ = reference(model, edits={name: shake})
            # an edited scale or score multiplies the rounding before it by what it does to the logits
            close(logits, expected, 3e-5, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_edits_at_all_default_hooks_at_once(variant):
    """Also that recorders see the value after the edit, under its own name only."""
    model = build(variant)
    names = [name for name, point in model.hook_dict.items() if not point.optional]
    with torch.no_grad(), model.hooks(fwd_hooks=[(names, shake_in_place)]):
        logits, cache = model.run_with_cache(IDS)
    expected_logits, expected = reference(model, edits=dict.fromkeys(names, shake))
    # Forty-odd factors of 1.3 in a row: rounding grows with the values, so the bound is still relative.
    close(logits, expected_logits, 1e-10)
    for name, value in cache.items():
        close(value, expected[name], 1e-10, name)


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m"])
def test_recording_the_optional_hooks_changes_no_edit(variant):
    """Asking what a head would read must not take that head off the stream that somebody edits."""
    model = build(variant)
    optional = [name for name, point in model.hook_dict.items() if point.optional]
    for name in ("blocks.1.ln1.hook_scale", "blocks.1.ln1.hook_normalized", "blocks.1.attn.hook_z"):
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, shake_hook)]):
            alone = model(IDS).logits
            watched, _ = model.run_with_cache(IDS, names_filter=[*optional, name])
        torch.testing.assert_close(watched, alone, rtol=0, atol=0)


def test_scores_may_be_edited_to_look_ahead():
    """A finite score at a masked place is attended to: the softmax takes what the hook returns."""

    def look_ahead(scores: Any) -> Any:
        changed = scores.copy() if isinstance(scores, np.ndarray) else scores.clone()
        changed[:, :, 1, 6] = 3.0
        return changed

    model, name = build(), "blocks.1.attn.hook_attn_scores"
    with torch.no_grad():
        logits = model.run_with_hooks(IDS, fwd_hooks=[(name, lambda v, hook: look_ahead(v))])
    close(logits, reference(model, edits={name: look_ahead})[0], 1e-10)


# --- gradients -------------------------------------------------------------------------------------------------------


def next_token_loss(logits: np.ndarray) -> float:
    """Mean -log p of each next token."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs[:, :-1], IDS.numpy()[:, 1:, None], axis=-1).mean()


def slope(model: OPTForCausalLM, name: str, direction: np.ndarray) -> float:
    """How the reference's loss changes as the value at a hook moves along a direction."""

    def move(step: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda value: value + step * np.where(np.isfinite(value), direction, 0)

    step = 1e-5  # error of the central difference: step**2, plus rounding of 1e-16 / step
    ahead, back = (
        next_token_loss(reference(model, edits={name: move(s)})[0]) for s in (step, -step)
    )
    return (ahead - back) / (2 * step)


# Smooth activation: a ReLU's corner within the step would spoil the difference quotient.
@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m"])
def test_gradient_at_every_hook_equals_the_slope_of_the_reference(variant):
    model = build(variant, activation_function="gelu")
    generator = np.random.default_rng(7)
    for name in model.hook_dict:
        _, cache = model.run_with_cache(IDS, names_filter=[name], return_type="loss", incl_bwd=True)
        gradient = cache[f"{name}_grad"].numpy()
        assert gradient.shape == cache[name].shape, name
        direction = generator.normal(size=gradient.shape)
        along = (gradient * np.where(np.isfinite(cache[name].numpy()), direction, 0)).sum()
        np.testing.assert_allclose(
            along, slope(model, name, direction), rtol=1e-5, atol=1e-8, err_msg=name
        )
        model.zero_grad()


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m"])
def test_gradients_of_all_default_hooks_in_one_run(variant):
    model = build(variant, activation_function="gelu")
    _, together = model.run_with_cache(IDS, return_type="loss", incl_bwd=True)
    model.zero_grad()
    for name, point in model.hook_dict.items():
        if point.optional:
            continue
        _, alone = model.run_with_cache(IDS, names_filter=name, return_type="loss", incl_bwd=True)
        largest = alone[f"{name}_grad"].abs().max().item()
        torch.testing.assert_close(
            together[f"{name}_grad"], alone[f"{name}_grad"], rtol=0, atol=1e-10 * largest
        )
        model.zero_grad()
