"""The contribution graph: how much of each residual stream is which part, layer by layer.

In a pre-LN block two sums are made. `resid_mid` is `resid_pre`, what every head brings from every
token it reads, and attention's output bias; `resid_post` is `resid_mid` and the MLP's output. Each
term x of such a sum y is an edge into the node y. Its weight is how much of its length y loses
without x,

    max(0, ||y|| - ||y - x||),

divided by the sum of that over all terms, so that the weights into a node are in 0 to 1 and add up
to 1 (ALTI, Ferrando et al. 2022, arXiv 2203.04212; for the residual stream of decoders Ferrando &
Voita 2024, arXiv 2403.00824; both with the L1 norm). Edges below a threshold can then be left out,
and what still leads to a prediction is followed back from it.

Weights describe vectors, not their effect on the answer: a large term in a direction that nobody
reads weighs as much. `direct_logit_attribution` and patching ask about the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.circuits.graph_result import ContributionGraph, Edge
from optlens.circuits.values import output_matrices
from optlens.lens.source import batched, need_positions, need_whole, prompts_alone, recording_of
from optlens.logit_math import widened
from optlens.recording import Recording
from optlens.weights import effective_bias

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

__all__ = ["ContributionGraph", "Edge", "contribution_graph"]

WHAT = ("attention", "v", "resid_pre", "resid_mid", "mlp_out", "resid_post")
MEASURES = ("l1", "l2", "projection")
# Bytes of one chunk of sums without a term, [query, key, d_model], which L1 has to write out.
CHUNK_BYTES = 4_000_000


@torch.no_grad()
def contribution_graph(
    model: OPTForCausalLM | None, source: Recording | Prompt, measure: str = "l1"
) -> ContributionGraph:
    """Weigh what every part contributes to the residual stream at every layer and position.

    Args:
        model: The model, pre-LN; None is enough for a recording that has its model.
        source: A prompt or a list of prompts; or a recording of `what=("attention", "v",
            "resid_pre", "resid_mid", "mlp_out", "resid_post")` with all layers, heads and positions.
        measure: "l1" or "l2" as above, in that norm; "projection" takes `max(0, x . y)`, what x
            adds along y, instead. "l1" is the published one; the other two need no term written
            out and are much faster on long prompts. Where terms cancel so that a sum loses nothing
            without any one of them, the weights are the shares of the terms' L2 lengths.

    Returns:
        The weights; those into a node add up to 1.

    Raises:
        InputError: If the model is post-LN, or `measure` is unknown.
        NotRecordedError: If the recording lacks something, naming the `what` to add.

    Example:
        >>> import optlens
        >>> graph = contribution_graph(optlens.load(), "The cat sat on the")
        >>> graph.attention.shape, graph.mlp.shape
        (torch.Size([5, 8, 6, 6]), torch.Size([5, 6]))
        >>> edge = graph.routes(threshold=0.1)[0]  # from the last token down, strongest first
        >>> edge.target
        (10, 5)
    """
    if measure not in MEASURES:
        raise checks.InputError(f"measure={measure!r}: give one of {', '.join(MEASURES)}.")
    recording = recording_of(model, source, WHAT)
    _check_additive(recording)
    need_whole(recording, "The contribution graph")
    need_positions(recording, "The contribution graph")
    mask = batched(recording, "mask")
    layers = [_layer(recording, layer, measure, mask) for layer in recording.layers]
    weights = {name: torch.stack([layer[name] for layer in layers], 1).cpu() for name in layers[0]}
    tokens, mask = batched(recording, "tokens").cpu(), mask.cpu()
    if not recording.is_batch:
        weights = {name: value[0] for name, value in weights.items()}
        tokens, mask = tokens[0], mask[0]
    about = {
        "str_tokens": recording.str_tokens,
        "labels": recording.metadata["labels"],
        "model": recording.metadata["fingerprint"],
    }
    prompts = prompts_alone(recording)
    return ContributionGraph(
        **weights, mask=mask, tokens=tokens, measure=measure, metadata=about, prompts=prompts
    )


def _check_additive(recording: Recording) -> None:
    if not recording.metadata["config"]["do_layer_norm_before"]:
        raise checks.InputError(
            "The contribution graph weighs the terms that add up to each residual stream. This model "
            "normalises the stream after every sub-layer (post-LN), so it is no such sum. "
            "patch_sweep and knockout_sweep measure what leads where in this model too."
        )


def _layer(recording: Recording, layer: int, measure: str, mask: Tensor) -> dict[str, Tensor]:
    """Return the weights of one block; each `[batch, pos]`, attention `[batch, head, pos, key]`."""
    pre, mid, mlp, post = (
        widened(batched(recording, name, layer)) for name in WHAT[2:]
    )  # [batch, pos, d_model]
    pattern = widened(batched(recording, "attention", layer))
    values = widened(batched(recording, "v", layer))
    moved = [
        (values[:, :, place].to(matrix) @ matrix).to(mid)
        for place, matrix in enumerate(output_matrices(recording, layer))
    ]  # for each head [batch, key, d_model]
    attention = torch.stack(
        [_gain(measure, mid, moved[head], pattern[:, head]) for head in range(len(moved))], 1
    )
    bias = effective_bias(recording.model.decoder.layers[layer].self_attn.out_proj)
    bias = torch.zeros_like(mid) if bias is None else bias.to(mid).expand_as(mid)
    single = [_gain_of_one(measure, mid, part) for part in (pre, bias)]
    cancelled = sum(single) + attention.sum((1, 3)) == 0  # [batch, pos]
    if bool(cancelled.any()):
        length = torch.stack([each.norm(dim=-1) for each in moved], 1)  # [batch, head, key]
        at = cancelled[:, None, :, None]
        attention = torch.where(at, pattern * length.unsqueeze(2), attention)
        single = _lengths_where(cancelled, single, (pre, bias))
    total = sum(single) + attention.sum((1, 3))
    carried, from_bias = (_share(part, total, mask) for part in single)
    after = [_gain_of_one(measure, post, part) for part in (mid, mlp)]
    after = _lengths_where(sum(after) == 0, after, (mid, mlp))
    past_mlp, from_mlp = (_share(part, sum(after), mask) for part in after)
    total, real = total[:, None, :, None], mask[:, None, :, None]
    return {
        "attention": _share(attention, total, real),
        "residual": carried,
        "bias": from_bias,
        "mlp": from_mlp,
        "past_mlp": past_mlp,
    }


def _gain(measure: str, whole: Tensor, moved: Tensor, pattern: Tensor) -> Tensor:
    """Return how much a sum loses without what a head brings from each token, not below 0.

    Args:
        measure: As in `contribution_graph`.
        whole: The sums, `[batch, query, d_model]`.
        moved: What the head would bring with a weight of 1, `[batch, key, d_model]`.
        pattern: The weights, `[batch, query, key]`.

    Returns:
        `[batch, query, key]`.
    """
    if measure == "l1":
        return _gain_l1(whole, moved, pattern)
    along = pattern * (whole @ moved.transpose(1, 2))  # x . y
    square = pattern.square() * moved.square().sum(-1).unsqueeze(1)  # ||x||^2
    return _gain_of_products(measure, along, square, whole.square().sum(-1, keepdim=True))


def _gain_of_one(measure: str, whole: Tensor, part: Tensor) -> Tensor:
    """Return how much a sum loses without one term, `[batch, pos]`, both `[..., d_model]`."""
    if measure == "l1":
        return (whole.abs() - (whole - part).abs()).sum(-1).clamp_min(0)
    products = ((one * other).sum(-1) for one, other in ((part, whole), (part, part)))
    return _gain_of_products(measure, *products, whole.square().sum(-1))


def _gain_of_products(measure: str, along: Tensor, square: Tensor, whole: Tensor) -> Tensor:
    """Return the gain by L2 or projection from x . y, ||x||^2 and ||y||^2."""
    if measure == "projection":
        return along.clamp_min(0)  # the weights' division by their sum cancels ||y||^2
    without = (whole - 2 * along + square).clamp_min(0).sqrt()  # ||y - x||
    # ||y|| - ||y - x||, without the difference of two nearly equal roots
    ends = whole.sqrt() + without
    return torch.where(ends > 0, (2 * along - square) / ends, 0.0).clamp_min(0)


def _gain_l1(whole: Tensor, moved: Tensor, pattern: Tensor) -> Tensor:
    """Return the gain in the L1 norm, arguments as in `_gain`, a few queries at a time."""
    batch, n_queries, width = whole.shape
    size = max(1, CHUNK_BYTES // (n_queries * width * whole.element_size()))
    gain = torch.zeros_like(pattern)
    for prompt in range(batch):
        for start in range(0, n_queries, size):
            stop = min(start + size, n_queries)
            sums = whole[prompt, start:stop, None]  # [query, 1, d_model]
            weights = pattern[prompt, start:stop, :stop, None]  # later keys have none
            without = torch.addcmul(sums, weights, moved[prompt, :stop], value=-1)
            lengths = (torch.linalg.vector_norm(each, 1, dim=-1) for each in (sums, without))
            length, shorter = lengths  # [query, 1], [query, key]
            gain[prompt, start:stop, :stop] = (length - shorter).clamp_min(0)
    return gain


def _lengths_where(cancelled: Tensor, gains: list[Tensor], parts: tuple) -> list[Tensor]:
    """Replace the gains of terms by their lengths at the nodes where all terms cancel."""
    return [
        torch.where(cancelled, part.norm(dim=-1), gain)
        for gain, part in zip(gains, parts, strict=True)
    ]


def _share(part: Tensor, total: Tensor, real: Tensor) -> Tensor:
    """Divide by the sum of all terms; padding gets 0, as does a sum of nothing."""
    return torch.where(real.to(total.device) & (total > 0), part / total, 0.0)
