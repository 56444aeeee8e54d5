"""Code of public notebooks for TransformerLens and CircuitsVis runs on an optlens model.

The cells follow TransformerLens's Main Demo call by call; only the line that loads the model differs from there. Their
results are compared with the NumPy reference and with the numbers stored from TransformerLens 2.18.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import circuitsvis
import einops
import numpy as np
import pytest
import torch
import transformer_lens.utilities as utils
from fixtures import tiny_opt
from stored_tl218 import STORED, build_model, equal, reference
from transformer_lens.hook_points import HookPoint

from optlens.model import OPTForCausalLM
from optlens.names import get_act_name


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """Notebooks allot their result tables in torch's default type, and float32 would round them."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    return build_model()


@pytest.fixture
def clean(model: OPTForCausalLM) -> torch.Tensor:
    return model.to_tokens(tiny_opt.CLEAN)


# --- what the Main Demo's cells do; only the line that loads the model differs there ----------------------------------


def test_head_ablation_cell(model):
    """Zero one head's values in place and compare the loss of a text."""
    layer_to_ablate, head_to_ablate = 0, 2
    tokens = model.to_tokens(tiny_opt.TEXT)
    shapes = []

    def ablate_head(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        shapes.append(tuple(value.shape))
        value[:, :, head_to_ablate, :] = 0.0
        return value

    original_loss = model(tokens, return_type="loss")
    ablated_loss = model.run_with_hooks(
        tokens,
        return_type="loss",
        fwd_hooks=[(utils.get_act_name("v", layer_to_ablate), ablate_head)],
    )
    assert shapes == [(1, tokens.shape[1], model.cfg.n_heads, model.cfg.d_head)]

    def ablate(value: np.ndarray) -> np.ndarray:
        value[:, :, head_to_ablate] = 0
        return value

    for loss, edits in ((original_loss, {}), (ablated_loss, {"blocks.0.attn.hook_v": ablate})):
        logits = torch.tensor(reference(tokens, edits=edits)[0])
        log_probs = logits[0, :-1].log_softmax(-1)
        equal(loss, -log_probs.gather(-1, tokens[0, 1:, None]).mean().item())
    equal(model(tokens, return_type="loss"), original_loss.item())  # the hook is gone


def test_residual_patching_cell(model):
    """Copy the clean residual stream into the corrupt run, one layer and position at a time."""
    clean_tokens = model.to_tokens(tiny_opt.CLEAN)
    corrupted_tokens = model.to_tokens(tiny_opt.CORRUPT)

    def logits_to_logit_diff(logits, correct=tiny_opt.ANSWERS[0], incorrect=tiny_opt.ANSWERS[1]):
        correct_index = model.to_single_token(correct)
        incorrect_index = model.to_single_token(incorrect)
        return logits[0, -1, correct_index] - logits[0, -1, incorrect_index]

    clean_logits, clean_cache = model.run_with_cache(clean_tokens)
    clean_diff = logits_to_logit_diff(clean_logits)
    corrupted_logits = model(
        corrupted_tokens
    )  # no return_type: what comes back is indexed all the same
    corrupted_diff = logits_to_logit_diff(corrupted_logits)

    def patch_residual(resid_pre: torch.Tensor, hook: HookPoint, position: int) -> torch.Tensor:
        clean_resid_pre = clean_cache[hook.name]
        resid_pre[:, position, :] = clean_resid_pre[:, position, :]
        return resid_pre

    n_positions = len(clean_tokens[0])
    result = torch.zeros((model.cfg.n_layers, n_positions), device=model.cfg.device)
    for layer in range(model.cfg.n_layers):
        for position in range(n_positions):
            patched_logits = model.run_with_hooks(
                corrupted_tokens,
                fwd_hooks=[
                    (
                        utils.get_act_name("resid_pre", layer),
                        partial(patch_residual, position=position),
                    )
                ],
            )
            patched_diff = logits_to_logit_diff(patched_logits).detach()
            result[layer, position] = (patched_diff - corrupted_diff) / (
                clean_diff - corrupted_diff
            )

    ends = [logits_to_logit_diff(STORED[f"{run}_logits"]) for run in ("corrupt", "clean")]
    equal(result, (STORED["patch/resid_pre"] - ends[0]) / (ends[1] - ends[0]))


def test_induction_cells(model):
    """Loss by position on repeated random tokens, then every head's attention one past the first occurrence."""
    batch_size, seq_len = 3, 12
    random_tokens = torch.randint(4, 290, (batch_size, seq_len), generator=torch.manual_seed(0))
    random_tokens = random_tokens.to(model.cfg.device)
    repeated_tokens = einops.repeat(random_tokens, "batch seq_len -> batch (2 seq_len)")

    repeated_logits = model(repeated_tokens)
    log_probs = model.loss_fn(repeated_logits, repeated_tokens, per_token=True)
    loss_by_position = einops.reduce(log_probs, "batch position -> position", "mean")

    score_store = torch.zeros((model.cfg.n_layers, model.cfg.n_heads), device=model.cfg.device)

    def score_hook(pattern: torch.Tensor, hook: HookPoint) -> None:
        stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - seq_len)
        score_store[hook.layer(), :] = einops.reduce(
            stripe, "batch head_index position -> head_index", "mean"
        )

    model.run_with_hooks(
        repeated_tokens,
        return_type=None,
        fwd_hooks=[(lambda name: name.endswith("pattern"), score_hook)],
    )

    logits, values = reference(repeated_tokens)
    expected = torch.tensor(logits)[:, :-1].log_softmax(-1)
    expected = -expected.gather(-1, repeated_tokens[:, 1:, None])[..., 0].mean(0)
    equal(loss_by_position, expected.numpy())
    queries = np.arange(seq_len - 1, 2 * seq_len)
    for layer in range(model.cfg.n_layers):
        attention = values[f"blocks.{layer}.attn.hook_pattern"]
        equal(score_store[layer], attention[:, :, queries, queries - seq_len + 1].mean((0, 2)))


