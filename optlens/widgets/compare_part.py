"""The numbers of the compare view: two runs side by side, layer by layer, token by token."""

from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.comparison import Comparison
from optlens.plots.draw import percent
from optlens.report.markup import Html, el, token_label, visible
from optlens.report.one_prompt import as_numpy
from optlens.report.pieces import token
from optlens.widgets.part import Part, layer_of
from optlens.widgets.result_view import ShownText

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAST = 10  # columns of the plain table


class ComparePart(Part):
    """Hold a comparison of two runs, `a` and `b`.

    Args:
        comparison: what `optlens.compare` returned.

    Raises:
        TypeError: if it is something else.
    """

    kind = "compare"
    title = "Two runs compared"

    def __init__(self, comparison: Comparison):
        if not isinstance(comparison, Comparison):
            raise TypeError(
                f"CompareView shows what optlens.compare returns, not {type(comparison).__name__}; "
                "give it optlens.compare(model, None, prompt, prompt_b) or (model_a, model_b, prompt)."
            )
        self.recording = self.comparison = comparison
        self.changed = as_numpy(comparison.top_a != comparison.top_b) & as_numpy(comparison.aligned)
        self._texts = [visible(_without_start(text)) for text in comparison.metadata["prompts"]]
        one, other = self._texts
        text = one if one == other else f"{one} ↔ {other}"
        labels = [token_label(label) for label in comparison.labels]
        self.prompts = [ShownText(text, [0] * len(labels), labels)]

    def state(self, prompt: int) -> dict[str, Any]:
        """Return divergences, cosines and the likeliest tokens of both sides, for every cell."""
        found, fingerprints = self.comparison, self.comparison.metadata["fingerprints"]
        return {
            "rows": found.rows,
            "layers": [layer_of(name) for name in found.rows],
            "same_prompt": self._texts[0] == self._texts[1],
            "same_model": fingerprints[0] == fingerprints[1],
            "sides": [self._side(number) for number in (0, 1)],
            "kl": _floats(found.lens_kl),
            "js": _floats(found.lens_js),
            "cosine": None if found.cosine is None else _floats(found.cosine),
            "end": {
                name: _floats(getattr(found, name)) for name in ("kl", "kl_reverse", "js")
            },
            "changed": self.changed.astype(np.uint8),
            "words": {number: token_label(word) for number, word in found.tokens.items()},
        }  # fmt: skip

    def _side(self, number: int) -> dict[str, Any]:
        """Return one side: its text, its tokens by column, what it predicts `[row, column, k]`."""
        found, name = self.comparison, "ab"[number]
        places = [column[number] for column in found.columns]
        ids = found.metadata["ids"][number]
        return {
            "text": self._texts[number],
            "places": places,
            "tokens": [None if at is None else token_label(found.label(ids[at])) for at in places],
            "ids": as_numpy(getattr(found, f"guesses_{name}")).astype(np.int32),
            "probs": _floats(getattr(found, f"guess_probs_{name}")),
        }

    def counts(self) -> str:
        """Return rows, tokens of both sides, and how many of these are aligned."""
        found = self.comparison
        sizes = [sum(column[side] is not None for column in found.columns) for side in (0, 1)]
        tokens = str(sizes[0]) if sizes[0] == sizes[1] else f"{sizes[0]} | {sizes[1]}"
        return f"rows={len(found.rows)}, tokens={tokens}, aligned={int(found.aligned.sum())}"

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the map of divergences, or the selected column along the layers."""
        from optlens import plots

        found = self.comparison
        if not detail:
            return found.plot("kl", style=style)
        column = self.column(selected["query"])
        rows, label = found.rows, found.labels[column]
        if not bool(found.aligned[column]):
            side = "a" if found.columns[column][1] is None else "b"
            series = {f"only {side}": as_numpy(getattr(found, f"prob_{side}"))[:, column]}
            title = f"Probability of the likeliest token at {label}"
            return plots.lens_trace(series, rows=rows, title=title, style=style)
        kl, js = as_numpy(found.lens_kl)[:, column], as_numpy(found.lens_js)[:, column]
        series = {"KL(a || b)": kl, "JS": js}
        title = f"How far the two predictions are apart at {label}"
        return plots.lens_trace(series, rows=rows, label="nats", title=title, style=style)

    def column(self, query: int | None) -> int:
        """Return the selected column; the last one unless there is such a one."""
        n_columns = len(self.comparison.columns)
        return query if query is not None and query < n_columns else n_columns - 1

    def fallback(self, prompt: int) -> list[Html]:
        """Return the likeliest tokens of both sides in the last columns, and their divergence."""
        found = self.comparison
        shown = range(len(found.columns))[-_LAST:]
        head = [el("th", token(self.prompts[0].tokens[column])) for column in shown]
        body = [
            el("tr", el("th", name), [el("td", self._cell(row, column)) for column in shown])
            for row, name in enumerate(found.rows)
        ]
        caption = el(
            "caption", "Likeliest next token after each layer, a and b where they differ, with "
            "KL(a || b) in nats",
        )  # fmt: skip
        head_row = el("tr", el("th", "after layer"), head)
        return [el("table", caption, el("thead", head_row), el("tbody", body))]

    def _cell(self, row: int, column: int) -> list[object]:
        found = self.comparison
        words = [
            token_label(found.label(int(top[row, column]))) for top in (found.top_a, found.top_b)
        ]
        if not bool(found.aligned[column]):
            side = 0 if words[0] else 1
            prob = float((found.prob_a, found.prob_b)[side][row, column])
            note = f"only {'ab'[side]}, {percent(prob)}"
            return [token(words[side]), el("br"), el("small", note)]
        both = [token(words[0])]
        if self.changed[row, column]:
            both += [" → ", token(words[1])]
        return [*both, el("br"), el("small", f"{float(found.lens_kl[row, column]):.3g}")]


def _floats(values: Any) -> np.ndarray:
    return as_numpy(values).astype(np.float32)


def _without_start(text: str) -> str:
    return text.removeprefix("</s>") or text
