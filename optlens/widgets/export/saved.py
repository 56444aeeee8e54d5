"""The views in a notebook's saved widget state, as a page can draw them again.

Only the numbers of a saved model are taken. What draws them is the module of this installation, not
the one that the notebook holds: a notebook may come from anyone, and its code is not run.
"""

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any

from optlens.widgets.selection import Selection
from optlens.widgets.view import View

_REFERENCE = "IPY_MODEL_"
_BOXES = {"HBoxModel": "across", "VBoxModel": "down", "BoxModel": "across"}
_PACKAGE = "optlens.widgets."
_INCOMPLETE = "The saved state is not complete; run the notebook again."


class CannotRebuild(Exception):
    """A saved widget that a page cannot show alive; the message is a sentence that says why."""


@dataclass
class Saved:
    """Hold a notebook's saved models, and collect those that its page needs.

    Attributes:
        models: the saved models by id.
        views: states of the views that the page shows, in the order in which they are met.
        selections: what is selected, for each selection that these views share.
        kinds: the kinds of parts that they draw.
    """

    models: dict[str, Any]
    views: list[dict[str, Any]] = field(default_factory=list)
    selections: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    _views: dict[str, int] = field(default_factory=dict)
    _selections: dict[str, int] = field(default_factory=dict)

    def box(self, key: str) -> tuple[str, list[str]] | None:
        """Return direction and children if a model is a box of others.

        Raises:
            CannotRebuild: if there is no such model, or its children are not a list.
        """
        model = self._model(key)
        name = model.get("model_name")
        if not isinstance(name, str) or name not in _BOXES:
            return None
        state = model.get("state", {})
        children = state.get("children", []) if isinstance(state, dict) else None
        if not isinstance(children, list):
            raise CannotRebuild(_INCOMPLETE)
        return _BOXES[name], [_id(child) for child in children]

    def view(self, key: str) -> int:
        """Return the number in `views` of a saved view of optlens.

        Raises:
            CannotRebuild: if it is another widget, or was saved by another version.
        """
        if key not in self._views:
            state, kinds = self._state(key)
            self._views[key] = len(self.views)
            self.views.append(state)
            self.kinds += [kind for kind in kinds if kind not in self.kinds]
        return self._views[key]

    def _model(self, key: str) -> dict[str, Any]:
        model = self.models.get(key)
        if not isinstance(model, dict):
            raise CannotRebuild("The notebook was saved without its state.")
        return model

    def _state(self, key: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        model = self._model(key)
        state = model.get("state")
        name = state.get("_anywidget_id", "") if isinstance(state, dict) else ""
        if not isinstance(name, str) or not name.startswith(_PACKAGE):
            raise CannotRebuild("Widgets of other libraries need a running notebook.")
        cls = _classes().get(name.rpartition(".")[2])
        if cls is None or state.get("format") != View.FORMAT:
            raise CannotRebuild(
                "Saved by another version of optlens; run the notebook again with this one."
            )
        shown = _with_bytes(state, model.get("buffers", []))
        try:
            sound = bool(shown["prompts"]) and all(
                part["kind"] in cls.kinds and isinstance(part["state"], dict)
                for part in shown["parts"]
            )
            _check_numbers(shown)
            if sound:  # what a view that is not shown has selected is not needed
                shown["selection"] = f"{_REFERENCE}{self._selection(shown['selection'])}"
        except (KeyError, TypeError, ValueError) as error:
            raise CannotRebuild(_INCOMPLETE) from error
        if not sound:
            raise CannotRebuild(_INCOMPLETE)
        return shown, cls.kinds

    def _selection(self, reference: str) -> int:
        key = _id(reference)
        if key not in self._selections:
            value = self.models[key]["state"]["value"]
            selected = {**Selection.nothing(), **value}
            _check_numbers(selected)
            # Known from here on, and not before: another view may share what was found damaged.
            self._selections[key] = len(self.selections)
            self.selections.append(selected)
        return self._selections[key]


def _classes(base: type[View] = View) -> dict[str, type[View]]:
    """Return the views of optlens by name."""
    found = {}
    for cls in base.__subclasses__():
        if cls.__module__.startswith(_PACKAGE):
            found |= {cls.__name__: cls} | _classes(cls)
    return found


def _id(reference: Any) -> str:
    return str(reference).removeprefix(_REFERENCE).removeprefix("anywidget:")


def _check_numbers(value: Any) -> None:
    """Raise ValueError if a value holds NaN or an infinity: Python's JSON has them, a page's not."""
    json.dumps(value, allow_nan=False)


def _with_bytes(state: dict[str, Any], buffers: list[Any]) -> dict[str, Any]:
    """Return a view's own traits, arrays as base64 text in their places.

    Raises:
        CannotRebuild: if the bytes and the places do not fit together.
    """
    lacking = CannotRebuild(_INCOMPLETE)
    own = {
        name: _copied(value)
        for name, value in state.items()
        if not name.startswith("_") and name not in ("layout", "tabbable", "tooltip")
    }
    try:
        for buffer in buffers:
            path = buffer["path"]
            if path[0] not in own:
                continue
            data = buffer["data"]
            if buffer.get("encoding", "base64") == "hex":
                data = base64.b64encode(bytes.fromhex(data)).decode("ascii")
            place = own
            for step in path[:-1]:
                place = place[step]
            base64.b64decode(data, validate=True)
            place[path[-1]] = data
    except (KeyError, IndexError, TypeError, ValueError, binascii.Error) as error:
        raise lacking from error
    if _has_gap(own):
        raise lacking
    return own


def _copied(value: Any) -> Any:
    """Return JSON of its own; notebooks are read as dicts of another class."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _has_gap(value: Any) -> bool:
    """Say whether a description of an array has no bytes."""
    if isinstance(value, dict):
        if "dtype" in value and "shape" in value:
            return not isinstance(value.get("data"), str)
        return any(map(_has_gap, value.values()))
    return isinstance(value, list) and any(map(_has_gap, value))
