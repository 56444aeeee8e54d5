"""What the next token would be without each head, for pages that cannot run the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optlens.interventions import Ablate
from optlens.widgets.branches import lock_of

if TYPE_CHECKING:
    from optlens.hooks import HookPoint
    from optlens.recording import Recording
    from optlens.report.one_prompt import OnePrompt
    from optlens.widgets.live_run import Setting

MOST_HEADS = 400
_MOST_TOKENS = 2**17  # of all runs together: seconds of a small model


def head_ablations(
    recording: Recording,
    setting: Setting,
    one: OnePrompt,
    position: int,
    chosen: int,
    top_k: int = 6,
) -> dict[str, Any] | None:
    """Return the next token without each head in turn; None where that takes long.

    Each is the run of the setting with `Ablate("z", layer=..., head=...)` at the end of its list.
    The heads of a layer run as one batch.

    Args:
        recording: the recording that the setting gives, with its model.
        setting: the setting.
        one: which of its prompts.
        position: which of its tokens the next one follows.
        chosen: a token whose probability is kept in any case.
        top_k: how many tokens to list for each head.

    Returns:
        `ids` and `probs`, `[layer, head, k]`; `kept`, the probability of the `chosen` token,
        `[layer, head]`; and the position `query` that they are read after.
    """
    model = recording.model
    n_layers, n_heads = model.config.n_layers, model.config.n_heads
    drawn = [each for each in setting.interventions if getattr(each, "mode", "") == "resample"]
    tokens = n_layers * n_heads * len(one.ids)
    if n_layers * n_heads > MOST_HEADS or tokens > _MOST_TOKENS or drawn:
        return None
    ids = torch.tensor(one.ids, device=model.device).expand(n_heads, -1)

    def silence(z: Tensor, hook: HookPoint) -> None:
        # z is [batch, pos, head, d_head]: the first text loses the first head, and so on
        every = torch.arange(n_heads, device=z.device)
        z[every, :, every] = 0.0

    found, kept = [], []
    with lock_of(model), torch.no_grad(), model.in_eval_mode():
        with model.intervene(setting.interventions):
            for layer in range(n_layers):
                hooks = [(Ablate("z", layer=layer).address.hooks(model.config)[0], silence)]
                logits = model.run_with_hooks(ids, fwd_hooks=hooks)[:, position]
                probs = logits.float().softmax(-1)
                found.append(probs.topk(min(top_k, probs.shape[-1])))
                kept.append(probs[:, chosen].cpu().numpy())
    return {
        "ids": np.stack([top.indices.cpu().numpy() for top in found]).astype(np.int32),
        "probs": np.stack([top.values.cpu().numpy() for top in found]).astype(np.float32),
        "chosen": chosen,
        "kept": np.stack(kept).astype(np.float32),
        "query": position,
    }
