"""The numbers of the attention view: small pictures of all heads, one head in full, scores.

Patterns of long prompts are far larger than anything a browser should hold: 32 layers of 32 heads at
1,024 tokens are 4 GB. So the state has what fits into a megabyte, and the picture asks for the rest:
the small pictures of a layer when they come into sight, one head when it is chosen.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optlens.circuits import HeadScores
from optlens.plots.draw import percent
from optlens.report.markup import Html, el
from optlens.report.one_prompt import OnePrompt, as_numpy
from optlens.report.pieces import token
from optlens.widgets.arrays import levels, pool_max, pooled_future, step_for
from optlens.widgets.part import PAGE_BYTES, Part, QuestionError
from optlens.widgets.query_keys import QueryKeys
from optlens.widgets.scores import SCORES, scores_of
from optlens.widgets.still_pictures import mosaic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.recording import Recording

THUMB = 48  # pixels a side of a small picture, at most
# Weights that travel with the state, in full and exactly.
EXACT_CELLS = 2**18
# Weights that are read when a view is made; more are read when they are asked for.
EAGER_CELLS = 2**24
# Bytes of queries and keys that a page may hold: those of the last query of every head.
DETAIL_BYTES = 300_000


class AttentionPart(Part):
    """Hold the attention patterns of a recording.

    Args:
        recording: one that holds "attention".
        value_norms: lengths of what each head writes for each key, `[layer, head, key]` (with a
            batch axis in front for several prompts). Computed where the recording holds "v" and
            has its model; without either, weights are all there is to see.

    Raises:
        NotRecordedError: if the recording holds no attention, naming what to record.
        ValueError: if `value_norms` has another shape.
    """

    kind = "attention"
    title = "Attention"

    def __init__(self, recording: "Recording", value_norms: Any = None):
        super().__init__(recording)
        self.patterns = recording.attention  # [layer, head, query, key], a batch axis in front
        self.norms = _value_norms(recording, value_norms)
        self._scores: dict[int, HeadScores] = {}
        self.query_keys = QueryKeys(recording, self.prompts)

    # --------------------------------------------------------------------------- what it gives

    def state(self, prompt: int) -> dict[str, Any]:
        """Return small pictures, scores, and exact weights where these are few."""
        one, small = self.prompts[prompt], self._cells(prompt) <= EAGER_CELLS
        n_layers = len(self.recording.layers)
        state = {
            "layers": self.recording.layers,
            "heads": self.recording.heads,
            "positions": one.positions,
            "weighable": self.norms is not None,
            "obstacle": self.query_keys.obstacle,  # why no score can be taken apart
            "step": self._step(prompt, THUMB),
            "thumbs": self._thumbs(prompt, range(n_layers), False) if small else None,
            "scores": [
                {
                    "key": key,
                    "label": score.label,
                    "meaning": score.meaning,
                    "share": score.share,
                    "ascending": score.ascending,
                    "values": self.scores(prompt, key) if small else None,
                }
                for key, score in SCORES.items()
            ],
            "exact": None,
        }
        if self._cells(prompt) <= EXACT_CELLS:
            state["exact"] = np.stack([self._shown(one, layer) for layer in range(n_layers)])
        return state

    def answer_thumbs(self, prompt: int, layer: int, weighted: bool = False) -> dict[str, Any]:
        """Return the small pictures of one layer, `[head, query, key]` as levels."""
        return {"levels": self._thumbs(prompt, [self._row(layer)], weighted)[0]}

    def answer_head(
        self, prompt: int, layer: int, head: int, weighted: bool = False, step: int = 1
    ) -> dict[str, Any]:
        """Return one head's pattern as levels, `[query, key]`, `step` cells to one."""
        one = self.prompts[prompt]
        pattern = self._pattern(one, self._row(layer), self._column(head), weighted)
        shown = levels(pool_max(pattern, step), pooled_future(one.future, step))
        return {"levels": shown, "step": step}

    def answer_row(
        self, prompt: int, layer: int, head: int, query: int, weighted: bool = False
    ) -> dict[str, Any]:
        """Return the exact weights of one query, `[key]`; `query` counts recorded positions."""
        one = self.prompts[prompt]
        pattern = self._pattern(one, self._row(layer), self._column(head), weighted)
        if not 0 <= query < len(pattern):
            raise QuestionError(f"There is no recorded query {query}; there are {len(pattern)}.")
        return {"weights": np.where(one.future[query], np.nan, pattern[query]).astype(np.float32)}

    def answer_detail(self, prompt: int, layer: int, head: int, query: int) -> dict[str, Any]:
        """Return what the scores of one query are made of, for the keys that it may see.

        A score is the sum of `scale * q * k` over the head's dimensions, biases included.
        `agrees` says whether the softmax of the scores is what was recorded.
        """
        one = self.prompts[prompt]
        self._row(layer), self._column(head)  # raise if there is no such head
        if not 0 <= query < len(one.positions):
            raise QuestionError(
                f"There is no recorded query {query}; there are {len(one.positions)}."
            )
        position = one.positions[query]
        found = self.query_keys.detail(prompt, layer, head, position)
        scores = as_numpy(found.scores)
        visible = np.flatnonzero(np.isfinite(scores))  # no padding, and no future
        parts = {"q": found.query, "k": found.keys[visible], "weights": found.pattern[visible]}
        return {
            **{name: as_numpy(value).astype(np.float32) for name, value in parts.items()},
            "scores": scores[visible].astype(np.float32),
            "scale": found.query.shape[-1] ** -0.5,
            "agrees": self.query_keys.agrees(found.pattern, prompt, layer, head, position),
        }

    def answer_scores(self, prompt: int, score: str) -> dict[str, Any]:
        """Return one score of every head, `[layer, head]`."""
        if score not in SCORES:
            raise QuestionError(f"There is no score {score!r}; there are {', '.join(SCORES)}.")
        return {"values": self.scores(prompt, score)}

    def scores(self, prompt: int, score: str) -> np.ndarray:
        """Return one score of every head, `[layer, head]`; NaN where no query can have it."""
        if prompt not in self._scores:
            self._scores[prompt] = scores_of(self.recording, prompt)
        return as_numpy(self._scores[prompt][score]).astype(np.float32)

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give what the state leaves out, heads shrunk so far that all fit into a page."""
        exact, small = (self._cells(prompt) <= most for most in (EXACT_CELLS, EAGER_CELLS))
        step = self._page_step(prompt)
        for weighted in (False, True) if self.norms is not None else (False,):
            for layer in self.recording.layers:
                question: dict[str, Any] = {"layer": layer, "weighted": weighted}
                if weighted or not small:
                    yield {"what": "thumbs", **question}, self.answer_thumbs(prompt, **question)
                for head in self.recording.heads if weighted or not exact else ():
                    question = {"layer": layer, "head": head, "weighted": weighted}
                    answer = self.answer_head(prompt, **question, step=step)
                    yield {"what": "head", **question}, answer
        for key in SCORES:
            if not small:
                yield {"what": "scores", "score": key}, self.answer_scores(prompt, key)
        yield from self._page_details(prompt)

    def _page_details(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give what the scores of each head's last query are made of, if that is little."""
        one, config = self.prompts[prompt], self.recording.metadata["config"]
        numbers = len(self.recording.layers) * len(self.recording.heads) * (len(one.ids) + 1)
        width = config["hidden_size"] // config["num_attention_heads"]
        if 4 * numbers * width * len(self.prompts) > DETAIL_BYTES or self.query_keys.obstacle:
            return
        for layer in self.recording.layers:
            for head in self.recording.heads:
                place = {"layer": layer, "head": head, "query": len(one.positions) - 1}
                try:
                    answer = self.answer_detail(prompt, **place)
                except QuestionError:  # as in the notebook: this layer's are not to be had
                    break
                yield {"what": "detail", **place}, answer

    def counts(self) -> str:
        """Return layers, heads and tokens."""
        layers, heads = len(self.recording.layers), len(self.recording.heads)
        return f"layers={layers}, heads={heads}, {self.token_counts()}"

    # ------------------------------------------------------------------- pictures without a browser

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return all heads as small pictures, or the selected head large."""
        from optlens import plots

        one = self.prompts[selected["prompt"]]
        if detail:
            layer = self._row(_number(selected["layer"], self.recording.layers[-1]))
            head = self._column(_number(selected["head"], self.recording.heads[0]))
            title = f"Layer {self.recording.layers[layer]}, head {self.recording.heads[head]}"
            return plots.attention_head(
                self._pattern(one, layer, head), one.tokens, query_positions=one.positions,
                title=title, style=style,
            )  # fmt: skip
        step, rows = self._step(selected["prompt"], 96), range(len(self.recording.layers))
        future = pooled_future(one.future, step)
        small = [pool_max(self._pattern(one, row), step) for row in rows]
        shown = np.where(future, np.nan, np.stack(small))
        # The pictures are masked already; as positions, any that hide nothing more will do.
        last = [shown.shape[-1] - 1] * shown.shape[-2]
        return plots.attention_grid(
            shown, layers=self.recording.layers, heads=self.recording.heads,
            query_positions=last, style=style,
        )  # fmt: skip

    def fallback(self, prompt: int) -> list[Html]:
        """Return one picture of all heads and a table of the sharpest ones."""
        one = self.prompts[prompt]
        names = [key for key, score in SCORES.items() if score.share]
        shown = self.recording.layers
        if self._cells(prompt) > EAGER_CELLS:  # all of them would take as long as showing them
            shown = shown[-1:]
        thumbs = self._thumbs(prompt, [self._row(layer) for layer in shown], False)
        which = "all heads" if shown == self.recording.layers else f"layer {shown[0]}"
        words = f"Attention of {which}: rows are layers, columns are heads"
        found = scores_of(self.recording, prompt, shown)
        scores = np.stack([np.nan_to_num(as_numpy(found[name])) for name in names])
        best = np.argsort(-scores.max(0), axis=None, kind="stable")[:6]  # of [layer, head]
        head = [el("th", text) for text in ("layer", "head", "mostly", "mean weight")]
        body = []
        for layer, column in zip(*np.unravel_index(best, scores.shape[1:]), strict=True):
            kind = int(scores[:, layer, column].argmax())
            cells = (
                shown[layer],
                self.recording.heads[column],
                SCORES[names[kind]].label,
                percent(float(scores[kind, layer, column])),
            )
            body.append(el("tr", [el("td", cell) for cell in cells]))
        caption = el("caption", "The heads with one clear habit, on ", token(one.tokens[-1]), ".")
        return [
            el("img", src=mosaic(thumbs), alt=words),
            el("table", caption, el("thead", el("tr", head)), el("tbody", body)),
        ]

    # ------------------------------------------------------------------------------- pieces

    def _pattern(
        self, one: OnePrompt, row: int, column: int | None = None, weighted: bool = False
    ) -> np.ndarray:
        """Return weights of a layer `[head, query, key]` or of one head `[query, key]`."""
        chosen = one.pick(self.patterns)[row]
        values = as_numpy(_of_prompt(chosen if column is None else chosen[column], one))
        if not weighted:
            return values
        if self.norms is None:
            raise QuestionError("Record 'v' beside attention to weigh by values.")
        norms = one.pick(self.norms)[row][:, one.real]  # [head, key]
        weighed = values * (norms[:, None] if column is None else norms[column])
        return weighed / np.maximum(weighed.sum(-1, keepdims=True), 1e-30)

    def _shown(self, one: OnePrompt, row: int) -> np.ndarray:
        return np.where(one.future, np.nan, self._pattern(one, row)).astype(np.float32)

    def _thumbs(self, prompt: int, rows: Any, weighted: bool) -> np.ndarray:
        one, step = self.prompts[prompt], self._step(prompt, THUMB)
        future = pooled_future(one.future, step)
        return np.stack([levels(self._pooled(one, row, step, weighted), future) for row in rows])

    def _pooled(self, one: OnePrompt, row: int, step: int, weighted: bool = False) -> np.ndarray:
        """Return weights of a layer, `[head, query, key]`, `step` cells to one."""
        if weighted:
            return pool_max(self._pattern(one, row, weighted=True), step)
        chosen = _of_prompt(one.pick(self.patterns)[row], one)
        if chosen.dtype not in (torch.float16, torch.bfloat16):
            return pool_max(as_numpy(chosen), step)
        # The bits of weights are in the order of the weights: only what is left need be widened.
        bits = pool_max(chosen.detach().cpu().view(torch.int16).numpy(), step)
        return as_numpy(torch.from_numpy(bits).view(chosen.dtype))

    def _cells(self, prompt: int) -> int:
        one = self.prompts[prompt]
        heads = len(self.recording.layers) * len(self.recording.heads)
        return heads * len(one.positions) * len(one.ids)

    def _step(self, prompt: int, most: int) -> int:
        return step_for(len(self.prompts[prompt].ids), most)

    def _page_step(self, prompt: int) -> int:
        share = PAGE_BYTES / len(self.prompts) / (1 if self.norms is None else 2)
        return max(1, int(np.ceil(np.sqrt(self._cells(prompt) / share))))

    def _row(self, layer: int) -> int:
        return _place(layer, self.recording.layers, "layer")

    def _column(self, head: int) -> int:
        return _place(head, self.recording.heads, "head")


def _of_prompt(values: Any, one: OnePrompt) -> Any:
    """Return a prompt's own queries and keys of a pattern, which is copied only if it has others."""
    if len(one.columns) != values.shape[-2]:
        values = values[..., one.columns, :]
    return values if one.real.all() else values[..., one.real]


