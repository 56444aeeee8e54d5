"""Where an intervention acts: a site, and which of its layers, heads, neurons and positions.

An address is plain data, checked as far as that goes without a model: whether there is such a site
and whether it has the axis that is addressed. What needs a model (how many heads are there?) is
checked when the address meets one, what needs a prompt (where is " John"?) when it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from optlens import checks
from optlens.config import OPTConfig
from optlens.names import get_act_name
from optlens.selection import select, show


class Occurrence(NamedTuple):
    """The n-th place of a token in its prompt, written `(" John", 1)`; counted from 0."""

    text: str
    nth: int

    def __repr__(self) -> str:
        """Write it as a user would."""
        return f"({self.text!r}, {self.nth})"


# What `as_index` and `as_place` return; users may also give ranges, lists, arrays and tensors.
Index = int | tuple[int, ...] | slice | None
Place = int | str | Occurrence | tuple[int | str | Occurrence, ...] | slice | None

# ----------------------------------------------------------------------------------- the sites

STREAM, HEADS = ("pos", "d_model"), ("pos", "head", "d_head")
NEURONS, EDGES = ("pos", "neuron"), ("head", "query", "key")
# Site to the axes of its value after the batch axis.
SITES: dict[str, tuple[str, ...]] = {
    "embed": STREAM,
    "resid_pre": STREAM,
    "q": HEADS,
    "k": HEADS,
    "v": HEADS,
    "attn_scores": EDGES,
    "pattern": EDGES,
    "z": HEADS,
    "result": ("pos", "head", "d_model"),
    "attn_out": STREAM,
    "resid_mid": STREAM,
    "mlp_pre": NEURONS,
    "mlp_post": NEURONS,
    "mlp_out": STREAM,
    "resid_post": STREAM,
}
OTHER_SPELLINGS = {"pre": "mlp_pre", "post": "mlp_post", "scores": "attn_scores"}


def site_named(name: str) -> str:
    """Return the name under which `SITES` has a site.

    Raises:
        InputError: If there is no such site, listing those that there are.
    """
    site = OTHER_SPELLINGS.get(name, name) if isinstance(name, str) else name
    if site not in SITES:
        raise checks.InputError(f"There is no site {name!r}; there are {', '.join(SITES)}.")
    return site


@dataclass(frozen=True)
class Address:
    """A place in the network; every part but the site may be left open, for all there are.

    Attributes:
        site: One of `SITES`.
        layer: Which blocks.
        pos: Which positions, counted over each prompt's real tokens.
        head: Which heads, where the site has heads.
        neuron: Which neurons, at "mlp_pre" and "mlp_post".
        query: Which querying positions, at "pattern" and "attn_scores".
        key: Which positions they look at, likewise.
    """

    site: str
    layer: Index = None
    pos: Place = None
    head: Index = None
    neuron: Index = None
    query: Place = None
    key: Place = None

    def __post_init__(self) -> None:
        """Refuse an axis that the site does not have."""
        if self.site == "embed" and self.layer is not None:
            raise checks.InputError(
                f"'embed' lies before the blocks and has no layer, got layer={show(self.layer)}; "
                "leave layer out, or take site 'resid_pre'."
            )
        for axis in ("pos", "head", "neuron", "query", "key"):
            given = getattr(self, axis)
            if given is not None and axis not in SITES[self.site]:
                raise checks.InputError(self._lacks(axis, given))

    def _lacks(self, axis: str, given: Any) -> str:
        text = f"Site {self.site!r} has no axis {axis!r}, got {axis}={show(given)}. "
        if axis == "pos":
            return text + "Its positions are query= (who looks) and key= (at whom)."
        if axis in ("query", "key") and "pos" in SITES[self.site]:
            return text + "Its positions are pos=."
        others = [site for site, axes in SITES.items() if axis in axes]
        return text + f"Sites that have it: {', '.join(others)}."

    def hooks(self, config: OPTConfig) -> list[str]:
        """Return the names of the hooks that this address means in a model.

        Raises:
            InputError: If the model has no such layer.
        """
        if self.site == "embed":
            return [get_act_name("embed")]
        layers = select(self.layer, config.n_layers, "layer")
        return [get_act_name(self.site, layer) for layer in layers]

    def chosen(self, config: OPTConfig) -> tuple[int, list[int]] | None:
        """Return which axis of the value is narrowed to which indices; None for none.

        Only heads and neurons: positions depend on the prompt. The axis counts the batch axis.

        Raises:
            InputError: If the model has no such head or neuron.
        """
        for axis, size in (("head", config.n_heads), ("neuron", config.d_mlp)):
            if getattr(self, axis) is not None:
                indices = select(getattr(self, axis), size, axis)
                return 1 + SITES[self.site].index(axis), indices
        return None


# -------------------------------------------------------------------------- numbers and places


def as_index(given: Any, name: str) -> Index:
    """Bring a choice of layers, heads or neurons to one form: a number, a tuple, a slice or None.

    Raises:
        InputError: If it is nothing of the kind, or chooses nothing.
    """
    return _normalised(given, name, texts=False)


def as_place(given: Any, name: str) -> Place:
    """Bring a choice of positions to one form; numbers, tokens as text, `(" John", 1)`, slices.

    Raises:
        InputError: If it is nothing of the kind, or chooses nothing.
    """
    return _normalised(given, name, texts=True)


def _normalised(given: Any, name: str, texts: bool) -> Any:
    if given is None:
        return None
    if isinstance(given, slice):
        parts = (given.start, given.stop, given.step)
        if given.step == 0:
            raise checks.InputError(f"{name}={given!r} has a step of 0.")
        return slice(*(None if part is None else operator.index(part) for part in parts))
    given = given.tolist() if hasattr(given, "tolist") else given  # tensors, arrays
    one = _one(given, texts)
    if one is not None:
        return one
    items = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else None
    if items == ():
        raise checks.InputError(f"{name}={given!r} chooses nothing; leave it out for all.")
    chosen = tuple(_one(item, texts) for item in items or (None,))
    if None in chosen:
        kinds = "a whole number, several (list, range), a slice, or None for all"
        more = (
            ", a token's text such as ' John', (' John', 1) for its second place" if texts else ""
        )
        raise checks.InputError(f"{name}={given!r} is not one of: {kinds}{more}.")
    return chosen


def _one(item: Any, texts: bool) -> int | str | Occurrence | None:
    """Return a single number or text in its own form, None for anything else."""
    if isinstance(item, str):
        return item if texts else None
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        nth = _one(item[1], texts=False)  # a list [" John", 1] is two positions
        return Occurrence(item[0], nth) if texts and nth is not None else None
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        return None
    return operator.index(item)


def items_of(chosen: Any) -> tuple:
    """Return the single numbers or texts of a choice that is neither a slice nor None."""
    several = isinstance(chosen, tuple) and not isinstance(chosen, Occurrence)
    return chosen if several else (chosen,)


def encode(chosen: Any) -> Any:
    """Write a choice as JSON."""
    if isinstance(chosen, Occurrence):
        return {"token": chosen.text, "nth": chosen.nth}
    if isinstance(chosen, slice):
        return {"slice": [chosen.start, chosen.stop, chosen.step]}
    return list(map(encode, chosen)) if isinstance(chosen, tuple) else chosen


def decode(written: Any) -> Any:
    """Read what `encode` has written."""
    if isinstance(written, dict):
        if "slice" in written:
            return slice(*written["slice"])
        return Occurrence(written["token"], written["nth"])
    return list(map(decode, written)) if isinstance(written, list) else written
