"""What attention carries: how much is moved along each edge, and why a query matches a key.

A weight says how much of a token's value a head takes, not how much that is: where the value is short,
a large weight moves little. Weighting by the length of what is moved shows the difference (Kobayashi
et al. 2020, "Attention is Not Only a Weight", arXiv 2004.10102).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.lens.source import batched, need_positions, recording_of
from optlens.logit_math import widened
from optlens.metric_targets import columns_at
from optlens.recording import Recording
from optlens.selection import select
from optlens.weights import effective_weight

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM


@torch.no_grad()
def value_weighted_attention(
    model: OPTForCausalLM | None,
    source: Recording | Prompt,
    by: str = "output",
    normalize: bool = False,
) -> Tensor:
    """Return the length of what each head moves from each key to each query.

    Args:
        model: The model; None is enough for a recording that has its model, or with `by="value"`.
        source: A recording of `what=("attention", "v")` at all positions, or a prompt.
        by: "output" is `pattern * ||v W_O||`, the length of what is added to the residual stream;
            "value" is `pattern * ||v||`, before the output matrix. Values include their bias, and
            neither has the output bias, which comes from no key.
        normalize: Whether to divide each row by its sum, so that it adds up to 1 as attention does.

    Returns:
        `[layer, head, query, key]` for the layers and heads that were recorded, float32 at least;
        with a batch axis in front for a batch of prompts. Rows without a key are 0.

    Raises:
        NotRecordedError: If the recording lacks something, naming the `what` to add.
        InputError: If `by` is unknown.

    Example:
        >>> import optlens
        >>> moved = value_weighted_attention(optlens.load(), "The cat sat", normalize=True)
        >>> moved.shape, bool((moved.sum(-1) - 1).abs().max() < 1e-5)
        (torch.Size([5, 8, 4, 4]), True)
    """
    if by not in ("output", "value"):
        raise checks.InputError(f"by={by!r}: give 'output' or 'value'.")
    recording = recording_of(model, source, ("attention", "v"))
    need_positions(recording, "value_weighted_attention")
    layers = []
    for layer in recording.layers:
        pattern = widened(batched(recording, "attention", layer))
        values = widened(batched(recording, "v", layer))  # [batch, key, head, d_head]
        if by == "value":
            length = values.norm(dim=-1)
        else:
            length = output_lengths(recording, layer, values)
        moved = pattern * length.transpose(1, 2).unsqueeze(2).to(pattern)
        if normalize:
            total = moved.sum(-1, keepdim=True)
            moved = torch.where(total > 0, moved / total, 0.0)
        layers.append(moved)
    result = torch.stack(layers, 1)
    return result if recording.is_batch else result[0]


def output_lengths(recording: Recording, layer: int, values: Tensor) -> Tensor:
    """Return the length of `v W_O` for each head, `[batch, key, head]`.

    Args:
        recording: For its model and heads.
        layer: The block's number.
        values: `[batch, key, head, d_head]`.
    """
    lengths = [
        (values[:, :, place].to(matrix) @ matrix).norm(dim=-1)
        for place, matrix in enumerate(output_matrices(recording, layer))
    ]
    return torch.stack(lengths, -1).to(values.device)


def output_matrices(recording: Recording, layer: int) -> list[Tensor]:
    """Return W_O of each recorded head of a block, `[d_head, d_model]`, in float32 at least."""
    attention = recording.model.decoder.layers[layer].self_attn
    weight = widened(effective_weight(attention.out_proj))
    heads = weight.unflatten(1, (attention.n_heads, attention.d_head))
    return [heads[:, head].T for head in recording.heads]


@dataclass(eq=False)
class ScoreDetail:
    """Why one query of a head matches its keys; in a batch with a leading axis everywhere.

    Attributes:
        query: The query, bias included, before scaling, `[d_head]`.
        keys: The keys, bias included, `[key, d_head]`.
        products: `query * keys / sqrt(d_head)`, what each dimension adds to a score,
            `[key, d_head]`. Also of keys that the query may not see.
        scores: Their sum, `[key]`: the score before the softmax; -inf where the query may not see.
        pattern: The softmax of the scores, `[key]`.
        layer: The block's number.
        head: The head's.
    """

    query: Tensor
    keys: Tensor
    products: Tensor
    scores: Tensor
    pattern: Tensor
    layer: int
    head: int


@torch.no_grad()
def score_detail(
    model: OPTForCausalLM | None,
    source: Recording | Prompt,
    layer: int,
    head: int,
    pos: int = -1,
) -> ScoreDetail:
    """Divide the attention scores of one query among the dimensions of query and key.

    Args:
        model: The model; None is enough for a recording.
        source: A recording of `what=("q", "k")` at all positions, or a prompt.
        layer: The block's number, from the end if negative.
        head: The head's, likewise.
        pos: The query's position, counted over each prompt's real tokens.

    Returns:
        Query, keys, products, scores and pattern. An intervention on scores or pattern themselves
        does not show.

    Raises:
        NotRecordedError: If the recording lacks something, naming the `what` to add.
        InputError: If there is no such layer, head or position.

    Example:
        >>> import optlens
        >>> detail = score_detail(optlens.load(), "The cat sat", layer=1, head=4)
        >>> detail.products.shape, detail.scores.shape
        (torch.Size([4, 32]), torch.Size([4]))
    """
    recording = recording_of(model, source, ("q", "k"), layers=layer, heads=head)
    need_positions(recording, "score_detail")
    config = recording.metadata["config"]
    (layer,) = select(layer, config["num_hidden_layers"], "layer")
    (head,) = select(head, config["num_attention_heads"], "head")
    for name, wanted, held in (("layer", layer, recording.layers), ("head", head, recording.heads)):
        if wanted not in held:
            raise checks.InputError(
                f"{name}={wanted} is not in this recording, which has {name}s {held}."
            )
    place = recording.heads.index(head)
    queries, keys = (
        widened(batched(recording, name, layer)[:, :, place]) for name in ("q", "k")
    )  # [batch, pos, d_head]
    real = batched(recording, "mask").to(keys.device)
    columns = columns_at(real.cpu(), pos).to(keys.device)  # [batch, 1]
    query = queries[torch.arange(len(queries), device=keys.device), columns[:, 0]]
    products = query.unsqueeze(1) * keys * keys.shape[-1] ** -0.5
    visible = real & (torch.arange(keys.shape[1], device=keys.device) <= columns)
    scores = products.sum(-1).masked_fill(~visible, -torch.inf)
    parts = (query, keys, products, scores, scores.softmax(-1))
    return ScoreDetail(*(p if recording.is_batch else p[0] for p in parts), layer, head)
