"""OPT once more, in NumPy and float64: the oracle for every hook of `optlens`.

Written from what OPT computes, with no import from optlens and none from torch or transformers. It favours the formula
over speed: no fused product, no cache of keys and values, no batching trick. Read from `reference_forward` downwards.

Shapes: batch b, position p (queries q, keys k), head h, d_model d, head width e, vocabulary v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Edits = Mapping[str, Callable[[Array], Array]]


def reference_forward(
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    input_ids: Array | None = None,
    *,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    inputs_embeds: Array | None = None,
    edits: Edits | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Run OPT on a batch and keep every value that has a hook name, the optional ones included.

    Args:
        weights: The state dict of a causal OPT under its Hugging Face names, as arrays.
        config: The fields of `config.json`.
        input_ids: Token ids [batch, pos]; or else give `inputs_embeds`.
        attention_mask: 1 at real tokens, 0 at padding [batch, pos]; all real without it.
        position_ids: Positions counted from 0 [batch, pos]; derived from the mask without them.
        inputs_embeds: Rows of the token embedding [batch, pos, word_embed_proj_dim].
        edits: For some hook names a function of the value there whose result is used in its place.

    Returns:
        The logits [batch, pos, d_vocab] and the values by hook name in the order in which they arise, after edits.
    """
    w = {name.removeprefix("model."): np.asarray(a, np.float64) for name, a in weights.items()}
    tap = Taps(edits or {})
    if inputs_embeds is None:
        inputs_embeds = w["decoder.embed_tokens.weight"][input_ids]
    tokens = np.asarray(inputs_embeds, np.float64)
    batch, length = tokens.shape[:2]
    mask = np.ones((batch, length), int) if attention_mask is None else np.asarray(attention_mask)

    residual = embed(tokens, mask, position_ids, w, tap)
    # A query sees the keys at and before its own position that are not padding. [b, q, k]
    visible = np.tril(np.ones((length, length), bool))[None] & (mask[:, None, :] != 0)
    for layer in range(config["num_hidden_layers"]):
        residual = block(residual, visible, layer, config, w, tap)

    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm"):
        residual = layer_norm(residual, "decoder.final_layer_norm", w, tap, "ln_final")
    if "decoder.project_out.weight" in w:
        residual = linear(residual, "decoder.project_out", w)
    unembedding = w.get("lm_head.weight", w["decoder.embed_tokens.weight"])
    return residual @ unembedding.T, tap.values


class Taps:
    """Every named value passes through here: edited if someone asked, kept, and handed on."""

    def __init__(self, edits: Edits) -> None:
        self.edits = edits
        self.values: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        if name in self.edits:
            value = np.array(self.edits[name](value.copy()), np.float64)
        self.values[name] = value
        return value


def embed(
    tokens: Array, mask: Array, position_ids: Array | None, w: Mapping[str, Array], tap: Taps
) -> Array:
    """Add the token's vector, widened to d_model where it is narrower, and the position's."""
    if "decoder.project_in.weight" in w:
        tokens = linear(tokens, "decoder.project_in", w)
    if position_ids is None:
        # Real tokens count 0, 1, 2 ... wherever the padding stands; padding gets -1.
        position_ids = np.cumsum(mask, axis=1) * mask - 1
    # Rows 0 and 1 of the table belong to no position: 1 is for padding, 0 is never read.
    positions = w["decoder.embed_positions.weight"][np.asarray(position_ids) + 2]
    positions = np.broadcast_to(positions, tokens.shape)
    return tap("hook_embed", tokens) + tap("hook_pos_embed", positions)


def block(
    resid_pre: Array,
    visible: Array,
    layer: int,
    config: Mapping[str, Any],
    w: Mapping[str, Array],
    tap: Taps,
) -> Array:
    """One layer: attention, then the MLP, each added to the residual stream.

    Pre-LN normalises what a sub-layer reads and leaves the stream a plain sum. Post-LN (the 350m model) normalises
    the stream itself after each addition. OPT calls the second LayerNorm of a layer `final_layer_norm`.
    """
    here, there = f"blocks.{layer}", f"decoder.layers.{layer}"
    pre_ln = config.get("do_layer_norm_before", True)
    heads = config["num_attention_heads"]

    resid_pre = tap(f"{here}.hook_resid_pre", resid_pre)
    q, k, v = queries_keys_values(resid_pre, heads, pre_ln, layer, w, tap)
    attn_out = attention(q, k, v, visible, layer, w, tap)
    resid_mid = resid_pre + tap(f"{here}.hook_attn_out", attn_out)
    if not pre_ln:
        resid_mid = layer_norm(resid_mid, f"{there}.self_attn_layer_norm", w, tap, f"{here}.ln1")
    resid_mid = tap(f"{here}.hook_resid_mid", resid_mid)

    # The MLP reads a copy: an edit of it does not reach the sum below.
    mlp_in = tap(f"{here}.hook_mlp_in", resid_mid)
    if pre_ln:
        mlp_in = layer_norm(mlp_in, f"{there}.final_layer_norm", w, tap, f"{here}.ln2")
    neurons = tap(f"{here}.mlp.hook_pre", linear(mlp_in, f"{there}.fc1", w))
    activation = ACTIVATIONS[config.get("activation_function", "relu")]
    neurons = tap(f"{here}.mlp.hook_post", activation(neurons))
    mlp_out = tap(f"{here}.hook_mlp_out", linear(neurons, f"{there}.fc2", w))
    resid_post = resid_mid + mlp_out
    if not pre_ln:
        resid_post = layer_norm(resid_post, f"{there}.final_layer_norm", w, tap, f"{here}.ln2")
    return tap(f"{here}.hook_resid_post", resid_post)


