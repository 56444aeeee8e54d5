"""Perplexity over a text: how many tokens a model hesitates between, on average.

The protocol. A text becomes tokens; windows of `window` tokens slide over them, each beginning
`stride` tokens after the one before. The model runs on every window alone, with positions counted
from the window's start, and a window scores the tokens that no window before it has scored, each by
its cross-entropy in nats given the tokens before it in the window. So with `stride < window` every
token is scored once, the first window's given all that comes before, the others' given at least
`window - stride` tokens. With `stride == window` the windows do not overlap, and the first token of
each has nothing before it and is not scored; this is how most papers report OPT. The mean is over
scored tokens, and perplexity is its exponential. What `</s>` does:

    bos="text"    stands once, in front of the text, and is not scored (as transformers' own
                  description of this loop has it, with OPT's tokenizer)
    bos="window"  stands in front of every window, as it did of every text in training, and counts
                  among the window's tokens; every token of the text is scored
    bos="none"    is left out; the first token of the text is not scored

Bits per byte divide the same sum, in bits, by the UTF-8 bytes of the scored tokens, and so compare
models whose tokenizers differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from optlens import checks
from optlens.files import why_unreadable
from optlens.interventions import provenance
from optlens.progress import progress_bar
from optlens.recording import fingerprint
from optlens.window_log import Window, WindowLog

if TYPE_CHECKING:
    from pandas import DataFrame

    from optlens.model import OPTForCausalLM

_POSITIONS_AT_ONCE = 256  # of whose logits a float32 copy is made


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` has measured.

    Attributes:
        nats: Sum of the cross-entropies of all scored tokens.
        tokens: How many tokens were scored.
        n_bytes: How many bytes of UTF-8 they stand for; None if the model has no tokenizer.
        windows: For each window its `Window` and its sum of nats.
        settings: What was measured on, and how.
    """

    nats: float
    tokens: int
    n_bytes: int | None
    windows: list[tuple[Window, float]] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy of a token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of `nats_per_token`."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """Sum of the cross-entropies, in bits, over the bytes of the scored tokens."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else None

    def __str__(self) -> str:
        """Say it in a line."""
        per_byte = "" if self.n_bytes is None else f", {self.bits_per_byte:.4f} bits per byte"
        return (
            f"perplexity {self.perplexity:.4f} ({self.nats_per_token:.4f} nats per token over "
            f"{self.tokens:,} tokens{per_byte}; window {self.settings['window']}, stride "
            f"{self.settings['stride']}, bos {self.settings['bos']!r})"
        )

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table with a row for each window: start, end, scored, nats, perplexity.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        rows = [(*window, nats, math.exp(nats / window.scored)) for window, nats in self.windows]
        return pandas.DataFrame(rows, columns=[*Window._fields, "nats", "perplexity"])


