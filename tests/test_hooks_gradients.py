"""Gradients at named points: equal to autograd's, edited on their way, and kept beside the values."""

from __future__ import annotations

import pytest
import torch
from conftest import VARIANTS
from listening import IDS, RESID, Z, build, double, exactly, listeners, zero_in_place
from twins import assert_near

from optlens.checks import InputError
from optlens.hooks import HookError, HookPoint
from optlens.model import OPTForCausalLM
from optlens.names import hook_names


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


def test_edits_pass_gradients_on():
    model = build()
    vector = torch.zeros(32, requires_grad=True)
    with model.hooks(fwd_hooks=[(RESID, lambda value, hook: value + vector)]):
        model.loss(IDS).backward()
    assert vector.grad.abs().min() > 0
