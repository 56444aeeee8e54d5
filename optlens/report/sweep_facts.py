"""Gather what is shown of a sweep's result, as plain arrays and legible words.

This is the only file of the report that reads a `PatchResult`. The tokens of the prompts have
their texts from `metadata["labels"]`, and are shown as numbers where a result does not carry them.
"""

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optlens.interventions import in_words
from optlens.report.markup import token_label
from optlens.report.sweep_words import AXIS_WORDS, Kind, kind_of, meaning

if TYPE_CHECKING:
    from optlens.patching import PatchResult

MOST_INTERVALS = 8000  # cells for which all a bootstrap interval is worked out
MOST_TOP = 15  # cells in the list of the strongest
LEAST_TOP = 0.01  # and how strong they are at least, compared with the strongest
_SHOWN_ELSEWHERE = {"site", "clean", "corrupt", "prompts", "metric", "labels", "reference"}


@dataclass(frozen=True)
class Axis:
    """Hold one axis of a result: its name in words, and a heading for each entry.

    Attributes:
        name: Such as "layer" or "position".
        headings: A token where the entry is a position of a single prompt, else its number.
        others: The token of the other prompt where the two differ, else None.
        numbers: The position beside a token, else "".
    """

    name: str
    headings: list[str]
    others: list[str | None]
    numbers: list[str]

    def place(self, entry: int) -> str:
        """Say which entry it is, such as "position 3 ·Mary" or "layer 5"."""
        number, heading = self.numbers[entry], self.headings[entry]
        if self.name == AXIS_WORDS["component"]:
            return heading
        return f"{self.name} {number} {heading}" if number else f"{self.name} {heading}"


@dataclass(frozen=True)
class PromptFacts:
    """Hold one prompt, or pair of prompts, and the metric of its unpatched runs."""

    tokens: list[str]
    other: list[str] | None  # the corrupt prompt's, if there is one
    clean: float
    corrupt: float  # NaN where there is no corrupt run


@dataclass(frozen=True)
class SweepFacts:
    """Hold what is shown of a result.

    Attributes:
        site: What was patched.
        kind: What was done.
        axes: The axes.
        values: The metric of every patch, `[*axes]`, the mean over prompts; NaN if not computed,
            or if that is what the metric says.
        shown: The number written into each cell, `[*axes]`.
        effect: `shown` less that of the run without a patch, `[*axes]`: what cells are coloured by.
        scale: What `shown` is: "normalized" or "change".
        low: Lower ends of bootstrap intervals of `values`, `[*axes]`; None with one prompt.
        high: Upper ends.
        clean: The metric of the clean run.
        corrupt: The metric of the corrupt run; NaN where there is none.
        prompts: The prompts.
        lacking: Which cells were not computed, `[*axes]`.
        metric: The metric as text.
        meaning: What it tells, in a sentence.
        top: Indices of the strongest cells, strongest first; none if no patch changes anything.
        provenance: Names and values of what else is known.
        interventions: What acts on every run, each as a call.
    """

    site: str
    kind: Kind
    axes: list[Axis]
    values: np.ndarray
    shown: np.ndarray
    effect: np.ndarray
    scale: str
    low: np.ndarray | None
    high: np.ndarray | None
    clean: float
    corrupt: float
    prompts: list[PromptFacts]
    lacking: np.ndarray
    metric: str
    meaning: str
    top: list[tuple[int, ...]]
    provenance: list[tuple[str, str]]
    interventions: list[str]

    @property
    def title(self) -> str:
        """What was done where, such as "Activation patching: z by layer and head"."""
        names = [axis.name for axis in self.axes]
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return f"{self.kind.name}: {self.site} by {listed}"

    @property
    def missing(self) -> int:
        """How many cells were not computed."""
        return int(self.lacking.sum())

    @property
    def short_metric(self) -> str:
        """The metric for the heads of tables; of many answers its name alone."""
        return self.metric if len(self.metric) <= 40 else self.metric.partition("(")[0]

    @property
    def limit(self) -> float:
        """The largest effect, where the colours end; 1 where nothing has any."""
        finite = np.abs(self.effect[np.isfinite(self.effect)])
        return float(finite.max()) if finite.size and finite.max() > 0 else 1.0

    def place(self, index: tuple[int, ...]) -> str:
        """Name a cell, such as "layer 3, head 1"."""
        return ", ".join(axis.place(at) for axis, at in zip(self.axes, index, strict=True))

    def strongest_over(self, kept: int) -> np.ndarray:
        """Reduce the axes after the first `kept` ones to the entry with the largest effect.

        Returns:
            Flat indices into the cells, `[*axes[:kept]]`.
        """
        shape = self.effect.shape[:kept]
        size = np.abs(np.nan_to_num(self.effect)).reshape(*shape, -1)
        # where all is zero, the first that was computed stands for it
        size = np.where(np.isnan(self.effect).reshape(size.shape), -1.0, size)
        return (
            size.argmax(-1) + np.arange(np.prod(shape, dtype=int)).reshape(shape) * size.shape[-1]
        )