@torch.no_grad()
def perplexity(
    model: OPTForCausalLM,
    text_or_file: str | os.PathLike | Tensor,
    window: int | None = None,
    stride: int | None = None,
    bos: Literal["text", "window", "none"] = "text",
    batch_size: int = 1,
    checkpoint: str | os.PathLike | None = None,
    save_every: float = 30.0,
    progress: bool = True,
) -> Perplexity:
    """Measure a model's perplexity on a text; the module's description states the protocol.

    Runs without gradients and without dropout. Hooks and interventions that are attached act.

    Args:
        model: The model.
        text_or_file: A `Path`, or a string that names a file or holds no white space, is read as a
            UTF-8 file; any other string is the text; a tensor `[pos]` is its token ids.
        window: Tokens in a window; the model's whole context (2,048 for every published OPT)
            unless given.
        stride: Tokens from one window's start to the next; half a window unless given. A smaller
            one gives every token more context and takes longer.
        bos: Where `</s>` stands: "text", "window" or "none".
        batch_size: How many windows run at once.
        checkpoint: A file to keep finished windows in. The same call goes on from there, however
            the first one ended.
        save_every: Seconds after which that file is written again; it is also when the call ends.
        progress: Show a progress bar, if it takes more than a second.

    Raises:
        InputError: If there is nothing to score, or window and stride do not fit.
        FileNotFoundError: If the file is missing, or the folder of `checkpoint`.
        ValueError: If `checkpoint` holds windows of another text, model or setting, naming which.
        KeyboardInterrupt: If the user interrupts, with a note of what was done so far.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> result = perplexity(model, "The cat sat on the mat. The dog saw the cat.", window=8)
        >>> result.tokens == model.to_tokens("The cat sat on the mat. The dog saw the cat.").shape[1] - 1
        True
        >>> result.perplexity > 1
        True
    """
    tokens = _tokens(model, text_or_file, bos)
    window = model.config.n_ctx if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    _check_settings(model, window, stride, bos, batch_size)
    plan = _plan(len(tokens), window, stride, bos)
    if not plan:
        raise checks.InputError(
            "There is nothing to score: the text is a single token, and nothing comes before it."
        )
    settings = {"window": window, "stride": stride, "bos": bos, **_identity(model, tokens)}
    done = WindowLog(checkpoint, settings, len(plan), save_every)
    try:
        with model.in_eval_mode(), _bar(plan, done, progress) as bar:
            for group in _batches(plan, len(done.nats), batch_size):
                done.add(_score(model, tokens, group, bos))
                bar.update(sum(each.scored for each in group))
                bar.set_postfix_str(f"perplexity {done.so_far(plan):.3f}", refresh=False)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(done.describe(plan))
        raise
    finally:
        done.save()
    scored = [i for each in plan for i in tokens[each.end - each.scored : each.end]]
    total = sum(each.scored for each in plan)
    pairs = list(zip(plan, done.nats, strict=True))
    return Perplexity(math.fsum(done.nats), total, _count_bytes(model, scored), pairs, settings)


# ------------------------------------------------------------------------------------ the text


def _tokens(model: OPTForCausalLM, given: str | os.PathLike | Tensor, bos: str) -> list[int]:
    """Return the ids of the text, with `</s>` in front where it stands once."""
    if isinstance(given, Tensor):
        ids = model.to_tokens(given).flatten().tolist() if given.ndim == 1 else None
        if ids is None:
            raise checks.InputError(f"Token ids must have shape [pos], got {tuple(given.shape)}.")
    else:
        ids = model._text_tokenizer().encode(_read(given), prepend_bos=False)
    if not ids:
        raise checks.InputError("The text is empty; there is nothing to score.")
    first = model.config.bos_token_id
    if bos != "none" and first is None:
        raise checks.InputError('This model has no bos_token_id; pass bos="none".')
    if bos == "text" and ids[0] != first:
        return [first, *ids]
    return ids[1:] if bos == "window" and ids[0] == first else ids


def _read(given: str | os.PathLike) -> str:
    """Return the text itself, or that of the file it names."""
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"Expected a text, a file or token ids, got a {type(given).__name__}.")
    is_word = isinstance(given, str) and given != "" and not any(map(str.isspace, given))
    is_file = isinstance(given, str) and len(given) < 4096 and "\0" not in given
    if isinstance(given, str) and not is_word and not (is_file and os.path.isfile(given)):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise checks.InputError(
            f"{given} is no UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02X}). "
            "Convert it, or pass its text."
        ) from error
    except OSError as error:
        hint = " To score a single word as text, pass model.to_tokens(word)[0]." if is_word else ""
        raise type(error)(
            error.errno, f"Cannot read {given}: {why_unreadable(given, error)}.{hint}"
        ) from error


def _count_bytes(model: OPTForCausalLM, ids: Sequence[int]) -> int | None:
    """Return how many bytes tokens stand for; None if that cannot be told."""
    if model.tokenizer is None:
        return None
    size = {index: model.tokenizer.bytes_of(index) for index in set(ids)}
    return None if None in size.values() else sum(len(size[index]) for index in ids)


