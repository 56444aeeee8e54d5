"""What is selected, shared by all views that are linked: prompt, layer, head, neuron, positions, token.

A `Selection` is a widget model without a picture of its own. Views refer to it, so a click in one is
seen by the others in the browser itself, without waiting for Python, and Python hears of it once.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import traitlets
from ipywidgets import Widget

if TYPE_CHECKING:
    from optlens.recording import Recording

PLACES = ("prompt", "layer", "head", "query", "key", "token", "neuron")


class Selection(Widget):
    """Hold one selected place; views that are given the same one are linked.

    Attributes:
        value: `{"prompt", "layer", "head", "query", "key", "token", "neuron"}`: numbers, None where
            nothing is chosen; "layer" is "embed" for the row before the first layer. "query" and
            "key" are positions in the prompt, "token" is an id of the vocabulary, "neuron" one of
            the MLP. Setting some of them leaves the others as they are. A view that has no such
            place keeps showing what it showed.

    Example:
        >>> selection = Selection(value={"layer": 3})
        >>> selection.value = {"head": 1}
        >>> print(selection)
        Selection(prompt=0, layer=3, head=1)
    """

    value = traitlets.Dict().tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        self._last = self.nothing()
        super().__init__(**{"value": self._last} | traits)

    @staticmethod
    def nothing() -> dict[str, Any]:
        """Return the selection of the first prompt, and nothing in it."""
        return dict.fromkeys(PLACES) | {"prompt": 0}

    @traitlets.validate("value")
    def _complete(self, proposal: Any) -> dict[str, Any]:
        self._last = self.completed(proposal["value"])
        return self._last

    def completed(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return a whole selection from some of its places, the others as they are.

        Raises:
            TraitError: if a place has an unknown name or is no number.
        """
        unknown = [name for name in given if name not in PLACES]
        if unknown:
            raise traitlets.TraitError(
                f"A selection has no {unknown[0]!r}; it has {', '.join(PLACES)}."
            )
        return self._last | {name: _checked(name, place) for name, place in given.items()}

    def __repr__(self) -> str:
        """Return what is selected."""
        chosen = [f"{name}={place!r}" for name, place in self.value.items() if place is not None]
        return f"Selection({', '.join(chosen)})"


def _checked(name: str, place: Any) -> int | str | None:
    """Return a place as plain JSON; NumPy's and torch's whole numbers are taken too."""
    if (place is None and name != "prompt") or (name == "layer" and place == "embed"):
        return place
    if hasattr(place, "__index__") and not isinstance(place, bool) and place >= 0:
        return operator.index(place)
    nothing = "" if name == "prompt" else ", or None for nothing"
    raise traitlets.TraitError(
        f"{name}={place!r} cannot be selected: give a whole number from 0{nothing}."
    )


_OF_RECORDING: WeakKeyDictionary[Recording, Selection] = WeakKeyDictionary()


def selection_of(recording: Recording) -> Selection:
    """Return the selection that all views of one recording share unless they are given another."""
    selection = _OF_RECORDING.get(recording)
    if selection is None or selection.comm is None:  # closed with its kernel's widgets
        last = recording.metadata["columns"][0][-1]
        selection = Selection(
            value={"layer": recording.layers[-1], "head": recording.heads[0], "query": last}
        )
        _OF_RECORDING[recording] = selection
    return selection


def share_selection(recording: Recording, selection: Selection) -> None:
    """Let views of a recording that are yet to be made share a selection that exists."""
    _OF_RECORDING[recording] = selection
