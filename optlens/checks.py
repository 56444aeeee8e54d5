"""Checks of values: token ids, masks, finiteness.

Every check that reads numbers out of tensors goes through `on_host`, which gives None where there
are none to read (fake and meta tensors, traced graphs). So a forward pass can be rehearsed on
tensors without data, and the checks cost one small copy from an accelerator.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optlens.kv_cache import KVCache


class InputError(ValueError):
    """A prompt, token tensor or mask that the model cannot run on."""


class NonFiniteError(FloatingPointError):
    """A run whose activations became NaN or infinite."""


def on_host(tensor: Tensor) -> Tensor | None:
    """Return the tensor on the CPU, or None if it has no values to read."""
    if tensor.is_meta or hasattr(tensor, "fake_mode") or torch.compiler.is_compiling():
        return None
    return tensor.detach().cpu()


def token_ids(ids: Tensor, vocab_size: int) -> None:
    """Check that a token tensor is `[batch, pos]`, whole-numbered, not empty and in range.

    Raises:
        InputError: Saying which id at which place is out of range, and the range.
    """
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise InputError(
            f"Token ids must be whole numbers, got a tensor of {ids.dtype}. To run from "
            "embeddings, pass inputs_embeds=; to run from a residual, pass start_at_layer=."
        )
    if ids.ndim != 2:
        raise InputError(f"Token ids must have shape [batch, pos], got {tuple(ids.shape)}.")
    if ids.numel() == 0:
        raise InputError(f"The prompt is empty: token ids have shape {tuple(ids.shape)}.")
    values = on_host(ids)
    if values is None:
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        bad = ((values < 0) | (values >= vocab_size)).nonzero()[0].tolist()
        raise InputError(
            f"Token id {int(values[tuple(bad)])} at prompt {bad[0]}, position {bad[1]} is out of "
            f"range; this model has ids 0 to {vocab_size - 1}. Was the text tokenised for another "
            "model?"
        )


def attention_mask(
    mask: Tensor | None, batch: int, length: int, past: KVCache | None = None
) -> bool:
    """Check a padding mask of ones (real) and zeros (padding); return whether it hides anything.

    Args:
        mask: The mask, `[batch, length]`; None if every token is real.
        batch: Expected number of prompts.
        length: Expected number of tokens, cached ones included.
        past: The cache that this call continues or begins. With one, a prompt may be all padding:
            what is padded on the left comes in chunks.

    Returns:
        False only if every value is one.

    Raises:
        InputError: If shape or values are not those of a padding mask, a prompt is all padding, or
            there is no mask although some cached tokens are padding.
    """
    if mask is None:
        if past is not None and past.has_padding:
            raise InputError(
                "past_key_values holds padded prompts, so this call needs an attention_mask too, "
                f"[batch, pos] = {(batch, length)} over the cached and the new tokens."
            )
        return False
    if tuple(mask.shape) != (batch, length):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [batch, pos] = "
            f"{(batch, length)}, cached tokens included."
        )
    values = on_host(mask)
    if values is None:
        return True
    if not bool(((values == 0) | (values == 1)).all()):
        raise InputError(
            "attention_mask must hold ones (real tokens) and zeros (padding) only, got values "
            f"from {values.min().item()} to {values.max().item()}."
        )
    real = values.bool().any(-1)
    if past is None and not bool(real.all()):
        empty = (~real).nonzero()[0].item()
        raise InputError(f"Prompt {empty} of the batch is all padding: its mask has no one in it.")
    return not bool(values.bool().all())


def sequence_length(length: int, n_ctx: int) -> None:
    """Check that a sequence (cached tokens included) is not longer than the position table.

    Raises:
        InputError: If it is.
    """
    if length > n_ctx:
        raise InputError(
            f"The sequence has {length} tokens, but this model has positions for {n_ctx} only; "
            "shorten the prompt."
        )


def finite(values: Tensor, stage: str) -> None:
    """Check that what a stage of a run computed is finite.

    Only on the CPU: on an accelerator, looking at it would make every pass wait for the device;
    recording looks there, once, through `finite_layers`.

    Args:
        values: Any shape.
        stage: What to call it, e.g. "the embedding", "block 3".

    Raises:
        NonFiniteError: If a value is NaN or infinite.
    """
    if values.device.type == "cpu":
        # a sum is not finite if one of its terms is not
        total = on_host(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)))
        if total is not None and not math.isfinite(total):
            raise _not_finite(stage)


def finite_layers(probes: list[Tensor], names: list[str]) -> None:
    """Check one number per stage of a run; name the first stage that is not finite.

    Args:
        probes: Scalars, each finite exactly if that stage's activations are.
        names: What to call the stages, e.g. "the embedding", "block 3".

    Raises:
        NonFiniteError: Naming the first stage whose probe is NaN or infinite.
    """
    values = on_host(torch.stack(probes))
    for value, name in zip([] if values is None else values.tolist(), names, strict=False):
        if not math.isfinite(value):
            raise _not_finite(name)


def _not_finite(stage: str) -> NonFiniteError:
    return NonFiniteError(
        f"The activations become NaN or infinite in {stage}. Check the weights and any hook or "
        "intervention there; in float16 try bfloat16 or float32."
    )


def position_ids(positions: Tensor, batch: int, pos: int, n_ctx: int) -> None:
    """Check given positions: whole numbers `[batch, pos]` in the table, -1 (padding) to `n_ctx - 1`.

    Raises:
        InputError: If they are not.
    """
    whole = not positions.is_floating_point() and positions.dtype != torch.bool
    if not whole or tuple(positions.shape) not in ((pos,), (1, pos), (batch, pos)):
        raise InputError(
            f"position_ids has shape {tuple(positions.shape)} and dtype {positions.dtype}; "
            f"expected whole numbers [batch, pos] = {(batch, pos)}."
        )
    values = on_host(positions)
    if values is not None and (int(values.min()) < -1 or int(values.max()) >= n_ctx):
        raise InputError(
            f"position_ids run from {int(values.min())} to {int(values.max())}; this model has "
            f"positions 0 to {n_ctx - 1}, and -1 for padding."
        )


def embeddings(embeds: Tensor, width: int) -> None:
    """Check that `inputs_embeds` is `[batch, pos, width]` and not empty.

    Raises:
        InputError: If it is not; 350m takes 512 wide embeddings, before `project_in`.
    """
    fits = embeds.is_floating_point() and embeds.ndim == 3 and embeds.shape[-1] == width
    if not fits or embeds.numel() == 0:
        raise InputError(
            f"inputs_embeds has shape {tuple(embeds.shape)} and dtype {embeds.dtype}; expected "
            f"numbers [batch, pos, {width}], the token embeddings before any projection and without "
            "positions."
        )


def residual(resid: Tensor | str | list | None, d_model: int) -> None:
    """Check what `start_at_layer` starts from: a residual stream `[batch, pos, d_model]`.

    Raises:
        InputError: If it is not one.
    """
    expected = (
        f"start_at_layer takes a residual stream [batch, pos, {d_model}] in place of token ids"
    )
    if not isinstance(resid, Tensor):
        raise InputError(f"{expected}, got {'inputs_embeds' if resid is None else 'text'}.")
    fits = resid.is_floating_point() and resid.ndim == 3 and resid.shape[-1] == d_model
    if not fits or resid.numel() == 0:
        raise InputError(
            f"{expected}, got a tensor of shape {tuple(resid.shape)} and dtype {resid.dtype}; "
            "cache['resid_pre', layer] has one."
        )


def layer_range(start: int | None, stop: int | None, n_layers: int) -> range:
    """Return the blocks from `start` to before `stop`; negative numbers count from the end.

    Raises:
        InputError: If there is no such block, or the run would end before it begins.
    """
    for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
        if layer is not None and not -n_layers <= layer <= n_layers:
            raise InputError(
                f"{name}={layer} is out of range: this model has blocks 0 to {n_layers - 1}; "
                f"{n_layers} is the end of the last, and negative numbers count from there."
            )
    blocks = range(n_layers)[start:stop]
    if blocks.start > blocks.stop:
        raise InputError(f"stop_at_layer={stop} comes before start_at_layer={start}.")
    return blocks


def partial_run(
    start: int | None, stop: int | None, position_ids: Tensor | None, past: KVCache | None
) -> None:
    """Check that a run of some blocks only is not asked for what needs all of them.

    Raises:
        InputError: If it is given positions that nothing would read, or cached tokens.
    """
    if start is not None and position_ids is not None:
        raise InputError("start_at_layer starts behind the positions; leave out position_ids.")
    if past is not None and not (start is None and stop is None):
        raise InputError(
            "start_at_layer and stop_at_layer cannot continue from past_key_values, which would "
            "then hold these tokens for some of the layers only; pass one or the other."
        )


def labels(ids: Tensor, logits: Tensor) -> None:
    """Check that labels `[batch, pos]` fit the logits and are token ids or -100.

    Raises:
        InputError: If they do not or are not.
    """
    if ids.shape != logits.shape[:2] or ids.is_floating_point():
        raise InputError(
            f"labels have shape {tuple(ids.shape)} and dtype {ids.dtype}; expected whole numbers of "
            f"the tokens' shape {tuple(logits.shape[:2])}. They are shifted inside, so pass "
            "input_ids as they are."
        )
    values = on_host(ids)
    if values is None:
        return
    vocab_size = logits.shape[-1]
    bad = (values != -100) & ((values < 0) | (values >= vocab_size))
    if bool(bad.any()):
        raise InputError(
            f"Label {int(values[bad][0])} is neither a token id (0 to {vocab_size - 1}) nor -100, "
            "which is ignored."
        )


def some_target(targets: Tensor) -> None:
    """Check that there is a next token to predict: targets `[batch, pos - 1]`, -100 where not.

    Raises:
        InputError: If there is none, so that their mean loss would be 0/0.
    """
    values = on_host(targets)
    if values is not None and not bool((values != -100).any()):
        raise InputError(
            "A next-token loss needs a prompt of at least two real tokens, got one of "
            f"{targets.shape[-1] + 1}, padding included."
        )
