"""The views of results that a user makes: of a comparison, and of a generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optlens.widgets.arrays import packed
from optlens.widgets.compare_part import ComparePart
from optlens.widgets.generation_part import GenerationPart
from optlens.widgets.result_view import ResultView

if TYPE_CHECKING:
    from optlens.comparison import Comparison
    from optlens.generation import Generation
    from optlens.widgets.selection import Selection


class CompareView(ResultView):
    """Show where two runs differ: two models on a prompt, or a model on two prompts.

    Args:
        comparison: what `optlens.compare` returned.
        selection: the selection of another view, to link the two. Its "query" is a column of the
            comparison.

    Raises:
        TypeError: if it is no comparison.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> found = optlens.compare(model, None, "The cat sat on the", "The big cat sat on the")
        >>> optlens.widgets.CompareView(found)
        CompareView(rows=6, tokens=6 | 7, aligned=6)
    """

    kinds = ("compare",)

    def __init__(self, comparison: Comparison, selection: Selection | None = None) -> None:
        part = ComparePart(comparison)
        layer = part.state(0)["layers"][-1]
        super().__init__(comparison, part, {"layer": layer, "query": part.column(None)}, selection)


class GenerationView(ResultView):
    """Show how a text was written, step by step; in a live notebook, fork it.

    Args:
        result: what `model.generate(prompt, ..., output_scores=True)` returned; with
            `output_logits=True` too, what sampling cut off can be seen.
        top_k: how many tokens to list at a step.
        selection: the selection of another view, to link the two. Its "query" is the position of
            the token that a step wrote.

    Attributes:
        branches: for each text, the results of its branches, the first one being `result`.

    Raises:
        InputError: if the result holds no distributions, or comes from a beam search.
        TypeError: if it is no result of a generation.

    Example:
        >>> import optlens
        >>> result = optlens.load().generate("Once upon a time", 8, output_scores=True)
        >>> optlens.widgets.GenerationView(result)
        GenerationView(steps=8, branches=1)
    """

    kinds = ("generation",)

    def __init__(
        self, result: Generation, top_k: int = 10, selection: Selection | None = None
    ) -> None:
        part = GenerationPart(result, top_k)
        last = len(part.prompts[0].ids) - 1
        super().__init__(result, part, {"query": last}, selection)

    @property
    def branches(self) -> list[list[Generation]]:
        """The results of all branches, `[text][branch]`."""
        return [[branch.result for branch in branches] for branches in self._parts[0].branches]

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return what the picture asks for; after a fork, saved notebooks hold the branch too."""
        found = super().answer(question)
        if question["what"] == "fork":
            part, shown = self._parts[0], self.parts[0]["prompt"]
            self.parts = [self._part_facts(part, shown, data=packed)]
        return found