def test_the_hook_argument_tells_name_layer_and_keeps_notes(model, clean):
    def note(value: torch.Tensor, hook: HookPoint) -> None:
        hook.ctx["norm"] = value.norm().item()

    name = utils.get_act_name("z", 1)
    model.run_with_hooks(clean, fwd_hooks=[(name, note)])
    point = model.hook_dict[name]
    assert (point.name, point.layer()) == ("blocks.1.attn.hook_z", 1)
    equal(point.ctx["norm"], np.linalg.norm(STORED[f"cache/{name}"]))
    model.reset_hooks()
    assert not point.ctx


# --- names and caches ------------------------------------------------------------------------------------------------

SHORT_NAMES = [
    ("embed",),
    ("pos_embed",),
    ("scale",),
    ("normalized",),
    ("k6",),
    ("pre5",),
    ("scale4ln1",),
    ("blocks.3.hook_resid_pre",),
    ("hook_embed",),
    ("resid_pre", 0),
    ("resid_mid", 1),
    ("attn_out", 2),
    ("mlp_out", 2),
    ("q", 3),
    ("k", 3, "a"),
    ("v", 3, "attn"),
    ("z", 11),
    ("result", 4),
    ("pattern", 3),
    ("pattern", 3, "attn"),
    ("attn", 3),
    ("attn_scores", 3),
    ("attn_logits", 3),
    ("key", 1),
    ("query", 1),
    ("value", 1),
    ("pre", 2),
    ("post", 2, "mlp"),
    ("mlp_pre", 2),
    ("mlp_post", 2, "m"),
    ("scale", 2, "ln1"),
    ("normalized", 27, "ln2"),
    ("q_input", 2),
    ("mlp_in", 2),
    ("resid_post", 3, "b"),
    ("resid_post", 3, "blocks"),
]


@pytest.mark.parametrize("key", SHORT_NAMES, ids=str)
def test_short_names_mean_the_same(key):
    assert get_act_name(*key) == utils.get_act_name(*key)


def test_the_cache_is_read_as_in_public_notebooks(model, clean):
    _, cache = model.run_with_cache(clean)
    for short, full in {
        "embed": "hook_embed",
        "pos_embed": "hook_pos_embed",
        "scale": "ln_final.hook_scale",
        ("k", 1): "blocks.1.attn.hook_k",
        ("pattern", 0, "attn"): "blocks.0.attn.hook_pattern",
        ("resid_pre", -1): "blocks.1.hook_resid_pre",
        ("scale", -2, "ln1"): "blocks.0.ln1.hook_scale",
        "ln_final.hook_normalized": "ln_final.hook_normalized",
    }.items():
        assert cache[short] is cache[full]
    assert list(cache.keys()) == list(cache) and len(cache.items()) == len(cache)
    _, single = model.run_with_cache(clean, remove_batch_dim=True)
    assert not single.has_batch_dim and cache.has_batch_dim
    equal(single["pattern", 1], STORED["cache/blocks.1.attn.hook_pattern"][0])


def test_layers_are_sliced_as_there(model, clean):
    _, cache = model.run_with_cache(clean)
    embedded = cache["embed"] + cache["pos_embed"]
    for stop, expected in {
        0: embedded,
        1: cache["resid_pre", 1],
        -1: cache["resid_pre", -1],
    }.items():
        equal(model(clean, stop_at_layer=stop), expected.detach().numpy())
    equal(model(clean, stop_at_layer=model.cfg.n_layers), cache["resid_post", -1].detach().numpy())
    for start in (1, -1):
        logits = model(cache["resid_pre", 1], start_at_layer=start, return_type="logits")
        equal(logits, STORED["clean_logits"])


# --- CircuitsVis -----------------------------------------------------------------------------------------------------


def test_circuitsvis_draws_our_attention(model):
    text = tiny_opt.TEXT
    _, cache = model.run_with_cache(text, remove_batch_dim=True)
    tokens = model.to_str_tokens(text)
    attention = cache["pattern", 0, "attn"]
    assert len(tokens) == attention.shape[-1]
    for draw in (
        circuitsvis.attention.attention_patterns,
        circuitsvis.attention.attention_heads,
    ):
        page = str(draw(tokens=tokens, attention=attention))
        assert '" dog"' in page and '"</s>"' in page

    _, batched = model.run_with_cache(text)
    page = circuitsvis.attention.attention_patterns(
        tokens=tokens, attention=batched["pattern", 0, "attn"][0]
    )
    assert "attention" in str(page)


def test_circuitsvis_draws_our_log_probs(model):
    text = tiny_opt.TEXT
    log_probs = model(text, return_type="logits").log_softmax(-1)
    page = circuitsvis.logits.token_log_probs(
        model.to_tokens(text)[0], log_probs[0].detach(), model.to_string
    )
    assert " dog" in str(page)
