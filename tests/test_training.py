"""Training: gradients equal transformers', and what is random in training mode is random in the right way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VARIANTS, random_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from test_model import configs, passes
from torch import nn
from torch.nn import functional as F
from twins import assert_near, examples, twin_of

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}


def gradients(model: nn.Module, **call: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**call).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["no padding", "padding"])
def test_gradients_equal_transformers(variant, mask, explicit):
    """Also of the padding token's row, which has none, and with queries that see no key."""
    model = random_model(tiny_config(**variant, **STILL), torch.float64).train()
    ids = IDS.clone()
    ids[0, 3] = ids[1, 1] = model.config.pad_token_id  # a padding id may stand at a real position
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    call = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    ours = gradients(model, **call, output_attentions=explicit)
    theirs = gradients(twin_of(model), **call)
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in ours.items():
        # their float64 loss is rounded to float32, and so is its gradient
        torch.testing.assert_close(
            gradient,
            theirs[name],
            rtol=0,
            atol=1e-6 * largest,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    assert largest > 1e-3
    embedding = ours["model.decoder.embed_tokens.weight"]
    if not model.config.tie_word_embeddings:
        assert (embedding[model.config.pad_token_id] == 0).all()
        assert (embedding[ids[0, 4]] != 0).any()


@given(config=configs(), run=passes(), seed=st.integers(0, 10**6), explicit=st.booleans())
@examples(60)
def test_gradients_of_random_configurations_equal_transformers(config, run, seed, explicit):
    """Of a sum of logits, so that everything is float64."""
    vars(config).update(STILL)
    model = random_model(config, torch.float64, seed).train()
    twin = twin_of(model)
    weights = torch.randn(61, dtype=torch.float64, generator=torch.manual_seed(seed))
    call = {"input_ids": run.ids, "attention_mask": run.mask}
    for network, more in ((model, {"output_attentions": explicit}), (twin, {})):
        (network(**call, **more).logits[run.real] @ weights).sum().backward()
    theirs = {n: w.grad for n, w in twin.named_parameters() if w.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, weight in model.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        other = theirs.get(name, torch.zeros_like(weight))
        torch.testing.assert_close(
            gradient, other, rtol=0, atol=1e-10 * largest, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_parameter_gets_a_gradient(variant):
    model = random_model(tiny_config(**variant, **STILL), torch.float64).train()
    for name, gradient in gradients(model, input_ids=IDS, labels=IDS).items():
        assert gradient is not None and (gradient != 0).any(), name


def test_gradients_reach_the_embeddings_that_were_given():
    model = random_model(tiny_config())
    embeds = model.decoder.embed_tokens(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=IDS).loss.backward()
    assert (embeds.grad.abs().sum(-1) > 0)[:, :-1].all()
    assert (embeds.grad[:, -1] == 0).all()  # nothing is predicted from the last token


@pytest.mark.parametrize("name", ["pre_ln", "post_ln_350m"])
def test_training_reduces_the_loss(name):
    torch.manual_seed(0)
    model = random_model(tiny_config(**VARIANTS[name])).train()  # with dropout as it comes, 0.1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = model.eval().loss(IDS).item()
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    after = model.eval().loss(IDS).item()
    assert before > 3 and after < 0.3 * before


def test_evaluation_mode_is_still():
    model = random_model(tiny_config(dropout=0.5, attention_dropout=0.5, layerdrop=0.5))
    expected = random_model(tiny_config())(IDS).logits
    for _ in range(10):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)
    assert not model.train()(IDS).logits.equal(expected)


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_zeroes_what_each_sublayer_adds():
    """The fraction asked for, and the rest scaled up so that the mean stays."""
    torch.manual_seed(0)
    model = random_model(tiny_config(dropout=0.3), torch.float64).train()
    ids = torch.randint(3, 101, (64, 16))
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, lambda name: name.startswith("blocks.0"))
        layer = model.decoder.layers[0]
        full = {
            "attn_out": layer.self_attn.out_proj(cache["z", 0].flatten(2)),
            "mlp_out": layer.fc2(cache["post", 0]),
        }
    for name, before in full.items():
        after = cache[name, 0]
        dropped = after == 0
        # 32768 independent draws: a standard deviation of 0.0025, of which 5 are allowed
        assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.0125)
        torch.testing.assert_close(after[~dropped], before[~dropped] / 0.7)


def mean_of_runs(runs: int, model: nn.Module, ids: torch.Tensor, name: str, **options: Any) -> Any:
    """Mean of a hook's value over training-mode passes, and its standard error."""
    torch.manual_seed(0)
    values = []
    with torch.no_grad():
        for _ in range(runs):
            values.append(model.run_with_cache(ids, name, **options)[1][name])
    stacked = torch.stack(values)
    return stacked.mean(0), stacked.std(0) / runs**0.5


def test_dropout_keeps_the_mean_of_a_linear_network():
    """With neither LayerNorm nor ReLU in the way, the mean over runs is the value without dropout."""
    config = tiny_config(dropout=0.4, attention_dropout=0.4, activation_function="linear")
    model = random_model(config, torch.float64)
    ids, name = IDS.repeat(200, 1), "blocks.0.hook_resid_mid"
    with torch.no_grad():
        truth = model.run_with_cache(IDS, name)[1][name]
    mean, error = mean_of_runs(10, model.train(), ids, name)
    mean, error = mean.view(200, 2, 7, 32).mean(0), error.view(200, 2, 7, 32).norm(dim=0) / 200
    assert ((mean - truth).abs() < 6 * error + 1e-12).all()
    assert error.max() < 0.2


