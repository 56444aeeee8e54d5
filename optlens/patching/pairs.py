"""Pairs of prompts that match token by token, and the quiet in which models are run on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.attention_mask import real_tokens
from optlens.patching.result import prompt_strings

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM


def denoises(direction: str) -> bool:
    """Tell whether clean values are written into the corrupt run, rather than the other way round.

    Raises:
        InputError: If the direction is neither "denoise" nor "noise".
    """
    if direction not in ("denoise", "noise"):
        raise checks.InputError(f"direction={direction!r}: give 'denoise' or 'noise'.")
    return direction == "denoise"


def check_undivided(model: OPTForCausalLM) -> None:
    """Refuse a model whose blocks are on several devices.

    Raises:
        InputError: Saying what is where, and what works all the same.
    """
    reason = getattr(model.placement, "no_attribution", None)
    if reason is not None:
        raise checks.InputError(reason)


@contextmanager
def undisturbed(model: OPTForCausalLM) -> Iterator[None]:
    """Run a model without gradients and dropout, and insist that no hook function edits it.

    Raises:
        InputError: If hook functions are attached.
    """
    edited = model.edited_hooks
    if edited:
        raise checks.InputError(
            f"Hook functions are attached to {', '.join(edited[:3])}: what runs here computes parts of "
            "runs, in which they would not act as expected. Remove them with model.reset_hooks(), or "
            "leave the `with` block that they belong to. To sweep under interventions give them to "
            "patch_sweep, ablate_sweep or knockout_sweep: interventions=[...]."
        )
    with model.in_eval_mode(), torch.no_grad():
        yield


def prompts_on_host(
    model: OPTForCausalLM, prompt: Prompt, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Tokenise one prompt or several; padding comes to the left, wherever it was.

    Args:
        model: The model.
        prompt: Text, a list of texts, or token ids.
        attention_mask: For padded token ids: 1 at real tokens, 0 at padding.

    Returns:
        Token ids, `[prompts, pos]`, and their padding mask or None, on the CPU.

    Raises:
        InputError: If prompt and mask do not fit the model or each other.
    """
    tokens, mask = model.inputs_on_host(prompt, attention_mask)
    if attention_mask is None or mask is None:
        return tokens, mask
    # a stable sort by "is real" leaves the tokens in their order
    order = mask.long().argsort(dim=-1, stable=True)
    tokens, mask = tokens.gather(1, order), mask.gather(1, order)
    used = slice(tokens.shape[1] - int(mask.sum(-1).max()), None)  # the longest prompt's columns
    tokens = tokens.masked_fill(mask == 0, model.config.pad_token_id or 0)[:, used]
    return tokens, None if bool(mask[:, used].all()) else mask[:, used]


def paired_tokens(
    model: OPTForCausalLM, clean: Prompt, corrupt: Prompt, attention_mask: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Return what `paired_on_host` does, on the model's device."""
    pair, mask = paired_on_host(model, clean, corrupt, attention_mask)
    mask = None if mask is None else mask.to(model.device)
    return tuple(tokens.to(model.device) for tokens in pair), mask


def paired_on_host(
    model: OPTForCausalLM, clean: Prompt, corrupt: Prompt, attention_mask: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Tokenise two prompts, or lists of prompts, that have to match token by token.

    Args:
        model: The model.
        clean: Text, a list of texts, or token ids.
        corrupt: Likewise.
        attention_mask: For padded token ids, of both.

    Returns:
        Token ids of both, `[prompts, pos]`, and their common padding mask or None, on the CPU.

    Raises:
        InputError: If their numbers or lengths differ; shows both tokenisations.
    """
    prepared = [prompts_on_host(model, prompt, attention_mask) for prompt in (clean, corrupt)]
    (tokens, mask), (other, _) = prepared  # padded on the left, if at all: alike where lengths are
    if len(tokens) != len(other):
        raise checks.InputError(
            f"There are {len(tokens)} clean and {len(other)} corrupt prompts; each clean prompt needs "
            "its corrupt one."
        )
    reals = [real_tokens(*each) for each in prepared]
    for number in range(len(tokens)):
        lengths = [int(real[number].sum()) for real in reals]
        if lengths[0] != lengths[1]:
            texts = [
                " | ".join(prompt_strings(model, ids[[number]], real[[number]])[0])
                for (ids, _), real in zip(prepared, reals, strict=True)
            ]
            raise checks.InputError(
                f"Clean and corrupt prompt {number} have {lengths[0]} and {lengths[1]} tokens:\n"
                f"  {texts[0]}\n  {texts[1]}\n"
                "Patching moves values between equal positions; reword one until the lengths agree."
            )
    return (tokens, other), mask
