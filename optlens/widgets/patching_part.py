"""The numbers of the patching view: the metric of every patch, and how far it may be off."""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens import checks
from optlens.patching import PatchResult
from optlens.report.markup import Html, visible
from optlens.report.sweep_facts import MOST_INTERVALS, Axis, SweepFacts, gather_sweep
from optlens.widgets.subject import SubjectPart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CELLS = 300_000  # that a browser is sent
# What an axis is called in the selection.
_PLACES = {"layer": "layer", "head": "head", "neuron": "neuron", "pos": "query", "query": "query"}
_PLACES |= {"key": "key"}


class PatchingPart(SubjectPart):
    """Hold a sweep's result.

    Args:
        result: what a sweep of `optlens` found.

    Raises:
        TypeError: if it is something else.
        InputError: if it has more patches than a picture can show.
    """

    kind = "patching"
    title = "Patching"

    def __init__(self, result: PatchResult):
        if not isinstance(result, PatchResult):
            raise TypeError(
                "PatchingView takes the result of a sweep, such as optlens.patch_sweep(...) "
                f"returns, not {type(result).__name__}."
            )
        if result.values.numel() > _MOST_CELLS:
            raise checks.InputError(
                f"This result has {result.values.numel():,} patches; a view shows {_MOST_CELLS:,} "
                "at most. Sweep over fewer layers= or neurons=, or use result.plot()."
            )
        self.facts: SweepFacts = gather_sweep(result)
        super().__init__(result, self.facts.title)

    def first(self) -> dict[str, Any]:
        """Return the strongest patch; where none does anything, the first one."""
        index = self.facts.top[0] if self.facts.top else (0,) * len(self.subject.axes)
        return self._selection(index)

    # --------------------------------------------------------------------------- what it gives

    def state(self, prompt: int) -> dict[str, Any]:
        """Return axes, values and intervals."""
        facts = self.facts
        normalized = facts.scale == "normalized"
        low, high = self._normalized_interval() if normalized else (None, None)
        base = facts.clean if facts.kind.from_clean else facts.corrupt
        return {
            "axes": [
                _axis_facts(name, axis, self.subject.choices.get(name, []))
                for name, axis in zip(self.subject.axes, facts.axes, strict=True)
            ],
            "values": facts.values.astype(np.float32),
            "low": _narrow(facts.low),
            "high": _narrow(facts.high),
            "normalized": facts.shown.astype(np.float32) if normalized else None,
            "normalized_low": _narrow(low),
            "normalized_high": _narrow(high),
            "unpatched": 1.0 if facts.kind.from_clean else 0.0,
            "base": _number(base),
            "clean": _number(facts.clean),
            "corrupt": _number(facts.corrupt),
            "title": visible(facts.title),
            "doing": facts.kind.doing,
            "reading": facts.kind.reading,
            "metric": visible(facts.short_metric),
            "meaning": visible(facts.meaning),
            "missing": facts.missing,
            "patched_first": bool(facts.kind.from_clean),
            "pairs": [{"tokens": each.tokens, "other": each.other} for each in facts.prompts[:1]],
            "n_prompts": len(facts.prompts),
            "top": [list(index) for index in facts.top],
        }

    def counts(self) -> str:
        """Return site, axes and whether anything is missing."""
        axes = self.subject.axes
        sizes = ", ".join(f"{axis}={len(self.subject.labels[axis])}" for axis in axes)
        missing = f", {self.facts.missing} not computed" if self.facts.missing else ""
        return f"{self.facts.site}: {sizes}{missing}"

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the heatmap of all patches; with `detail`, or over three axes, the chosen table."""
        result = self.subject
        if len(result.axes) < 3 or (len(result.axes) == 3 and not detail):
            return result.plot(style=style)
        index = self._index(selected)[:-2]
        part = replace(
            result,
            per_prompt=result.per_prompt[index],
            axes=result.axes[-2:],
            labels={axis: result.labels[axis] for axis in result.axes[-2:]},
            choices={axis: result.choices[axis] for axis in result.axes[-2:]},
        )
        where = ", ".join(
            axis.place(at) for axis, at in zip(self.facts.axes[:-2], index, strict=True)
        )
        return part.plot(style=style, title=visible(f"{self.facts.title}: {where}"))

    def fallback(self, prompt: int) -> list[Html]:
        """Return the picture and the table of the strongest patches, as the result itself does."""
        return [Html(self.subject._repr_html_())]

    # ------------------------------------------------------------------------------- gathering

    def _normalized_interval(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        if self.facts.low is None or self.facts.values.size > MOST_INTERVALS:
            return None, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is NaN, and shown as such
            low, high = self.subject.normalized_interval()
        return low.numpy(), high.numpy()

    def _selection(self, index: tuple[int, ...]) -> dict[str, Any]:
        chosen = {}
        for axis, at in zip(self.subject.axes, index, strict=True):
            entry = self.subject.choices.get(axis, [None])[at]
            if axis in _PLACES and isinstance(entry, int) and entry >= 0:
                chosen[_PLACES[axis]] = entry
        return chosen

    def _index(self, selected: dict[str, Any]) -> tuple[int, ...]:
        """Return the selected cell, of axes that are not in the selection the strongest entry."""
        strongest = self.facts.top[0] if self.facts.top else (0,) * len(self.subject.axes)
        found = []
        for axis, at in zip(self.subject.axes, strongest, strict=True):
            entries, wanted = self.subject.choices[axis], selected.get(_PLACES.get(axis, ""))
            found.append(entries.index(wanted) if wanted in entries else at)
        return tuple(found)


def _axis_facts(name: str, axis: Axis, entries: list[Any]) -> dict[str, Any]:
    """Return one axis: its entries in words, and what each is in the selection."""
    place = _PLACES.get(name)
    whole = [entry if isinstance(entry, int) and entry >= 0 else None for entry in entries]
    return {
        "name": axis.name,
        "bare": name == "component",
        "place": place,
        "entries": whole if place else [None] * len(axis.headings),
        "headings": axis.headings,
        "others": axis.others,
        "numbers": axis.numbers,
    }


def _narrow(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else values.astype(np.float32)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
