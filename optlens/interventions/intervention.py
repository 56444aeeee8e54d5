"""What all kinds of interventions share: one form for each field, comparing and printing by value."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optlens import checks
from optlens.interventions.address import (
    Address,
    as_index,
    as_place,
    encode,
    site_named,
)
from optlens.interventions.held import HeldRun
from optlens.selection import show

Prompts = tuple[str, ...] | Tensor
# Field names, by what they hold.
_INDICES = ("layer", "layers", "head", "heads", "neuron")
PROMPTS, _PLACES = ("reference", "source"), ("pos", "query", "key")


class Intervention:
    """The common part of all kinds: they compare by value and print what was given."""

    def __post_init__(self) -> None:
        """Bring every field to one form, and refuse what no model could do."""
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if field.name in _INDICES:
                self._set(field.name, as_index(given, field.name))
            elif field.name in _PLACES:
                self._set(field.name, as_place(given, field.name))
            elif field.name == "site":
                self._set(field.name, site_named(given))
        self._check()
        _ = self.address  # an address that its site does not have raises

    def _check(self) -> None:
        """Check the fields that only this kind has."""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def address(self) -> Address:
        """Where it acts."""
        return Address(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Address)})

    def __eq__(self, other: object) -> bool:
        """Say whether the other does the same: equal kind, address, numbers and tensors."""
        if type(self) is not type(other):
            return NotImplemented
        ours, theirs = (
            [getattr(each, field.name) for field in dataclasses.fields(self)]
            for each in (self, other)
        )
        return all(map(_equal, ours, theirs))

    def __hash__(self) -> int:
        """Hash what is cheap to hash; equal interventions have equal hashes."""
        plain = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return hash((type(self), *(v for v in plain if isinstance(v, str | int | float))))

    def __repr__(self) -> str:
        """Write the call that makes it, tensors by their shape."""
        parts = []
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if field.name == "site" and self._site_comes_first:
                parts.append(repr(given))
            elif field.name in PROMPTS and given is not None:
                parts.append(f"{field.name}={_shown_run(given)}")
            elif not _equal(given, field.default):
                parts.append(f"{field.name}={_shown(given)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def _site_comes_first(self) -> bool:
        return dataclasses.fields(self)[0].name == "site"


def as_prompts(given: str | Sequence[str] | Tensor | None, name: str) -> Prompts | None:
    """Bring prompts to one form: a tuple of texts, or token ids `[batch, pos]`."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        checks.token_ids(given if given.ndim == 2 else given[None], vocab_size=2**62)
        return given if given.ndim == 2 else given[None]
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) for t in texts):
        raise checks.InputError(
            f"{name} takes a text, a list of texts or a tensor of token ids, got "
            f"{type(given).__name__}{' that is empty' if not texts else ''}."
        )
    return tuple(texts)


def check_numbers(intervention: Intervention, name: str, infinite: bool = False) -> None:
    """Check that a field is a number or a tensor of numbers, without NaN."""
    given, kind = getattr(intervention, name), type(intervention).__name__
    if isinstance(given, Tensor):
        if given.dtype == torch.bool or given.is_complex():
            raise checks.InputError(f"{name} of {kind} must hold numbers, got {given.dtype}.")
        values = checks.on_host(given)
        if values is None:
            return
        spoilt = values.isnan().any() if infinite else not values.isfinite().all()
    elif isinstance(given, numbers.Real) and not isinstance(given, bool):
        given = given if type(given) in (int, float) else float(given)
        intervention._set(name, given)
        spoilt = math.isnan(given) if infinite else not math.isfinite(given)
    else:
        raise checks.InputError(
            f"{name} of {kind} must be a number or a tensor, got {type(given).__name__}."
        )
    if spoilt:
        raise checks.InputError(f"{name} of {kind} has NaN or infinity in it: {_shown(given)}.")


def _equal(a: Any, b: Any) -> bool:
    """Compare field values; tensors by dtype, shape and numbers, NaN being equal to NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = a.detach().cpu(), b.detach().cpu()
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if isinstance(a, HeldRun) and isinstance(b, HeldRun):
        names = a.values.keys() == b.values.keys()
        return names and _equal(a.real, b.real) and all(
            _equal(value, b.values[name]) for name, value in a.values.items()
        )  # fmt: skip
    return type(a) is type(b) and encode(a) == encode(b) if isinstance(a, tuple) else a == b


def _shown(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"tensor{list(given.shape)} {str(given.dtype).removeprefix('torch.')}"
    return show(given)


def _shown_run(given: Prompts | HeldRun) -> str:
    if isinstance(given, HeldRun):
        return repr(given)
    return f"<{len(given)} prompt{'s' * (len(given) > 1)}>"
