"""Views of results that are no recording: a comparison, a generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optlens.report.markup import visible
from optlens.widgets.part import Part
from optlens.widgets.selection import Selection
from optlens.widgets.view import View


@dataclass(frozen=True)
class ShownText:
    """Hold the tokens of a text that a view shows.

    Attributes:
        text: the text, for headings.
        ids: token ids.
        tokens: their labels, as printed.
        special: which of them, by place, are special tokens.
    """

    text: str
    ids: list[int]
    tokens: list[str]
    special: list[int] = field(default_factory=list)


class ResultView(View):
    """Show a result; `recording` is that result.

    Args:
        result: what is shown.
        part: its numbers; its prompts are `ShownText`.
        place: what is selected first.
        selection: the selection of another view of the same result, to link the two.
    """

    def __init__(
        self, result: Any, part: Part, place: dict[str, Any], selection: Selection | None
    ) -> None:
        super().__init__(result, [part], Selection(value=place) if selection is None else selection)

    def _prompt_facts(self, index: int) -> dict[str, Any]:
        prompt = self._parts[0].prompts[index]
        return {
            "text": visible(prompt.text),
            "tokens": prompt.tokens,
            "ids": prompt.ids,
            "special": prompt.special,
        }
