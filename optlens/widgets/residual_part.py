"""The numbers of the residual view: lengths of the stream, and angles between its layers.

For two vectors a, b the cosine is a·b / (|a| |b|): 1 where a layer changed nothing but the length, 0
where nothing is left of the direction. A vector of length 0 has no direction; its cosines are NaN.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.report.markup import Html, el
from optlens.report.one_prompt import OnePrompt, as_numpy
from optlens.report.pieces import token
from optlens.widgets.part import PAGE_BYTES, Part, QuestionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.recording import Recording

_EAGER = 2**16  # cosines that travel with the state
_LAST = 12  # positions of the plain table


class ResidualPart(Part):
    """Hold the residual stream of a recording, as lengths and angles.

    Args:
        recording: one that holds "residual".

    Raises:
        NotRecordedError: if it does not, naming what to record.
    """

    kind = "residual"
    title = "Residual stream"

    def __init__(self, recording: "Recording"):
        super().__init__(recording)
        self.stream = recording.residual  # [layer + 1, pos, d_model], a batch axis in front

    def state(self, prompt: int) -> dict[str, Any]:
        """Return lengths, and cosines between neighbouring rows and to the last row."""
        one, rows = self.prompts[prompt], self.recording.row_labels
        norms, units = self._norms_and_units(one)
        # einsum over [row, pos, d_model]: the sum runs over d_model alone
        before = np.einsum("rpd,rpd->rp", units[1:], units[:-1])
        first = np.full((1, before.shape[1]), np.nan, np.float32)
        state = {
            "rows": rows,
            "layers": [int(name) if name.isdecimal() else name for name in rows],
            "positions": one.positions,
            "norms": norms.astype(np.float32),
            "before": np.concatenate([first, before]).astype(np.float32),
            "last": np.einsum("rpd,pd->rp", units, units[-1]).astype(np.float32),
            "cosines": None,
        }
        if len(one.positions) * len(rows) ** 2 <= _EAGER:
            state["cosines"] = np.einsum("apd,bpd->pab", units, units).astype(np.float32)
        return state

    def answer_cosines(self, prompt: int, column: int) -> dict[str, Any]:
        """Return the cosines between all rows at one recorded position, `[row, row]`."""
        one = self.prompts[prompt]
        if not 0 <= column < len(one.positions):
            raise QuestionError(f"There is no position {column}; there are {len(one.positions)}.")
        units = self._norms_and_units(one, [column])[1][:, 0]
        return {"cosines": (units @ units.T).astype(np.float32)}

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give the cosines of each position, from the end, as far as they fit."""
        rows, columns = len(self.recording.row_labels), len(self.prompts[prompt].positions)
        if columns * rows**2 <= _EAGER:
            return
        most = PAGE_BYTES // len(self.prompts) // 4 // (4 * rows**2)
        for column in range(columns)[::-1][:most]:
            yield {"what": "cosines", "column": column}, self.answer_cosines(prompt, column)

    def counts(self) -> str:
        """Return rows and tokens."""
        return f"rows={len(self.recording.row_labels)}, {self.token_counts()}"

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the table of lengths, or the length along the layers at the selected position."""
        from optlens import plots

        one, rows = self.prompts[selected["prompt"]], self.recording.row_labels
        norms, _ = self._norms_and_units(one)
        names = [one.tokens[position] for position in one.positions]
        if not detail:
            return plots.residual_norms(norms, names, rows=rows, style=style)
        query = selected["query"]
        column = one.positions.index(query) if query in one.positions else len(names) - 1
        return plots.lens_trace(
            {names[column]: norms[:, column]}, rows=rows, label="length (L2 norm)",
            title=f"Length of the residual stream at {names[column]}", style=style,
        )  # fmt: skip

    def fallback(self, prompt: int) -> list[Html]:
        """Return the lengths at the last positions as a table."""
        one = self.prompts[prompt]
        norms, _ = self._norms_and_units(one)
        shown = range(len(one.positions))[-_LAST:]
        head = [el("th", token(one.tokens[one.positions[column]])) for column in shown]
        body = [
            el("tr", el("th", name), [el("td", f"{norms[row, column]:.3g}") for column in shown])
            for row, name in enumerate(self.recording.row_labels)
        ]
        caption = el("caption", "Residual stream: its length (L2 norm) after each layer")
        head_row = el("tr", el("th", "after layer"), head)
        return [el("table", caption, el("thead", head_row), el("tbody", body))]

    def _norms_and_units(
        self, one: OnePrompt, columns: list[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return lengths `[row, pos]` and vectors of length 1 `[row, pos, d_model]`, float32."""
        chosen = one.columns if columns is None else one.columns[columns]
        stream = as_numpy(one.pick(self.stream))[:, chosen].astype(np.float32)
        norms = np.linalg.norm(stream, axis=-1)
        with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that stands for no direction
            return norms, stream / norms[..., None]
