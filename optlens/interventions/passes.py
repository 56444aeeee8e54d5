"""Where the tokens of one forward pass stand, and which of them an intervention means.

Positions count each prompt's real tokens from the start of the whole sequence, whatever padding
there is and however many of them came in earlier passes, through the cache of keys and values. A
pass computes the last `n_query` columns of `n_key`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optlens import checks
from optlens.inputs import Inputs
from optlens.interventions.address import Occurrence, Place, items_of
from optlens.selection import show
from optlens.tokenizer import OPTTokenizer

Spans = Mapping[str, Any]


@dataclass
class Chosen:
    """Which columns a choice of positions means in one pass.

    Attributes:
        slots: For each column its number within the choice, -1 if it is not chosen,
            `[batch, column]` on the CPU. For the choice of all, the column's own number.
        count: How many positions are chosen, at most, of any prompt of this pass.
        is_all: Whether every column is chosen.
    """

    slots: Tensor
    count: int
    is_all: bool = False

    @cached_property
    def is_none(self) -> bool:
        """Whether no column is chosen."""
        return not self.is_all and not bool((self.slots >= 0).any())


@dataclass(eq=False)
class Pass:
    """One forward pass, as far as addresses are concerned.

    Attributes:
        real: True at real tokens, `[batch, n_key]` on the CPU.
        n_query: How many of the columns, the last, this pass computes.
        tokens: Their ids, `[batch, n_query]`; None where it starts from something else.
        prompt: The pass in which this sequence began; None if nobody saw it.
        may_go_on: Whether more tokens may follow this pass.
        tokenizer: For positions given as a token's text.
        spans: For positions given by name.
    """

    real: Tensor
    n_query: int
    tokens: Tensor | None
    prompt: Pass | None = None
    may_go_on: bool = False
    tokenizer: OPTTokenizer | None = None
    spans: Spans = field(default_factory=dict)

    def __post_init__(self) -> None:
        """See whether the sequence begins here."""
        self.batch, self.n_key = self.real.shape
        if self.is_first:
            self.prompt = self

    @classmethod
    def of_inputs(cls, inputs: Inputs, prompt: Pass | None, **names: Any) -> Pass:
        """Describe the pass that the model is about to make."""
        mask = inputs.mask
        padding = None if mask.padding is None else checks.on_host(mask.padding)
        real = torch.ones(mask.batch, mask.n_key, dtype=torch.bool) if padding is None else padding
        going_on = inputs.cache is not None
        return cls(real, mask.n_query, inputs.tokens, prompt, going_on, **names)

    @property
    def is_first(self) -> bool:
        """Whether the sequence begins with this pass."""
        return self.n_query == self.n_key

    @cached_property
    def padded(self) -> bool:
        """Whether any column is padding."""
        return not bool(self.real.all())

    @cached_property
    def positions(self) -> Tensor:
        """Each column's position, `[batch, n_key]`, -1 for padding."""
        real = self.real.long()
        return real.cumsum(-1) * real - 1

    @cached_property
    def lengths(self) -> Tensor:
        """How many real tokens each prompt has so far, `[batch]`."""
        return self.real.sum(-1)

    @cached_property
    def visible(self) -> Tensor:
        """True where a query may see a key, `[batch, 1, n_query, n_key]`."""
        columns = torch.arange(self.n_key)
        causal = columns <= columns[self.n_key - self.n_query :, None]
        return (causal & self.real[:, None]).unsqueeze(1)

    # ------------------------------------------------------------------------ which columns

    def choose(self, place: Place, name: str) -> Chosen:
        """Find the columns that a choice of positions means.

        Args:
            place: The choice.
            name: "pos", "query" or "key", for errors; "key" chooses among all columns, the others
                among those of this pass.

        Raises:
            InputError: If a position does not exist in the prompt, a token occurs in it never or
                several times, or a name is unknown.
        """
        n_columns = self.n_key if name == "key" else self.n_query
        if place is None:
            columns = torch.arange(self.n_key).expand(self.batch, -1)
            slots = columns.masked_fill(~self.real, -1)[:, self.n_key - n_columns :]
            return Chosen(slots, self.n_key, is_all=not self.padded)
        wanted = self._sliced(place) if isinstance(place, slice) else self._listed(place, name)
        # one column more than there are positions takes what is not there (yet)
        nowhere = self.n_key
        wanted = wanted.masked_fill((wanted < 0) | (wanted >= nowhere), nowhere)
        table = torch.full((self.batch, self.n_key + 1), -1)
        table.scatter_(1, wanted, torch.arange(wanted.shape[1]).expand(self.batch, -1))
        table[:, nowhere] = -1
        positions = self.positions[:, self.n_key - n_columns :]
        slots = table.gather(1, positions.masked_fill(positions < 0, nowhere))
        chosen = Chosen(slots, wanted.shape[1])
        if self.is_first and not self.may_go_on and chosen.is_none:
            raise checks.InputError(
                f"{name}={show(place)} chooses none of the prompt's {int(self.lengths.max())} tokens."
            )
        return chosen

    def is_single(self, place: Place) -> bool:
        """Say whether a choice is one position, so that values need no axis for it."""
        if isinstance(place, str) and place in self.spans:
            return self._span(place).ndim == 1
        return isinstance(place, int | str | Occurrence)

    def _sliced(self, place: slice) -> Tensor:
        """Return the positions that a slice means for each prompt, filled up with -1."""
        rows = [torch.arange(n)[_range_index(place, n)] for n in self.lengths.tolist()]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def _listed(self, place: Place, name: str) -> Tensor:
        """Return the positions that numbers, tokens and names mean, `[batch, n]`; -1 for none."""
        found = []
        for item in items_of(place):
            if isinstance(item, int):
                found.append(self._numbered(item, name)[:, None])
            elif isinstance(item, str) and item in self.spans:
                span = self._span(item)
                found.append(self.for_batch(span if span.ndim == 2 else span[:, None]))
            else:
                found.append(self.for_batch(self._found(item, name))[:, None])
        return torch.cat(found, dim=1)

    def _numbered(self, number: int, name: str) -> Tensor:
        positions = torch.full((self.batch,), number) + (self.lengths if number < 0 else 0)
        if self.is_first:
            wrong = ((positions < 0) | (positions >= self.lengths)).nonzero().flatten().tolist()
            if wrong:
                length = int(self.lengths[wrong[0]])
                which = f"prompt {wrong[0]}" if self.batch > 1 else "the prompt"
                raise checks.InputError(
                    f"{name} asks for position {number}, but {which} has {length} tokens: 0 to "
                    f"{length - 1}, or -1 to -{length} from the end. For a token that is yet to "
                    f"come, give a slice: {name}=slice({number}, {number + 1})."
                )
        return positions

    # ------------------------------------------------------------------- tokens and spans

    def started(self, asked: str) -> Pass:
        """Return the pass in which this sequence began.

        Args:
            asked: What needs it, for the error.

        Raises:
            InputError: If nobody saw that pass.
        """
        if self.prompt is None:
            raise checks.InputError(
                f"{asked} is looked up in the prompt, but this run continues tokens that were run "
                "before the intervention began; run the prompt inside it too, or give numbers."
            )
        return self.prompt

    def for_batch(self, rows: Tensor) -> Tensor:
        """Give each row of this pass its prompt's entry; beams may have multiplied the rows."""
        if self.batch % rows.shape[0]:
            raise checks.InputError(
                f"The prompt had {rows.shape[0]} rows, but this pass has {self.batch}."
            )
        return rows.repeat_interleave(self.batch // rows.shape[0], dim=0)

    def _found(self, item: str | Occurrence, name: str) -> Tensor:
        """Return where a token stands in each prompt, `[prompt]`."""
        text, nth = item if isinstance(item, Occurrence) else (item, None)
        prompt = self.started(f"{name}={show(item)}")
        if prompt.tokens is None or self.tokenizer is None:
            lack = "token ids" if prompt.tokens is None else "model.tokenizer"
            raise checks.InputError(
                f"{name}={show(item)} needs {lack} to look it up; give numbers."
            )
        try:
            token = self.tokenizer.single_token(text)
        except checks.InputError as error:
            names = f" Spans have the names {', '.join(self.spans)}." if self.spans else ""
            raise checks.InputError(f"{name}={show(item)}: {error}{names}") from error
        hits = (prompt.tokens.cpu() == token) & prompt.real
        found = []
        for row in range(prompt.batch):
            places = prompt.positions[row, hits[row]].tolist()
            if not places or (nth is None and len(places) > 1):
                raise checks.InputError(self._not_once(prompt, row, text, places, name))
            if nth is not None and not -len(places) <= nth < len(places):
                raise checks.InputError(
                    f"{name}={show(item)}: {text!r} occurs {len(places)} times in prompt {row}, at "
                    f"positions {places}; count from 0."
                )
            found.append(places[nth or 0])
        return torch.tensor(found)

    def _not_once(self, prompt: Pass, row: int, text: str, places: list[int], name: str) -> str:
        if places:
            return (
                f"{name}={text!r} occurs {len(places)} times in prompt {row}, at positions "
                f"{places}; say which, counting from 0: {name}=({text!r}, 0)."
            )
        texts = self.tokenizer.to_str_tokens(prompt.tokens[row].cpu()[prompt.real[row]])
        other = text[1:] if text.startswith(" ") else f" {text}"
        hint = f" {other!r} does." if other in texts else ""
        shown = repr(texts[:40])[:-1] + (", ...]" if len(texts) > 40 else "]")
        return f"{name}={text!r} does not occur in prompt {row}:{hint} its tokens are {shown}"

    def _span(self, name: str) -> Tensor:
        """Return the positions of a named span: `[prompt]`, or `[prompt, n]` filled up with -1."""
        entry, prompt = self.spans[name], self.started(f"The span {name!r}")
        entry = entry.tolist() if hasattr(entry, "tolist") else entry
        if _is_number(entry) or isinstance(entry, range):
            entry = [entry] * prompt.batch
        if len(entry) != prompt.batch:
            raise checks.InputError(
                f"The span {name!r} has {len(entry)} entries for {prompt.batch} prompts; give one "
                "entry for each: a position, or a list of positions. Several positions of all "
                "prompts are a range."
            )
        rows = []
        for row, given in enumerate(entry):
            length = int(prompt.lengths[row])
            numbers = [operator.index(p) for p in ([given] if _is_number(given) else given)]
            if any(not -length <= p < length for p in numbers):
                raise checks.InputError(
                    f"The span {name!r} has positions {numbers} in prompt {row}, which has "
                    f"{length} tokens."
                )
            rows.append(torch.tensor([p % length for p in numbers], dtype=torch.long))
        if all(map(_is_number, entry)):
            return torch.cat(rows)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _is_number(given: Any) -> bool:
    return hasattr(given, "__index__")


def _range_index(place: slice, length: int) -> Tensor:
    return torch.tensor(list(range(*place.indices(length))), dtype=torch.long)
