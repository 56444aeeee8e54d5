"""Text of any length as windows of tokens: what neurons are watched on.

A text is read, tokenised and cut into windows of one size as it is needed, so that a file may be longer than
memory. Every window is a run of its own that begins with `</s>`, as OPT was trained; documents are never mixed
in one window. That `</s>` is the same in all windows, so it is run but not counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from optlens import checks
from optlens.files import type_of
from optlens.names import get_act_name
from optlens.progress import progress_bar
from optlens.selection import Selection, select

if TYPE_CHECKING:
    from optlens.hooks import HookPoint
    from optlens.model import OPTForCausalLM

# Text as it is; a file, by its path or open; documents; token ids, `[pos]` or one document a row.
Text = str | os.PathLike | TextIO | Iterable[str] | Tensor

PIECE = 65_536  # characters that are tokenised at once
LONGEST_WORD = 1_000_000  # characters without a blank, after which a text is cut anywhere
WINDOW = 128
BATCH = 8


@dataclass(frozen=True)
class Batch:
    """Windows that are run together, filled up on the right to one length.

    Attributes:
        tokens: Token ids, `[batch, pos]`.
        counted: True at tokens that count: no filling, no `</s>` at the start, `[batch, pos]`.
        lengths: How many tokens of each window are real, `[batch]`.
        documents: Which document each window is of, `[batch]`.
        starts: The place in that document of the token at position 0, `[batch]`; one less than
            that of the first own token where `</s>` was put in front.
    """

    tokens: Tensor
    counted: Tensor
    lengths: Tensor
    documents: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Reading:
    """How a text is cut and run; the options that all functions of `optlens.neurons` share."""

    window: int
    batch_size: int
    prepend_bos: bool
    progress: bool


def reading(
    model: OPTForCausalLM, window: int | None, batch_size: int, prepend_bos: bool, progress: bool
) -> Reading:
    """Check the options of reading a text, and fill in the window.

    Raises:
        InputError: If the window does not fit the model, or nothing would be run.
    """
    n_ctx = model.config.n_ctx
    window = min(WINDOW, n_ctx) if window is None else window
    if not 2 <= window <= n_ctx:
        raise checks.InputError(
            f"window={window} does not fit: this model reads 2 to {n_ctx} tokens at once."
        )
    if batch_size < 1:
        raise checks.InputError(f"batch_size must be at least 1, got {batch_size}.")
    return Reading(window, batch_size, prepend_bos, progress)


def choose(
    model: OPTForCausalLM, layers: Selection, neurons: Selection
) -> tuple[list[int], list[int]]:
    """Return the numbers of the chosen layers and neurons, none of them twice."""
    chosen = select(layers, model.config.n_layers, "layers")
    which = select(neurons, model.config.d_mlp, "neurons")
    return list(dict.fromkeys(chosen)), list(dict.fromkeys(which))


def watch(
    model: OPTForCausalLM,
    text: Text,
    layers: list[int],
    neurons: list[int],
    how: Reading,
    see: Callable[[int, Tensor, Batch], None],
) -> int:
    """Run a model over a text and show the activations of neurons, a batch of windows at a time.

    The blocks behind the last chosen layer are not run. Nothing is kept here, so memory does not
    grow with the text.

    Args:
        model: The model; hooks and interventions attached to it act.
        text: What to read.
        layers: Which blocks.
        neurons: Which neurons of each.
        how: How to cut the text, from `reading`.
        see: Called as `see(row, activations, batch)`: the layer's index in `layers`, the chosen
            neurons' activations `[batch, pos, neuron]` in float32, and the batch.

    Returns:
        How many tokens were counted.

    Raises:
        InputError: If the text is empty or is none.
        NonFiniteError: If activations become NaN or infinite.
    """
    names = {get_act_name("mlp_post", layer): row for row, layer in enumerate(layers)}
    everything = neurons == list(range(model.config.d_mlp))
    chosen = torch.tensor(neurons, device=model.device)
    sums: dict[int, Tensor] = {}
    batch: Batch

    def show(value: Tensor, hook: HookPoint) -> None:
        value = value if everything else value.index_select(-1, chosen.to(value.device))
        value = value.to(model.device, torch.float32)  # a divided model's blocks are elsewhere
        if value.device.type != "cpu":  # on the CPU the model itself watches
            sums[hook.layer()] = value.sum()
        see(names[hook.name], value, batch)

    counted = 0
    run = {"use_cache": False, "stop_at_layer": max(layers) + 1}
    bar = progress_bar(None, how.progress, unit="token", leave=False)
    points = model.match_hooks(list(names))
    with bar, torch.no_grad(), model.in_eval_mode(), model.recorders(points, show):
        for batch in batches(model, text, how):
            model(batch.tokens, **run)
            if sums:
                checks.finite_layers(list(sums.values()), [f"block {layer}" for layer in sums])
            new = int(batch.counted.sum())
            counted += new
            bar.update(new)
    if counted == 0:
        raise checks.InputError(
            "The text has no tokens to count; give one that is longer than its `</s>`."
        )
    return counted


def batches(model: OPTForCausalLM, text: Text, how: Reading) -> Iterator[Batch]:
    """Cut a text into windows and put them together, in their order."""
    bos = _bos(model)
    cut = _windows(model, text, how, bos)
    while group := list(islice(cut, how.batch_size)):
        ids, documents, starts = zip(*group, strict=True)
        lengths = torch.tensor([len(row) for row in ids])
        filled = torch.full((len(ids), int(lengths.max())), ids[0][0])
        for row, own in zip(filled, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        # a causal model's real tokens never see what follows them, so filling needs no mask
        counted = torch.arange(filled.shape[1]) < lengths[:, None]
        if bos is not None:
            counted[:, 0] &= filled[:, 0] != bos
        parts = (filled, counted, lengths, torch.tensor(documents), torch.tensor(starts))
        yield Batch(*(part.to(model.device) for part in parts))


def _windows(
    model: OPTForCausalLM, text: Text, how: Reading, bos: int | None
) -> Iterator[tuple[list[int], int, int]]:
    """Cut documents into windows: ids, the document's number, the place of position 0 in it."""
    has_bos = model.tokenizer is None or model.tokenizer.add_bos_token
    put = bos if how.prepend_bos and has_bos else None
    for number, document in enumerate(_documents(model, text)):
        ids, place = iter(document), 0
        while own := list(islice(ids, how.window - 1)):
            if put is None or own[0] == put:
                own += islice(ids, 1)
                yield own, number, place
            else:
                yield [put, *own], number, place - 1
            place += len(own)


