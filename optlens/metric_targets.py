"""What a metric reads of a run: at which columns of the batch, and which tokens of the vocabulary.

A metric is written without any prompt in mind, as "the logit of ' Mary' at the last token". Here that
becomes numbers for one batch: columns (prompts may be padded) and token ids.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks

if TYPE_CHECKING:
    from optlens.base import OPTBase

# " Mary" or 6001 for all prompts; one for each prompt; or for each prompt several acceptable ones.
Answer = str | int | Sequence[str | int | Sequence[str | int]] | Tensor
FrozenAnswer = str | int | tuple

# The target of a column that only fills up a row.
NO_TARGET = -100


def freeze(answer: Answer, what: str, depth: int = 0) -> FrozenAnswer:
    """Return an answer as strings, ints and tuples of them, which can be compared and printed.

    Args:
        answer: As the user gave it.
        what: What to call it in an error, e.g. "logit_diff: answer".
        depth: How many lists it is inside of.

    Raises:
        InputError: If it is of no such form.
    """
    if hasattr(answer, "tolist"):  # a tensor, an array, or one number of them
        answer = answer.tolist()
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list | tuple) and depth < 2:
        if not answer:
            raise checks.InputError(f"{what} is an empty list; give at least one token.")
        return tuple(freeze(item, what, depth + 1) for item in answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return operator.index(answer)
    raise checks.InputError(
        f"{what} must be a token's text such as ' Mary', a token id, a list of these with one for "
        "each prompt, a list of such lists where several tokens are acceptable, or a tensor of ids "
        f"[prompts] or [prompts, k]; got {answer!r}."
    )


def answer_ids(
    answer: FrozenAnswer, what: str, model: OPTBase, n_prompts: int
) -> list[tuple[int, ...]]:
    """Return the ids of the acceptable tokens of each prompt.

    Raises:
        InputError: If there are not as many as prompts, a text is not one token (its pieces are
            shown), an id is out of range, or a token is given twice for one prompt.
    """
    if not isinstance(answer, tuple):
        return [(_token_id(answer, what, model),)] * n_prompts
    if len(answer) != n_prompts:
        raise checks.InputError(
            f"{what} has {len(answer)} entries, but there are {n_prompts} prompts. Give one token "
            "for all prompts, or one for each; where several are acceptable for one prompt, put "
            "them in a list of their own: [[' Mary', ' Jane']] is for one prompt."
        )
    rows = []
    for number, item in enumerate(answer):
        place = f"{what} of prompt {number}"
        row = tuple(
            _token_id(token, place, model)
            for token in (item if isinstance(item, tuple) else (item,))
        )
        twice = [token for token in row if row.count(token) > 1]
        if twice:
            raise checks.InputError(
                f"{place} has token id {twice[0]} twice; it would count double. Give it once."
            )
        rows.append(row)
    return rows


def _token_id(token: str | int, what: str, model: OPTBase) -> int:
    if isinstance(token, str):
        try:
            return model.to_single_token(token)
        except checks.InputError as error:
            raise checks.InputError(f"{what}: {error}") from error
    if not 0 <= token < model.config.vocab_size:
        raise checks.InputError(
            f"{what}: token id {token} is out of range; this model has ids 0 to "
            f"{model.config.vocab_size - 1}."
        )
    return token


def as_answer(model: OPTBase, token: int) -> str | int:
    """Return a token as a legible answer: its text.

    Its id where there is no tokenizer, or where the text alone would be read as something else.
    """
    if model.tokenizer is None:
        return token
    text = model.tokenizer.decode(token)
    return text if model.tokenizer.encode(text, prepend_bos=False) == [token] else token


def check_disjoint(
    right: list[tuple[int, ...]], wrong: list[tuple[int, ...]], name: str, model: OPTBase
) -> None:
    """Check that no token is both answer and wrong answer of a prompt.

    Raises:
        InputError: Naming prompt and token; the difference would leave it out in silence.
    """
    for number, (these, those) in enumerate(zip(right, wrong, strict=True)):
        both = sorted(set(these) & set(those))
        if both:
            text = "" if model.tokenizer is None else f" ({model.tokenizer.decode(both[0])!r})"
            raise checks.InputError(
                f"{name}: token id {both[0]}{text} is both answer and wrong answer of prompt "
                f"{number}, so it cancels out."
            )


def padded_ids(rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Return rows of ids as one tensor `[prompts, k]`, and which entries are real, `[prompts, k]`.

    A shorter row is filled up with its own first id.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows])
    valid = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    return ids, valid


def columns_at(real: Tensor, pos: int) -> Tensor:
    """Return the column of each prompt's token number `pos`, `[prompts, 1]`.

    Args:
        real: True at real tokens, `[prompts, pos]`.
        pos: Counted over the real tokens of each prompt, from the end if negative.

    Raises:
        InputError: If a prompt has no such token.
    """
    found = []
    for number, row in enumerate(real):
        columns = row.nonzero()[:, 0]
        if not -len(columns) <= pos < len(columns):
            raise checks.InputError(
                f"pos={pos} is out of range for prompt {number}, which has {len(columns)} tokens, "
                f"the first included: 0 to {len(columns) - 1}, or -{len(columns)} to -1."
            )
        found.append(columns[pos])
    return torch.stack(found)[:, None]


def next_token_columns(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns that have a real token after them, and that token.

    Args:
        tokens: `[prompts, pos]`.
        real: True at real tokens, `[prompts, pos]`.

    Returns:
        Columns and target ids, both `[prompts, n]` with n that of the longest prompt. Shorter rows
        are filled up: some column, and the target `NO_TARGET`.

    Raises:
        InputError: If a prompt has one token only.
    """
    pairs = [row.nonzero()[:, 0] for row in real[:, :-1] & real[:, 1:]]
    for number, columns in enumerate(pairs):
        if not len(columns):
            raise checks.InputError(
                f"cross_entropy needs a next token to predict, but prompt {number} has one token "
                "only, the first included."
            )
    columns = torch.zeros(len(pairs), max(map(len, pairs)), dtype=torch.long)
    targets = torch.full_like(columns, NO_TARGET)
    for number, own in enumerate(pairs):
        columns[number, : len(own)] = own
        columns[number, len(own) :] = own[-1]
        targets[number, : len(own)] = tokens[number, own + 1]
    return columns, targets


def shown(answer: Any) -> str:
    """Return an answer as a metric's `repr` shows it: a long list by its beginning."""
    if isinstance(answer, tuple):
        parts = [shown(item) for item in answer[:4]]
        if len(answer) > 4:
            parts.append(f"... {len(answer)} in all")
        return "[" + ", ".join(parts) + "]"
    return repr(answer)
