"""Direct logit attribution: which part of the model wrote the answer's logit?

The final residual stream of a pre-LN model is the plain sum of what the embeddings, every head and
every MLP have written to it. The final LayerNorm divides it by one number, the scale, and all that
follows is linear. So with the scale of this very run, a logit (or the difference of two) is a sum
with one term for each part c,

    (c - mean(c)) / scale * gain . W_U[:, answer],

and a term for each bias. The terms say what a part adds *directly*: what it does through later parts,
which read the stream too, and through the scale is not in them. Ablating a part while later parts and
the scale are held as they were changes the logit by exactly its term; ablating it for good may not.
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; for logit differences
Wang et al. 2022, arXiv 2211.00593.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks, metrics
from optlens.bound_metric import BoundMetric
from optlens.lens.direct_result import LogitAttribution
from optlens.lens.source import batched, need_positions, need_whole, prompts_alone, recording_of
from optlens.logit_math import widened
from optlens.metric_targets import Answer
from optlens.recording import FINAL, NotRecordedError, Recording
from optlens.weights import effective_bias, effective_weight, values_of

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

WHAT = ("residual", "embed", "pos_embed", "z", "mlp_out")
PURPOSE = "Direct logit attribution"


@torch.no_grad()
def direct_logit_attribution(
    model: OPTForCausalLM,
    source: Recording | Prompt,
    answer: Answer,
    wrong: Answer | None = None,
    pos: int = -1,
    by_source: bool = False,
) -> LogitAttribution:
    """Divide a logit, or a logit difference, among the parts that wrote it.

    Args:
        model: The model, pre-LN.
        source: A prompt or a list of prompts; or a recording of `what=("residual", "embed",
            "pos_embed", "z", "mlp_out")` with all layers and heads.
        answer: The right token, as in `metrics.logit_diff`: text, id, or one for each prompt;
            of several acceptable ones the mean logit counts.
        wrong: The token whose logit is subtracted, likewise; None for the logit alone.
        pos: The token after which the prediction is read, counted over each prompt's real tokens.
        by_source: Also divide each head's term among the tokens whose values it has read; a
            recording then needs "attention" and "v" too, at all positions.

    Returns:
        A term for each part, in logits (nats), and how far their sum is from the model's own logit.

    Raises:
        InputError: If the model is post-LN, or answer or position do not fit the prompts.
        NotRecordedError: If the recording lacks something, naming the `what` to add.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> prompt = "When Mary and John went to the store, John gave a drink to"
        >>> found = optlens.direct_logit_attribution(model, prompt, " Mary", " John")
        >>> found.heads.shape, bool(found.error.abs() < 1e-4)
        (torch.Size([5, 8]), True)
    """
    _check_additive(model)
    metric = metrics.logit(answer, pos) if wrong is None else metrics.logit_diff(answer, wrong, pos)
    recording = recording_of(model, source, (*WHAT, "attention") if by_source else WHAT, pos=pos)
    need_whole(recording, PURPOSE)
    tokens, mask = (batched(recording, name) for name in ("tokens", "mask"))
    bound = metric.bind(model, tokens, mask.long())
    rows = _rows_at(recording, bound.columns[:, 0].tolist(), pos)
    final = _take(_final(recording), rows)
    total = bound(recording._unembed(final[:, None]))
    reader = _Reader(model, bound, final)
    terms = _terms(reader, recording, rows)
    labels = list(terms)
    values = torch.stack([terms[label] for label in labels], -1).cpu()
    sources = None
    if by_source:
        full = source if recording is source else recording_of(model, source, "v")
        need_positions(full, "by_source=True")
        sources = _by_source(reader, recording, full, rows)
    total = total.cpu()
    if not recording.is_batch:
        values, total = values[0], total[0]
        sources = None if sources is None else sources[0]
    config = model.config
    about = {
        "metric": str(metric),
        "tokens": tokens.tolist(),
        "str_tokens": recording.str_tokens,
        "labels": recording.metadata["labels"],
        "columns": bound.columns[:, 0].tolist(),
        "model": recording.metadata["fingerprint"],
    }
    size = (config.n_layers, config.n_heads)
    return LogitAttribution(values, labels, total, *size, sources, about, prompts_alone(recording))


def _check_additive(model: OPTForCausalLM) -> None:
    """Refuse a model whose final residual stream is no sum."""
    if not model.config.do_layer_norm_before:
        raise checks.InputError(
            "Direct logit attribution takes the final residual stream apart into what each part "
            "added to it. This model normalises the stream after every sub-layer (post-LN), so what "
            "is read at the end is no such sum. To see what a part does to the answer here, use "
            "ablate_sweep or patch_sweep; to see where the answer appears, logit_lens."
        )


def _final(recording: Recording) -> Tensor:
    """Return the residual stream after the last block, `[batch, pos, d_model]`."""
    if FINAL not in recording._tensors:
        recording._get("residual", "residual")  # raises, naming what to record
    return recording._tensors[FINAL]


def _rows_at(recording: Recording, columns: list[int], pos: int) -> list[int]:
    """Return where a column of each prompt is among the recorded positions."""
    rows = []
    for held, column in zip(recording.metadata["columns"], columns, strict=True):
        if column not in held:
            raise NotRecordedError(
                f"{PURPOSE} reads pos={pos}, but this recording holds the positions "
                f"{recording.positions} only; record it without pos=, or with pos={pos}."
            )
        rows.append(held.index(column))
    return rows


def _take(value: Tensor, rows: list[int], axis: int = 1) -> Tensor:
    """Pick one position of each prompt from `[batch, ..., pos, ...]`, dropping the axis."""
    return torch.stack([value[b].select(axis - 1, row) for b, row in enumerate(rows)])


class _Reader:
    """The linear map from the final residual stream to the answer's logit, for each prompt.

    Attributes:
        model: The model.
        direction: What a part is multiplied with, `[batch, d_model]`: mean removed, divided by the
            scale of the run.
        constants: Name of a bias that the map adds to its term, `[batch]`.
    """

    def __init__(self, model: OPTForCausalLM, bound: BoundMetric, final: Tensor) -> None:
        """Put together unembedding, projection and final LayerNorm.

        Args:
            model: The model.
            bound: The logit or logit difference.
            final: The residual stream after the last block at the position that is read,
                `[batch, d_model]`.
        """
        self.model, self.constants = model, {}
        head, decoder = effective_weight(model.lm_head), model.decoder
        ids = bound.answers.to(head.device)
        rows = widened(head[ids])  # [batch, k, word_embed_proj_dim]
        weights = bound.weights.to(rows)
        direction = (weights.unsqueeze(-1) * rows).sum(1)
        if decoder.project_out is not None:
            direction = direction @ effective_weight(decoder.project_out).to(direction)
        norm = decoder.final_layer_norm
        if norm is not None:
            if norm.weight is not None:
                gain, bias = (values_of(norm, name).to(direction) for name in ("weight", "bias"))
                self.constants["ln_final.bias"] = direction @ bias
                direction = direction * gain
            # (c - mean(c)) . d is c . (d - mean(d))
            direction = direction - direction.mean(-1, keepdim=True)
            stream = final.to(direction)
            scale = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
            direction = direction / scale
        bias = effective_bias(model.lm_head)
        if bias is not None:  # no published OPT has one
            self.constants["b_U"] = (weights * bias[ids].to(weights)).sum(-1)
        self.direction = direction

    def term(self, part: Tensor) -> Tensor:
        """Return what a part `[batch, d_model]`, or `[d_model]` for all, adds: `[batch]`."""
        return (part.to(self.direction) * self.direction).sum(-1)

    def onto_values(self, layer: int) -> Tensor:
        """Return the direction as each head of a block sees it, `[batch, head, d_head]`."""
        attention = self.model.decoder.layers[layer].self_attn
        weight = effective_weight(attention.out_proj).to(self.direction)
        return (self.direction @ weight).unflatten(-1, (attention.n_heads, -1))


def _terms(reader: _Reader, recording: Recording, rows: list[int]) -> dict[str, Tensor]:
    """Return the term of every part and bias, `[batch]` each, in the order of the computation."""
    terms = {}
    for label in ("embed", "pos_embed"):
        terms[label] = reader.term(_take(batched(recording, f"hook_{label}"), rows))
    for layer, block in enumerate(reader.model.decoder.layers):
        onto = reader.onto_values(layer)
        z = _take(batched(recording, "z", layer), rows)  # [batch, head, d_head]
        heads = (z.to(onto) * onto).sum(-1)
        terms |= {f"L{layer}H{head}": term for head, term in enumerate(heads.unbind(-1))}
        bias = effective_bias(block.self_attn.out_proj)
        if bias is not None:
            terms[f"b_O{layer}"] = reader.term(bias)
        terms[f"mlp{layer}"] = reader.term(_take(batched(recording, "mlp_out", layer), rows))
    return terms | reader.constants


def _by_source(reader: _Reader, recording: Recording, full: Recording, rows: list[int]) -> Tensor:
    """Divide each head's term among the tokens that it read, `[batch, layer, head, key]`.

    Args:
        reader: The map to the answer's logit.
        recording: Holds the attention of the position that is read.
        full: Holds the values of all positions.
        rows: Where the position that is read is in `recording`, for each prompt.
    """
    layers = []
    for layer in range(reader.model.config.n_layers):
        onto = reader.onto_values(layer)
        pattern = _take(batched(recording, "attention", layer), rows, axis=2).to(onto)
        values = batched(full, "v", layer).to(onto)  # [batch, key, head, d_head]
        layers.append(pattern * torch.einsum("bkhe,bhe->bhk", values, onto))
    return torch.stack(layers, 1).cpu()
