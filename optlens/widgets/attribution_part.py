"""The numbers of the attribution view: who wrote a logit, part by part, and read from which token."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.lens.direct_result import LogitAttribution
from optlens.report.markup import Html, el, visible
from optlens.report.one_prompt import as_numpy
from optlens.report.pieces import token
from optlens.widgets.part import PAGE_BYTES, Part, QuestionError, check_same_prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.recording import Recording

# Terms of heads by token that travel with the state.
EAGER_SOURCES = 2**18
_MOST = 12  # parts of the plain table


class AttributionPart(Part):
    """Hold a logit, or a logit difference, divided among the parts that wrote it.

    Args:
        attribution: as `optlens.direct_logit_attribution` gives it.
        recording: the prompts that it was made of.

    Raises:
        ValueError: if the recording has other prompts.
    """

    kind = "attribution"
    title = "Direct logit attribution"

    def __init__(self, attribution: LogitAttribution, recording: "Recording"):
        super().__init__(recording)
        self.attribution = attribution
        check_same_prompts(recording, attribution.metadata["tokens"], "attribution")

    def state(self, prompt: int) -> dict[str, Any]:
        """Return every part with its term, what they add up to, and the model's own logit."""
        found = self.attribution
        kinds, layers, heads = zip(*found.places, strict=True)
        values = self._values(prompt)
        state = {
            "metric": visible(str(found.metadata["metric"])),
            "position": self._position(prompt),
            "labels": found.labels,
            "kinds": kinds,
            "layers": layers,
            "heads": heads,
            "size": [found.n_layers, found.n_heads],
            "values": values.astype(np.float32),
            "total": self._sums(self._total(prompt), values),
            "mean": None,
            "by_source": found.sources is not None,
            "sources": None,
        }
        if found.is_batch and len(self.prompts) > 1:
            mean = as_numpy(found.values).mean(0)
            total = self._sums(found.total.mean(), mean)
            state["mean"] = {"values": mean.astype(np.float32), "total": total}
        if found.sources is not None and self._terms(prompt) <= EAGER_SOURCES:
            state["sources"] = self._sources(prompt).astype(np.float32)
        return state

    def answer_sources(self, prompt: int, layer: int, head: int) -> dict[str, Any]:
        """Return one head's term divided among the tokens that it read, `[key]`."""
        found = self.attribution
        if found.sources is None:
            raise QuestionError("Give by_source=True to divide heads among the tokens they read.")
        if layer not in range(found.n_layers) or head not in range(found.n_heads):
            raise QuestionError(f"There is no head {head} in layer {layer}.")
        return {"values": self._sources(prompt)[layer, head].astype(np.float32)}

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give the heads' terms by token, of the largest heads first, as far as they fit."""
        found = self.attribution
        if found.sources is None or self._terms(prompt) <= EAGER_SOURCES:
            return
        most = PAGE_BYTES // len(self.prompts) // (4 * len(self.prompts[prompt].ids))
        heads = as_numpy(self.prompts[prompt].pick(found.heads))
        for place in np.argsort(-np.abs(heads), axis=None, kind="stable")[:most].tolist():
            layer, head = divmod(place, found.n_heads)
            answer = self.answer_sources(prompt, layer, head)
            yield {"what": "sources", "layer": layer, "head": head}, answer

    def counts(self) -> str:
        """Return the metric, the parts and the tokens."""
        metric = visible(str(self.attribution.metadata["metric"]))
        return f"{metric}, parts={len(self.attribution.labels)}, {self.token_counts()}"

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the terms as steps that add up; with `detail` the heads as a table."""
        from optlens import plots

        found, prompt = self.attribution, selected["prompt"]
        metric, unit = str(found.metadata["metric"]), "logits (nats)"
        if detail:
            heads = self.prompts[prompt].pick(found.heads)
            title = f"What every head wrote of {metric}"
            return plots.head_scores(heads, label=unit, title=title, style=style)
        title = f"Who wrote {metric}"
        values = self._values(prompt)
        return plots.waterfall(values, found.labels, label=unit, title=title, style=style)

    def fallback(self, prompt: int) -> list[Html]:
        """Return the largest terms as a table that adds up, in the order of the computation."""
        values, labels = self._values(prompt), self.attribution.labels
        kept = sorted(np.argsort(-np.abs(values), kind="stable")[:_MOST].tolist())
        rows = [(labels[place], float(values[place])) for place in kept]
        if rest := len(values) - len(kept):
            rows.append((f"{rest} others", float(values.sum() - values[kept].sum())))
        total, found, error = self._sums(self._total(prompt), values).tolist()
        rows += [("sum", found), ("the model's own", total)]
        body = [el("tr", el("th", name), el("td", _signed(value))) for name, value in rows]
        one = self.prompts[prompt]
        caption = el(
            "caption",
            f"Who wrote {visible(str(self.attribution.metadata['metric']))} after ",
            token(one.tokens[self._position(prompt)]),
            f", in logits; the sum misses the model's own by {abs(error):.0e}",
        )
        head = el("tr", el("th", "part"), el("th", "term"))
        return [el("table", caption, el("thead", head), el("tbody", body))]

    # ------------------------------------------------------------------------------- pieces

    def _values(self, prompt: int) -> np.ndarray:
        values = self.attribution.values
        return as_numpy(values[prompt] if self.attribution.is_batch else values)

    def _total(self, prompt: int) -> Any:
        total = self.attribution.total
        return total[prompt] if self.attribution.is_batch else total

    def _sums(self, total: Any, values: np.ndarray) -> np.ndarray:
        """Return the model's own logit, the sum of the terms, and what the sum misses."""
        own, added = float(total), float(values.sum())
        return np.array([own, added, own - added], np.float32)

    def _sources(self, prompt: int) -> np.ndarray:
        """Return the heads' terms by token, `[layer, head, key]`, real tokens only."""
        one = self.prompts[prompt]
        return as_numpy(one.pick(self.attribution.sources))[..., one.real]

    def _terms(self, prompt: int) -> int:
        found = self.attribution
        return found.n_layers * found.n_heads * len(self.prompts[prompt].ids)

    def _position(self, prompt: int) -> int:
        """Return after which of the prompt's real tokens the prediction is read."""
        column = self.attribution.metadata["columns"][prompt]
        return int(self.prompts[prompt].real[:column].sum())


def _signed(value: float) -> str:
    """Write a number with its sign, the minus as long as the plus."""
    text = f"{abs(value):.3f}"
    return text if float(text) == 0 else f"{'−' if value < 0 else '+'}{text}"