def _bos(model: OPTForCausalLM) -> int | None:
    tokenizer = model.tokenizer
    return model.config.bos_token_id if tokenizer is None else tokenizer.bos_token_id


def _documents(model: OPTForCausalLM, text: Text) -> Iterator[Iterable[int]]:
    """Yield the token ids of each document, themselves made as they are asked for."""
    if isinstance(text, Tensor):
        rows = text if text.ndim == 2 else text[None]
        checks.token_ids(rows, model.config.vocab_size)
        yield from (row.tolist() for row in rows)
    elif isinstance(text, str):
        yield _encoded(model, StringIO(text))
    elif isinstance(text, os.PathLike):
        with open(text, encoding="utf-8") as file:
            yield _encoded(model, file, f"{os.fspath(text)} is not UTF-8 text")
    elif hasattr(text, "read"):
        yield _encoded(model, text)
    elif isinstance(text, Iterable):
        for number, document in enumerate(text):
            if not isinstance(document, str):
                raise TypeError(
                    f"Document {number} is {type_of(document)}, expected text; put token ids in a "
                    "tensor, torch.tensor(...)."
                )
            yield _encoded(model, StringIO(document))
    else:
        raise TypeError(
            f"Expected text, documents, a file or a tensor of token ids, got {type_of(text)}."
        )


def _encoded(
    model: OPTForCausalLM, file: TextIO, damage: str = "The file is not UTF-8 text"
) -> Iterator[int]:
    """Tokenise a file piece by piece; the ids are those of the whole text."""
    try:
        for piece in _pieces(file.read):
            yield from model.to_tokens(piece, prepend_bos=False)[0].tolist()
    except UnicodeDecodeError as error:
        raise checks.InputError(
            f"{damage}: {error.reason} at byte {error.start}. Open it with its own encoding, "
            'open(path, encoding="latin-1"), and pass the open file.'
        ) from error


def _pieces(read: Callable[[int], str]) -> Iterator[str]:
    """Cut a text between a word and the blank behind it, where no token ever lies across."""
    rest = ""
    while new := read(PIECE):
        rest += new
        cut = _last_break(rest)
        if cut == 0 and len(rest) >= LONGEST_WORD:
            cut = len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_break(text: str) -> int:
    """Return the last place where a blank follows something else; 0 if there is none.

    Example:
        >>> _last_break("one two  three")
        7
    """
    for place in range(len(text) - 1, 0, -1):
        if text[place] in " \n" and not text[place - 1].isspace():
            return place
    return 0
