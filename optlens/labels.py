"""What the classes of a classifier are called, and how its loss is meant: further config fields.

`config.json` keeps them under Hugging Face's names, and only a classifier's file has them, so a
config holds them among its extra keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
DEFAULT_NUM_LABELS = 2  # transformers', which older files leave out


class LabelError(ValueError):
    """Names or numbers of classes that contradict each other."""


class LabelFields:
    """The label fields of a config; a mixin that keeps them in `self.extra`.

    Example:
        >>> from optlens import OPTConfig
        >>> OPTConfig(num_labels=3).id2label
        {0: 'LABEL_0', 1: 'LABEL_1', 2: 'LABEL_2'}
        >>> OPTConfig(id2label={0: "calm", 1: "angry"}).label2id
        {'calm': 0, 'angry': 1}
    """

    extra: dict[str, Any]

    @property
    def num_labels(self) -> int:
        """Number of classes, or of values that a regression predicts."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        if number != self.num_labels:
            self.id2label = _numbered(number)

    @property
    def id2label(self) -> dict[int, str]:
        """Class number to name; a copy, so assign a whole table to change it."""
        stored, number = self.extra.get("id2label"), self.extra.get("num_labels")
        if stored is None:
            return _numbered(DEFAULT_NUM_LABELS if number is None else number)
        names = _checked_names(stored)
        if number not in (None, len(names)):
            raise LabelError(
                f"num_labels is {number}, but id2label names {len(names)} classes; give one of the "
                "two, or make them agree."
            )
        return names

    @id2label.setter
    def id2label(self, names: Mapping[int, str]) -> None:
        names = _checked_names(names)
        self.extra.pop("num_labels", None)
        self.extra["id2label"] = names
        self.extra["label2id"] = {name: index for index, name in names.items()}

    @property
    def label2id(self) -> dict[str, int]:
        """Class name to number."""
        return {name: index for index, name in self.id2label.items()}

    @property
    def problem_type(self) -> str | None:
        """How labels are meant, one of `PROBLEM_TYPES`; None to tell from the first labels."""
        kind = self.extra.get("problem_type")
        if kind is not None and kind not in PROBLEM_TYPES:
            raise LabelError(
                f"problem_type must be one of {', '.join(PROBLEM_TYPES)} or None, got {kind!r}."
            )
        return kind

    @problem_type.setter
    def problem_type(self, kind: str | None) -> None:
        self.extra["problem_type"] = kind


def label_fields(
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    label2id: Mapping[str, int] | None = None,
    problem_type: str | None = None,
) -> dict[str, Any]:
    """Return what a caller says about labels as config fields to set; nothing where nothing is said.

    Raises:
        LabelError: If number, names and their inverse contradict each other.
    """
    if label2id is not None:
        inverse = {index: name for name, index in label2id.items()}
        if id2label is not None and _checked_names(id2label) != _checked_names(inverse):
            raise LabelError(
                f"id2label={dict(id2label)} and label2id={dict(label2id)} name different classes; "
                "leave one out."
            )
        id2label = inverse
    if id2label is None and num_labels is not None:
        id2label = _numbered(num_labels)
    if num_labels is not None and num_labels != len(id2label):
        raise LabelError(f"num_labels={num_labels}, but {len(id2label)} classes are named.")
    named = {} if id2label is None else {"id2label": _checked_names(id2label)}
    return named if problem_type is None else named | {"problem_type": problem_type}


def _numbered(number: int) -> dict[int, str]:
    """Return transformers' names for classes that have none."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise LabelError(f"num_labels must be a positive whole number, got {number!r}.")
    return {index: f"LABEL_{index}" for index in range(number)}


def _checked_names(names: Mapping) -> dict[int, str]:
    """Return names by whole number, from 0 on; JSON has made text of the numbers."""
    if not isinstance(names, Mapping) or not names:
        raise LabelError(f"id2label must be a table of class number to name, got {names!r}.")
    whole = {int(index) if str(index).isdecimal() else index: name for index, name in names.items()}
    if set(whole) != set(range(len(whole))):
        raise LabelError(
            f"id2label must name the classes 0 to {len(whole) - 1}, got {list(names)}."
        )
    return {index: whole[index] for index in range(len(whole))}