def gather_sweep(result: "PatchResult", top: int = MOST_TOP) -> SweepFacts:
    """Return what is shown of a result.

    Args:
        result: What a sweep found.
        top: How many of the strongest cells to list.
    """
    about = result.metadata
    has_corrupt = not bool(result.corrupt_per_prompt.isnan().all())
    kind = kind_of(about, has_corrupt)
    values = result.values.double().numpy()
    shown, unpatched, scale = _shown(result, values, kind)
    effect = shown - unpatched
    known = np.flatnonzero(~np.isnan(effect))
    order = known[np.argsort(-np.abs(effect.flat[known]), kind="stable")][:top]
    size = np.abs(effect.flat[order])
    order = order[(size > 0) & (size >= LEAST_TOP * size.max(initial=0.0))]
    prompts = _prompts(result)
    low, high = _intervals(result, order)
    return SweepFacts(
        site=", ".join(map(token_label, _listed(about.get("site", "?")))),
        kind=kind,
        axes=[_axis(result, name, prompts, kind) for name in result.axes],
        values=values,
        shown=shown,
        effect=effect,
        scale=scale,
        low=low,
        high=high,
        clean=result.clean,
        corrupt=result.corrupt,
        prompts=prompts,
        lacking=result.missing.numpy(),
        metric=str(about.get("metric", "metric")),
        meaning=meaning(str(about.get("metric", ""))),
        top=[tuple(map(int, np.unravel_index(at, values.shape))) for at in order],
        provenance=_provenance(about, values, len(prompts)),
        interventions=[in_words(each) for each in about.get("interventions", ())],
    )


def _shown(result: "PatchResult", values: np.ndarray, kind: Kind) -> tuple[np.ndarray, float, str]:
    """Return the numbers to show, that of an unpatched run, and what they are."""
    base = result.clean if kind.from_clean else result.corrupt
    if not kind.has_corrupt:
        return values - base, 0.0, "change"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is said on the page
        normalized = result.normalized.double().numpy()
    if np.isnan(normalized).all() and not np.isnan(values).all():
        return values - base, 0.0, "change"
    return normalized, 1.0 if kind.from_clean else 0.0, "normalized"


def _intervals(
    result: "PatchResult", order: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return bootstrap intervals of all cells; of very many, those of the strongest alone."""
    each = result.per_prompt
    alike = torch.equal(each.nan_to_num(), each[..., :1].expand_as(each).nan_to_num())
    if each.shape[-1] < 2 or alike:
        return None, None
    flat = each.reshape(-1, each.shape[-1])
    chosen = torch.arange(len(flat)) if len(flat) <= MOST_INTERVALS else torch.tensor(order)
    ends = replace(result, per_prompt=flat[chosen]).interval()
    found = []
    for end in ends:
        whole = torch.full((len(flat),), torch.nan, dtype=torch.float64)
        whole[chosen] = end.double()
        found.append(whole.view(each.shape[:-1]).numpy())
    return found[0], found[1]


def _prompts(result: "PatchResult") -> list[PromptFacts]:
    """Return the prompts with their texts, without padding."""
    about, texts = result.metadata, result.metadata.get("labels", {})

    def label(token: int) -> str:
        return token_label(texts.get(str(token), f"⟨{token}⟩"))

    rows = about.get("clean") or about.get("prompts") or []
    others = about.get("corrupt") or [None] * len(rows)
    ends = zip(result.clean_per_prompt.tolist(), result.corrupt_per_prompt.tolist(), strict=True)
    ends = list(ends)
    ends = ends * len(rows) if len(ends) == 1 else ends
    found = []
    for row, other, (clean, corrupt) in zip(rows, others, ends, strict=True):
        real = _real([label(token) for token in row], len(rows) > 1)
        second = None if other is None else [label(token) for token in other][real]
        found.append(PromptFacts([label(token) for token in row][real], second, clean, corrupt))
    return found


def _real(labels: list[str], several: bool) -> slice:
    """Tell which tokens of a row are no padding; only rows of several prompts have any."""
    first, end = 0, len(labels)
    while several and first < end - 1 and labels[first] == "<pad>":
        first += 1
    while several and end > first + 1 and labels[end - 1] == "<pad>":
        end -= 1
    return slice(first, end)


def _axis(result: "PatchResult", name: str, prompts: list[PromptFacts], kind: Kind) -> Axis:
    """Name the entries of an axis; those of positions by the token of the run that is patched."""
    given = [token_label(text) for text in result.labels[name]]
    others: list[str | None] = [None] * len(given)
    numbers = [""] * len(given)
    entries = result.choices[name]
    whole = all(isinstance(entry, int) for entry in entries)
    word = AXIS_WORDS.get(name, name)
    if len(prompts) != 1 or name not in ("pos", "query", "key") or not whole:
        return Axis(word, given, others, numbers)
    base, other = prompts[0].tokens, prompts[0].other
    if other is not None and not kind.from_clean:
        base, other = other, base
    for place, entry in enumerate(entries):
        given[place], numbers[place] = base[entry], str(entry)
        if other is not None and other[entry] != base[entry]:
            others[place] = other[entry]
    return Axis(word, given, others, numbers)


def _provenance(about: dict[str, Any], values: np.ndarray, prompts: int) -> list[tuple[str, str]]:
    """Return what the result says of its origin, in words."""
    pairs = [("site", ", ".join(_listed(about.get("site", "?"))))]
    pairs += [("metric", str(about.get("metric")))]
    for name, value in about.items():
        plain = isinstance(value, str | int | float) and value is not None
        if name == "model":
            pairs.append(("fingerprint of the model's weights", str(value)[:16]))
        elif name not in _SHOWN_ELSEWHERE and plain:
            pairs.append((name.replace("_", " "), str(value)))
    pairs.append(("patches", f"{values.size:,}, each for {prompts} prompt{'s'[: prompts != 1]}"))
    return pairs


def _listed(site: Any) -> list[str]:
    return [site] if isinstance(site, str) else [str(each) for each in site]
