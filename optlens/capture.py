"""Recording: run a model on a prompt and keep the chosen part of what happens.

What is kept, and where it goes, is the business of `recorder.py`; here the model runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import allocator, checks
from optlens.attention_mask import real_tokens
from optlens.hooks import HookPoint
from optlens.interventions import Intervention, intervene
from optlens.names import get_act_name
from optlens.pinned import pinned_bytes
from optlens.recorder import Plan, Recorder, plan_bytes, plan_of
from optlens.recording import WHAT, Recording
from optlens.selection import Selection, resolve_what, select, select_positions

if TYPE_CHECKING:
    from optlens.base import Prompt
    from optlens.config import OPTConfig
    from optlens.model import OPTForCausalLM


def record(
    model: OPTForCausalLM,
    prompt: Prompt,
    what: str | Iterable[str] = WHAT,
    layers: Selection = None,
    heads: Selection = None,
    pos: Selection = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prepend_bos: bool = True,
    attention_mask: Tensor | None = None,
    interventions: Intervention | Iterable[Intervention] = (),
    spans: Mapping[str, Any] | None = None,
) -> Recording:
    """Run a model on a prompt and keep what happened.

    Runs without gradients and without dropout, also if the model is in training mode, where it is
    left again. Interventions, given here or attached to the model (`model.intervene`,
    `model.hooks`), act, and what is kept is the value after them; the recording's metadata
    describes them.

    Args:
        model: The model.
        prompt: Text; a list of texts; token ids, `[pos]` or `[batch, pos]`. A list or a 2-D tensor
            gives a batch axis; a list of unequal lengths is padded on the left.
        what: Any of "attention", "residual" and "logit_lens", and hook names, in full
            ("blocks.3.attn.hook_z", or "z3") or short for all chosen layers ("z", "resid_mid").
        layers: Which blocks: a number, several, or a slice; negative from the end; None for all.
        heads: Which heads of each block, likewise.
        pos: Which positions (queries, for attention; keys are kept whole), likewise; -1 is the
            last real token. In a padded batch, numbers and slices count each prompt's real tokens,
            and must mean the same ones in all; None keeps every column, padding included.
        dtype: Store in this floating-point dtype; the model's unless given.
        device: Store here.
        prepend_bos: Whether text gets `</s>` in front.
        attention_mask: For padded token ids.
        interventions: What to change in this run: one or several of `optlens.interventions`.
        spans: Names for positions in `interventions`, as `model.intervene` takes them.

    Returns:
        The recording, on `device`.

    Raises:
        InputError: If the prompt or a selection does not fit the model, a value does not fit
            `dtype`, or an intervention on `ln_final` would be missing from the logits and the lens.
        UnknownHookError: If `what` names no hook; the nearest are suggested.
        MemoryError: If it would not fit, before running; says how much and which option helps.
        NonFiniteError: If activations become NaN or infinite, naming the first block.

    Example:
        >>> rec = record(model, "A photo of a cat", layers=[0, -1])  # doctest: +SKIP
    """
    tokens, mask = model.inputs_on_host(prompt, attention_mask, prepend_bos)
    is_batch = not isinstance(prompt, str) and not (isinstance(prompt, Tensor) and prompt.ndim == 1)
    real = real_tokens(tokens, mask)
    positions, columns = select_positions(pos, real)
    recorder = Recorder(model, what, layers, heads, tuple(tokens.shape), columns, dtype, device)
    with model.in_eval_mode(), intervene(model, interventions, spans):
        _run(model, tokens, mask, recorder)
        recording = recorder.recording(tokens, real, positions, is_batch)
    if "logit_lens" in recorder.what:
        from optlens.lens import store_lens

        allocator.release()  # what the run has freed is in pieces too small for the lens's tables
        store_lens(recording)
    return recording


def estimate_bytes(
    config: OPTConfig,
    pos: int,
    batch: int = 1,
    what: str | Iterable[str] = WHAT,
    layers: Selection = None,
    heads: Selection = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Return how many bytes `record` would keep for a prompt of `pos` tokens.

    Example:
        >>> from optlens import OPTConfig
        >>> estimate_bytes(OPTConfig(), pos=512, what="attention")  # 12 * 12 * 512 * 512 * 4
        150994944
    """
    return plan_bytes(_plan(config, (batch, pos), what, layers, heads), dtype)


def estimate_pinned_bytes(
    config: OPTConfig,
    pos: int,
    batch: int = 1,
    what: str | Iterable[str] = WHAT,
    layers: Selection = None,
    heads: Selection = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Return how many bytes more a recording takes if it leaves a GPU by way of pinned memory.

    Arguments are those of `estimate_bytes`. Each of its tensors is a buffer of its own, see
    `optlens.pinned.pinned_bytes`. Computed from PyTorch's source, not measured.

    Example:
        >>> from optlens import OPTConfig
        >>> estimate_pinned_bytes(OPTConfig(), pos=512, what="attention")  # 2**28 - 12 * 12 * 2**20
        117440512
    """
    plan = _plan(config, (batch, pos), what, layers, heads)
    sizes = [plan_bytes({name: entry}, dtype) for name, entry in plan.items()]
    return sum(pinned_bytes(size) - size for size in sizes)


def _plan(
    config: OPTConfig,
    shape: tuple[int, int],
    what: str | Iterable[str],
    layers: Selection,
    heads: Selection,
) -> Plan:
    chosen_layers = select(layers, config.n_layers, "layers")
    chosen_heads = select(heads, config.n_heads, "heads")
    return plan_of(resolve_what(what, config), config, chosen_layers, chosen_heads, shape, None)


def _run(model: OPTForCausalLM, tokens: Tensor, mask: Tensor | None, recorder: Recorder) -> None:
    """Run the blocks, and what comes after them only if it is listened to."""
    sums: dict[int, Tensor] = {}

    def probe(value: Tensor, hook: HookPoint) -> None:
        sums[hook.layer()] = value.sum(dtype=torch.float32).to(model.device)

    # on the CPU the model itself watches for values that are not finite
    watched = (
        []
        if model.device.type == "cpu"
        else [get_act_name("resid_post", layer) for layer in range(model.config.n_layers)]
    )
    with torch.no_grad(), model.recorders(recorder.points, recorder.keep):
        with model.recorders([model.hook_dict[name] for name in watched], probe):
            resid = model(
                tokens, attention_mask=mask, use_cache=False, stop_at_layer=model.config.n_layers
            )
        if recorder.listens_behind_blocks:
            model.decoder.finish(resid)
    if sums:
        checks.finite_layers(list(sums.values()), [f"block {layer}" for layer in sums])