def _place(number: int, recorded: list[int], what: str) -> int:
    if number not in recorded:
        raise QuestionError(f"This recording has no {what} {number}; it has {recorded}.")
    return recorded.index(number)


def _number(selected: Any, otherwise: int) -> int:
    """Return a selected layer or head; a selection may hold none, or "embed"."""
    return selected if isinstance(selected, int) else otherwise


def _value_norms(recording: "Recording", given: Any) -> np.ndarray | None:
    """Return |v W_O| for every key, `[..., layer, head, key]`, as given or as recorded."""
    shape = (*recording.attention.shape[:-2], recording.attention.shape[-1])
    if given is not None:
        norms = np.asarray(as_numpy(given), np.float32)
        if norms.shape != shape:
            raise ValueError(
                f"value_norms has shape {list(norms.shape)}; it must be {list(shape)}, a length "
                "for each layer, head and key"
            )
        return norms
    if "v" not in recording.what or recording._model is None:
        return None
    values = recording["v"]  # [batch, layer, pos, head, d_head], perhaps without batch
    if values.shape[-3] != shape[-1]:  # only some positions: the norms of other keys are unknown
        return None
    weights = recording.model.W_O[recording.layers][:, recording.heads].to(values)
    written = (values.transpose(-2, -3) @ weights).norm(dim=-1)  # [..., layer, head, key]
    return as_numpy(written).astype(np.float32)