@pytest.mark.parametrize("path", ["fused", "explicit"])
def test_attention_dropout_zeroes_a_fraction_of_the_pattern(path):
    """Seen through values that are one-hot, so that z is the pattern as it was used."""
    torch.manual_seed(0)
    config = tiny_config(num_attention_heads=1, attention_dropout=0.25, max_position_embeddings=32)
    model = random_model(config, torch.float64)
    ids = torch.randint(3, 101, (40, 32))

    def one_hot(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.eye(32).to(value).expand(value.shape[0], -1, -1).unsqueeze(2)

    names = ["blocks.0.attn.hook_z"] + ["blocks.0.attn.hook_pattern"] * (path == "explicit")
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.attn.hook_v", one_hot)]):
        truth = model.run_with_cache(ids, names[0])[1][names[0]].squeeze(2)
        _, cache = model.train().run_with_cache(ids, names)
    used = cache["z", 0].squeeze(2)  # [batch, query, key]
    visible = torch.ones(32, 32).tril().bool().expand(40, -1, -1)
    dropped = used == 0
    assert dropped[~visible].all()
    # 21120 draws: a standard deviation of 0.003, of which 5 are allowed
    assert dropped[visible].double().mean().item() == pytest.approx(0.25, abs=0.015)
    kept = visible & ~dropped
    torch.testing.assert_close(used[kept], truth[kept] / 0.75)
    if path == "explicit":  # what is recorded is the softmax, before dropout
        torch.testing.assert_close(cache["pattern", 0].squeeze(1), truth)


def test_fused_and_explicit_attention_drop_alike_in_the_mean():
    model = random_model(tiny_config(attention_dropout=0.3, dropout=0.0), torch.float64)
    name, ids = "blocks.0.attn.hook_z", IDS.repeat(200, 1)
    with torch.no_grad():
        truth = model.run_with_cache(IDS, name)[1][name]
    model.train()
    for options in ({}, {"output_attentions": True}):
        mean, error = mean_of_runs(8, model, ids, name, **options)
        shape = (200, *truth.shape)
        mean, error = mean.view(shape).mean(0), error.view(shape).norm(dim=0) / 200
        # position 0 sees only itself, and there the error is estimated worst: 6 of them are allowed
        assert ((mean - truth).abs() < 6 * error + 1e-12).all()


# --- layerdrop -------------------------------------------------------------------------------------------------------


def is_stream(name: str) -> bool:
    return name.endswith(("hook_embed", "hook_resid_pre", "hook_resid_post"))


def test_layerdrop_skips_layers_at_its_rate():
    """And a layer skipped hands on what it was given."""
    torch.manual_seed(0)
    model = random_model(tiny_config(num_hidden_layers=3, layerdrop=0.3, dropout=0.0)).train()
    runs, ran = 400, torch.zeros(3)
    with torch.no_grad():
        for _ in range(runs):
            _, cache = model.run_with_cache(IDS[:1, :2], is_stream)
            here = [layer for layer in range(3) if f"blocks.{layer}.hook_resid_post" in cache]
            ran[here] += 1
            for before, after in zip(here, here[1:], strict=False):
                left, read = cache["resid_post", before], cache["resid_pre", after]
                torch.testing.assert_close(read, left, rtol=0, atol=0)
    # 400 draws: a standard deviation of 0.023, of which 5 are allowed
    torch.testing.assert_close(1 - ran / runs, torch.full((3,), 0.3), rtol=0, atol=0.115)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_layerdrop_at_its_ends(rate):
    model = random_model(tiny_config(**{**STILL, "layerdrop": rate})).train()
    evaluated = random_model(tiny_config())
    with torch.no_grad():
        logits = model(IDS).logits
        unchanged = evaluated(IDS).logits
        skipped = evaluated.unembed(evaluated(IDS, stop_at_layer=0))
    assert_near(logits, skipped if rate else unchanged)


def test_layerdrop_leaves_the_layers_their_numbers(monkeypatch):
    """The layer that fails is named by its place in the model, not among those that ran."""
    model = random_model(tiny_config(num_hidden_layers=6, layerdrop=0.5)).train()
    with torch.no_grad():
        model.decoder.layers[4].fc2.weight[3, 3] = torch.nan
    draws = iter([0.1, 0.9, 0.1, 0.1, 0.9, 0.9])  # runs 1, 4 and 5
    monkeypatch.setattr(torch, "rand", lambda shape: torch.tensor(next(draws)))
    with pytest.raises(FloatingPointError, match=r"infinite in block 4\."):
        model(IDS)


def test_randomness_follows_torchs_seed():
    model = random_model(tiny_config(dropout=0.2, attention_dropout=0.2, layerdrop=0.2)).train()
    torch.manual_seed(3)
    first = model(IDS).logits
    torch.manual_seed(3)
    torch.testing.assert_close(model(IDS).logits, first, rtol=0, atol=0)


def test_loss_of_labels_is_torchs_cross_entropy():
    model = random_model(tiny_config())
    logits = model(IDS).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, labels=IDS).loss, expected)
