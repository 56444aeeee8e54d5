"""The numbers of the patching view: the metric of every patch, and how far it may be off."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens import checks
from optlens.interventions import Intervention
from optlens.patching import PatchResult, SweepStream
from optlens.report.markup import Html, visible
from optlens.report.sweep_facts import MOST_INTERVALS, Axis, SweepFacts, gather_sweep
from optlens.widgets.patching_fill import Filling, as_scaled
from optlens.widgets.patching_runs import PatchRuns
from optlens.widgets.subject import SubjectPart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.model import OPTForCausalLM

_MOST_CELLS = 300_000  # that a browser is sent
# What an axis is called in the selection.
_PLACES = {"layer": "layer", "head": "head", "neuron": "neuron", "pos": "query", "query": "query"}
_PLACES |= {"key": "key"}


class PatchingPart(SubjectPart):
    """Hold a sweep's result, or a sweep that is still running.

    Args:
        found: what a sweep of `optlens` found, or the stream that it returned.
        model: the model that was swept, to see its predictions under single patches; a stream has it.
        interventions: those under which it was swept, for the same purpose; a stream has them.
        spans: names for positions in them.
        top_k: how many predicted tokens to list.

    Attributes:
        filling: the running sweep; None for a result.
        runs: the runs behind single patches.

    Raises:
        TypeError: if it is something else.
        InputError: if it has more patches than a picture can show, or the model is another one.
    """

    kind = "patching"
    title = "Patching"

    def __init__(
        self,
        found: PatchResult | SweepStream,
        model: "OPTForCausalLM | None" = None,
        interventions: Intervention | Iterable[Intervention] = (),
        spans: Mapping[str, Any] | None = None,
        top_k: int = 5,
    ):
        stream = found if isinstance(found, SweepStream) else None
        result = found if stream is None else stream.result
        if not isinstance(result, PatchResult):
            raise TypeError(
                "PatchingView takes the result of a sweep, such as optlens.patch_sweep(...) "
                f"returns, or the stream of one with stream=True; not {type(found).__name__}."
            )
        if result.per_prompt[..., 0].numel() > _MOST_CELLS:
            raise checks.InputError(
                f"This result has {result.per_prompt[..., 0].numel():,} patches; a view shows "
                f"{_MOST_CELLS:,} at most. Sweep over fewer layers= or top_neurons=, or use "
                "result.plot()."
            )
        if stream is not None:
            model, standing = stream.sweep.model, stream.sweep.standing
            session = None if standing is None else standing.session
            interventions = () if session is None else [e.intervention for e in session.edits]
            spans = None if session is None else session.spans
        self.filling = None if stream is None else Filling(stream)
        self.runs = PatchRuns(result, model, interventions, spans, top_k)
        self.subject = result
        super().__init__(result, self.facts.title)

    @property
    def facts(self) -> SweepFacts:
        """What is shown of the result as it is now, with intervals once it is complete."""
        stage = None if self.filling is None else self.filling.facts()["to"]
        if self._gathered[0] != (stage, self._is_running):
            result = self.subject
            if self._is_running:
                result = _one_column(result)
            self._gathered = (stage, self._is_running), gather_sweep(result)
        return self._gathered[1]

    _gathered: tuple[Any, Any] = (object(), None)

    @property
    def _is_running(self) -> bool:
        return self.filling is not None and self.filling.state != "done"

    def first(self) -> dict[str, Any]:
        """Return the strongest patch; where none does anything, the first one."""
        index = self.facts.top[0] if self.facts.top else (0,) * len(self.subject.axes)
        return self._selection(index)

    # --------------------------------------------------------------------------- what it gives

    def state(self, prompt: int) -> dict[str, Any]:
        """Return axes, values and intervals."""
        facts = self.facts
        normalized = facts.shown if facts.scale == "normalized" else None
        if self.filling is not None and self.filling.is_scaled:
            normalized = as_scaled(self.subject, self.subject.values).numpy()
        elif self.filling is not None:
            normalized = None  # as it will be at the end, whatever is known by now
        low, high = self._normalized_interval() if normalized is not None else (None, None)
        base = facts.clean if facts.kind.from_clean else facts.corrupt
        return {
            "axes": [
                _axis_facts(name, axis, self.subject.choices.get(name, []))
                for name, axis in zip(self.subject.axes, facts.axes, strict=True)
            ],
            "values": facts.values.astype(np.float32),
            "low": _narrow(facts.low),
            "high": _narrow(facts.high),
            "normalized": _narrow(normalized),
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
            "filling": None if self.filling is None else self.filling.facts(),
        }

    def answer_outlook(self, prompt: int) -> dict[str, Any]:
        """Return what can be asked: how far the sweep is, why there are no predictions, no code."""
        return {
            "filling": None if self.filling is None else self.filling.facts(),
            "predictions": visible(self.runs.no_predictions()),
            "code": visible(self.runs.no_code()),
        }

    def answer_more(self, prompt: int, since: int, by: str = "", turn: int = 0) -> dict[str, Any]:
        """Compute for a tenth of a second, unless cancelled; return what is new.

        Args:
            prompt: ignored; there is one subject.
            since: how many computed patches the picture has.
            by: a name of the picture.
            turn: how often it was told to go on.
        """
        self.filling.go_on(by, turn)
        self.filling.step()
        return self.filling.news(since)

    def answer_pause(self, prompt: int, by: str = "", turn: int = 0) -> dict[str, Any]:
        """Compute no more until told to go on; see `answer_more`."""
        self.filling.cancel(by, turn)
        return self.filling.facts()

    def answer_predictions(self, prompt: int, index: list[int], which: int) -> dict[str, Any]:
        """Return what is predicted with and without a patch; see `PatchRuns.predictions`."""
        return self.runs.predictions(index, which)

    def answer_code(self, prompt: int, index: list[int], which: int) -> dict[str, Any]:
        """Return the code that makes a patch."""
        return {"code": self.runs.code(index, which)}

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give what a page holds: the predictions under every patch, and its code, where small."""
        why = self.runs.none_in_page()
        code = self.runs.no_code()
        if not code and not self.runs.codes_fit():
            code = "This page holds no code for so many patches. The notebook shows it."
        found = {"filling": None, "predictions": visible(why), "code": visible(code)}
        yield {"what": "outlook"}, found
        prompts = range(self.runs.prompts_in_page())
        for which, *index in product(prompts, *map(range, self.subject.per_prompt.shape[:-1])):
            place = {"index": index, "which": which}
            if not why:
                yield {"what": "predictions"} | place, self.answer_predictions(prompt, **place)
            if not code:
                yield {"what": "code"} | place, self.answer_code(prompt, **place)

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
            undefined=None if result.undefined is None else result.undefined[index],
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


def _one_column(result: PatchResult) -> PatchResult:
    """Return a result of means: intervals are worked out when all is there."""
    return replace(
        result,
        per_prompt=result.values[..., None],
        clean_per_prompt=result.clean_per_prompt.mean()[None],
        corrupt_per_prompt=result.corrupt_per_prompt.mean()[None],
    )


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