# --------------------------------------------------------------------------------- the windows


def _check_settings(
    model: OPTForCausalLM, window: int, stride: int, bos: str, batch_size: int
) -> None:
    if not hasattr(model, "lm_head"):
        raise checks.InputError(
            f"An {type(model).__name__} predicts no tokens; use an OPTForCausalLM, such as "
            "optlens.load gives."
        )
    n_ctx = model.config.n_ctx
    for name, value in (("window", window), ("stride", stride), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise checks.InputError(f"{name} must be a positive whole number, got {value!r}.")
    if bos not in ("text", "window", "none"):
        raise checks.InputError(f'bos must be "text", "window" or "none", got {bos!r}.')
    if not 2 <= window <= n_ctx:
        raise checks.InputError(
            f"window={window} must be 2 to {n_ctx}, the number of this model's positions."
        )
    longest = window - (bos == "window")
    if stride > longest:
        raise checks.InputError(
            f"stride={stride} is longer than the {longest} tokens of text in a window of {window} "
            f'(bos="{bos}"), so tokens in between would be left out.'
        )


def _plan(n_tokens: int, window: int, stride: int, bos: str) -> list[Window]:
    """Lay windows over the tokens; a window without anything new to score is left out."""
    plan: list[Window] = []
    behind = 0  # tokens before this one have had their turn
    room, needs = (window - 1, 0) if bos == "window" else (window, 1)
    for start in range(0, n_tokens, stride):
        end = min(start + room, n_tokens)
        scored = end - max(behind, start + needs)
        if scored > 0:
            plan.append(Window(start, end, scored))
        behind = end
        if end == n_tokens:
            break
    return plan


def _batches(plan: list[Window], first: int, size: int) -> Iterator[list[Window]]:
    """Group windows of one length, in order, from number `first` on."""
    group: list[Window] = []
    for each in plan[first:]:
        fits = not group or group[0].end - group[0].start == each.end - each.start
        if not fits or len(group) == size:
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _score(model: OPTForCausalLM, tokens: list[int], group: list[Window], bos: str) -> list[float]:
    """Return the sum of nats of each window of a group."""
    front = [model.config.bos_token_id] if bos == "window" else []
    ids = torch.tensor([front + tokens[each.start : each.end] for each in group])
    keep = max(each.scored for each in group)
    logits = model(ids.to(model.device), use_cache=False, logits_to_keep=keep + 1).logits
    targets = ids[:, -keep:].to(logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for at in range(0, keep, _POSITIONS_AT_ONCE):
        part = logits[:, at : min(at + _POSITIONS_AT_ONCE, keep)].to(wide).transpose(1, 2)
        chosen = targets[:, at : at + _POSITIONS_AT_ONCE]
        losses.append(F.cross_entropy(part, chosen, reduction="none").double().cpu())
    per_token = torch.cat(losses, dim=1)  # [window, pos]
    pairs = zip(per_token, group, strict=True)
    return [row[keep - each.scored :].sum().item() for row, each in pairs]


def _identity(model: OPTForCausalLM, tokens: list[int]) -> dict[str, Any]:
    """Describe text and model so that another of either is noticed."""
    adapters = {
        (*module.active_adapters, "off" * module.disable_adapters, "merged" * module.merged)
        for module in model.modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }
    return {
        "text": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        "model": fingerprint(model),
        "dtype": str(model.dtype),
        "adapters": sorted(adapters),
        "interventions": provenance(model),
        "edited": model.edited_hooks,
    }


def _bar(plan: list[Window], done: WindowLog, progress: bool) -> Any:
    total = sum(each.scored for each in plan)
    start = sum(each.scored for each in plan[: len(done.nats)])
    # The delay keeps the bar away from texts that are over before anyone could read it.
    return progress_bar(total, progress, initial=start, unit="token", desc="Perplexity", delay=1)
