"""Who wrote a cell of the logit lens: the heads and MLPs before it, each with its share of the logit.

A cell reads the stream after a layer with the final LayerNorm, whose scale it computes afresh. Direct
logit attribution divides the logit at the very end, by the scale at the end. What a part has written
before the cell is the same vector in both, so its term here is that term times the ratio of the two
scales, and the terms of all parts up to the layer add up to the cell's own logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optlens.lens import direct_logit_attribution
from optlens.lens.direct_result import LogitAttribution
from optlens.lens.source import one_prompt_of
from optlens.recording import Recording

if TYPE_CHECKING:
    from optlens.widgets.live_run import Setting

WHAT = ("residual", "embed", "pos_embed", "z", "mlp_out")


@dataclass(frozen=True)
class Contributor:
    """Hold one part's share of a cell's logit.

    Attributes:
        label: as in `LogitAttribution`: "L3H0", "mlp2", "embed".
        kind: "head", "MLP", and so on, as `LogitAttribution.places` says it.
        layer: its layer, if it has one.
        head: its head, if it is one.
        value: its term, in logits.
    """

    label: str
    kind: str
    layer: int | None
    head: int | None
    value: float


def record_parts(recording: Recording, setting: Setting) -> Recording:
    """Record what every part writes, in the run that a setting describes, at all positions."""
    padding = {k: v for k, v in setting.options.items() if k == "attention_mask"}
    return recording.model.record(
        setting.prompt, what=WHAT, interventions=setting.interventions, **padding
    )


@torch.no_grad()
def contributors(
    parts: Recording, row: int | str, position: int, token: int, prompt: int = 0
) -> list[Contributor]:
    """Return the terms of a cell's logit, in the order in which they are computed.

    Args:
        parts: what `record_parts` gives.
        row: the cell's layer, or "embed" for the stream before the first.
        position: which of the prompt's tokens.
        token: whose logit.
        prompt: which prompt.

    Raises:
        InputError: if the model is post-LN, whose stream is no sum.
    """
    alone = one_prompt_of(parts, prompt)  # other prompts may have no such position
    found = direct_logit_attribution(parts.model, alone, token, pos=position)
    depth = 0 if row == "embed" else row + 1
    ratio = _scale_ratio(alone, found, depth)
    terms = []
    for label, (kind, layer, head), value in zip(
        found.labels, found.places, found.values.tolist(), strict=True
    ):
        if layer is not None and layer >= depth:
            continue
        constant = label in ("ln_final.bias", "b_U")
        term = value if constant else value * ratio
        terms.append(Contributor(label, kind, layer, head, term))
    return terms


def _scale_ratio(parts: Recording, found: LogitAttribution, depth: int) -> float:
    """Return the final LayerNorm's scale at the end over that of the stream after `depth` blocks."""
    norm = parts.model.decoder.final_layer_norm
    if norm is None:
        return 1.0
    column = found.metadata["columns"][0]
    residual = parts._tensors["residual"][0, :, column].double()  # [row, d_model]
    scale = (residual.var(-1, correction=0) + norm.eps).sqrt()
    return float(scale[-1] / scale[depth])