def queries_keys_values(
    resid_pre: Array, heads: int, pre_ln: bool, layer: int, w: Mapping[str, Array], tap: Taps
) -> list[Array]:
    """Project the stream to queries, keys and values [b, p, h, e].

    All heads read the same normalised stream, in which `ln1` speaks. Where somebody edits `hook_q_input` (or k, v), each head
    has a stream of its own there [b, p, h, d]; that projection then reads those, each normalised by itself.
    """
    here, there = f"blocks.{layer}", f"decoder.layers.{layer}"
    norm = f"{there}.self_attn_layer_norm"
    per_head = np.repeat(resid_pre[:, :, None, :], heads, axis=2)
    inputs = {role: tap(f"{here}.hook_{role}_input", per_head) for role in "qkv"}
    shared = layer_norm(resid_pre, norm, w, tap, f"{here}.ln1") if pre_ln else resid_pre

    projected = []
    for role in "qkv":
        name = f"{there}.self_attn.{role}_proj"
        if f"{here}.hook_{role}_input" in tap.edits:
            own = layer_norm(inputs[role], norm, w) if pre_ln else inputs[role]
            # Head h owns rows h*e to (h+1)*e of the projection; all others of its result are dropped.
            every_head_of_every_stream = split_heads(linear(own, name, w), heads)  # [b, p, h, h, e]
            value = np.einsum("bphhe->bphe", every_head_of_every_stream)
        else:
            value = split_heads(linear(shared, name, w), heads)
        projected.append(tap(f"{here}.attn.hook_{role}", value))
    return projected


def attention(
    q: Array, k: Array, v: Array, visible: Array, layer: int, w: Mapping[str, Array], tap: Taps
) -> Array:
    """Let each position read from the positions it can see, head by head; the result is [b, p, d]."""
    here, out_proj = f"blocks.{layer}.attn", f"decoder.layers.{layer}.self_attn.out_proj"
    heads, width = q.shape[2:]
    q = q * width**-0.5  # the query's bias is scaled with it
    scores = np.einsum("bqhe,bkhe->bhqk", q, k)
    scores = tap(f"{here}.hook_attn_scores", np.where(visible[:, None], scores, -np.inf))
    pattern = tap(f"{here}.hook_pattern", softmax(scores))
    z = tap(f"{here}.hook_z", np.einsum("bhqk,bkhe->bqhe", pattern, v))
    w_o = w[f"{out_proj}.weight"].T.reshape(heads, width, -1)  # [h, e, d]
    result = tap(f"{here}.hook_result", np.einsum("bqhe,hed->bqhd", z, w_o))
    return result.sum(axis=2) + w.get(f"{out_proj}.bias", 0.0)


def softmax(scores: Array) -> Array:
    """Turn scores into weights that sum to 1 over keys; a query that sees nothing gets weights of 0."""
    highest = scores.max(axis=-1, keepdims=True)
    sees_something = np.isfinite(highest)
    powers = np.exp(scores - np.where(sees_something, highest, 0.0))
    total = powers.sum(axis=-1, keepdims=True)
    return powers / np.where(sees_something, total, 1.0)


def layer_norm(
    x: Array,
    name: str,
    w: Mapping[str, Array],
    tap: Taps | None = None,
    hooks: str = "",
) -> Array:
    """Subtract the mean, divide by the standard deviation, then apply gain and bias, if there are any."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    if tap is not None:
        scale = tap(f"{hooks}.hook_scale", scale)
    normalized = centred / scale
    if tap is not None:
        normalized = tap(f"{hooks}.hook_normalized", normalized)
    return normalized * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)


def linear(x: Array, name: str, w: Mapping[str, Array]) -> Array:
    """Multiply by a matrix stored [out, in], as checkpoints store it, and add the bias, if there is one."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def split_heads(x: Array, heads: int) -> Array:
    """Cut the last axis into heads: head h is the h-th contiguous slice."""
    return x.reshape(*x.shape[:-1], heads, -1)


def sigmoid(x: Array) -> Array:
    """Squash to 0..1, without overflow for very negative x."""
    return 0.5 * (1 + np.tanh(x / 2))


def softplus(x: Array) -> Array:
    """Return log(1 + exp(x)) without overflow, and x itself above 20, as torch does (2e-9 less)."""
    return np.where(x > 20, x, np.logaddexp(0.0, x))


erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Array) -> Array:
    """Weigh x by the normal distribution's probability below it."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    """Approximate `gelu` with a tanh."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Under the names that config.json uses.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_10": lambda x: np.clip(gelu(x), -10, 10),
    "gelu_new": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    # The constant is sqrt(2 / pi) cut after ten digits.
    "gelu_fast": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "mish": lambda x: x * np.tanh(softplus(x)),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "sigmoid": sigmoid,
    "sqrtsoftplus": lambda x: np.sqrt(softplus(x)),
    "tanh": np.tanh,
    "linear": lambda x: x,
}
