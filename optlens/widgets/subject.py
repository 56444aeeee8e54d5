"""Views of what is no recording of a prompt: examples of neurons, the result of a sweep, a model.

They have the same shell as the views of a recording, files and selection included. Where those have
prompts, these have one entry: a line of text that says what is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from optlens.report.markup import visible
from optlens.widgets.part import Part
from optlens.widgets.selection import Selection
from optlens.widgets.view import View


@dataclass(frozen=True)
class Subject:
    """Stand where a view of a recording has a prompt; it has a text, but no tokens."""

    text: str
    tokens: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


class SubjectPart(Part):
    """Hold what is shown of something that is no recording.

    Args:
        subject: what is shown.
        text: one line that says what it is.
    """

    def __init__(self, subject: Any, text: str):
        self.subject = subject
        self.prompts = [Subject(text)]

    def first(self) -> dict[str, Any]:
        """Return the place that is selected at first."""
        return {}


class SubjectView(View):
    """Show one such part.

    Args:
        subject: what is shown; `view.recording` names it too.
        part: what is shown of it.
        selection: what is selected; all views of one subject share one by default.
    """

    def __init__(self, subject: Any, part: SubjectPart, selection: Selection | None = None) -> None:
        selection = _selection_of(subject, part) if selection is None else selection
        super().__init__(subject, [part], selection)

    def _prompt_facts(self, index: int) -> dict[str, Any]:
        text = visible(self._parts[0].prompts[index].text)
        return {"text": text, "tokens": [], "ids": [], "special": []}


_OF_SUBJECT: WeakKeyDictionary[Any, Selection] = WeakKeyDictionary()


def _selection_of(subject: Any, part: SubjectPart) -> Selection:
    selection = _OF_SUBJECT.get(subject)
    if selection is None or selection.comm is None:  # closed with its kernel's widgets
        selection = _OF_SUBJECT[subject] = Selection(value=part.first())
    return selection
