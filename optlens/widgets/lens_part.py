"""The numbers of the lens view: what each layer would predict, and the ways of chosen tokens."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.plots.draw import percent
from optlens.recording import NotRecordedError
from optlens.report.facts import LensFacts, lens_facts
from optlens.report.markup import Html, el
from optlens.report.one_prompt import as_numpy
from optlens.report.pieces import token
from optlens.widgets.part import Part, QuestionError, layer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.recording import Recording

_LAST = 12  # positions of the plain table
_FOLLOWED = 32  # tokens whose way a page without a kernel can show


class LensPart(Part):
    """Hold the logit lens of a recording.

    Args:
        recording: one that holds "logit_lens", or the residual stream and its model.
        top_k: how many tokens to list in a cell.
        sublayers: also read the stream between attention and MLP; "resid_mid" must be recorded.

    Raises:
        NotRecordedError: if the recording lacks what is needed, naming it.
    """

    kind = "lens"
    title = "Logit lens"

    def __init__(self, recording: "Recording", top_k: int = 5, sublayers: bool = False):
        super().__init__(recording)
        most = min(top_k, recording.metadata["config"]["vocab_size"])
        self.lens = recording.logit_lens(most, sublayers)
        self._facts: dict[int, LensFacts] = {}

    def facts(self, prompt: int) -> LensFacts:
        """Return the lens of one prompt in words and arrays."""
        if prompt not in self._facts:
            self._facts[prompt] = lens_facts(self.recording, self.lens, self.prompts[prompt])
        return self._facts[prompt]

    def state(self, prompt: int) -> dict[str, Any]:
        """Return tokens, probabilities, entropy and KL of every cell."""
        facts = self.facts(prompt)
        words = {
            str(number): word
            for ids, names in zip(facts.ids, facts.words, strict=True)
            for row, cell in zip(ids.tolist(), names, strict=True)
            for number, word in zip(row, cell, strict=True)
        }
        return {
            "rows": facts.rows,
            "layers": [layer_of(name) for name in facts.rows],
            "positions": self.prompts[prompt].positions,
            "ids": facts.ids.astype(np.int32),
            "probs": facts.probs.astype(np.float32),
            "entropy": facts.entropy.astype(np.float32),
            "kl": facts.kl.astype(np.float32),
            "words": words,
        }

    def answer_follow(
        self, prompt: int, token: int | None = None, text: str | None = None
    ) -> dict[str, Any]:
        """Return a token's rank and probability in every cell, `[row, pos]`.

        Args:
            prompt: which prompt.
            token: the token's id, or
            text: its text, such as " Mary".
        """
        one = self.prompts[prompt]
        try:
            number = self.lens._token_id(text if token is None else token)
            rank, prob = (as_numpy(one.pick(f(number))) for f in (self.lens.rank, self.lens.prob))
        except (ValueError, NotRecordedError) as error:
            raise QuestionError(str(error)) from error
        return {
            "token": number,
            "label": one.label(number),
            "rank": rank[:, one.columns].astype(np.int32),
            "prob": prob[:, one.columns].astype(np.float32),
        }

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give the ways of the tokens that a reader would most likely follow."""
        ids = self.facts(prompt).ids[-1]  # [pos, k]
        first = dict.fromkeys([*ids[-1].tolist(), *ids[:, 0].tolist()])
        for number in list(first)[:_FOLLOWED]:
            try:
                answer = self.answer_follow(prompt, token=number)
            except QuestionError:  # loaded without its model, and not among the stored ones
                continue
            yield {"what": "follow", "token": number}, answer

    def counts(self) -> str:
        """Return rows and tokens."""
        return f"rows={len(self.lens.labels)}, {self.token_counts()}"

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the table of words, or the ways of the answers at the selected position."""
        from optlens import plots

        one, facts = self.prompts[selected["prompt"]], self.facts(selected["prompt"])
        names = [one.tokens[position] for position in one.positions]
        if not detail:
            words = [[cell[0] for cell in row] for row in facts.words]
            return plots.lens_heatmap(
                words, facts.probs[:, :, 0], names, rows=facts.rows, style=style
            )
        column = _column_of(selected["query"], one.positions)
        series: dict[str, Any] = {}
        for rank, (number, word) in enumerate(
            zip(facts.ids[-1, column, :3], facts.words[-1][column][:3], strict=True)
        ):
            shares = np.where(facts.ids[:, column] == number, facts.probs[:, column], 0.0).sum(-1)
            series[word if word not in series else f"{word} ({rank + 1})"] = shares
        title = f"After {names[column]}: the final answers, layer by layer"
        return plots.lens_trace(series, rows=facts.rows, title=title, style=style)

    def fallback(self, prompt: int) -> list[Html]:
        """Return the best token of each row with its probability, at the last positions."""
        one, facts = self.prompts[prompt], self.facts(prompt)
        shown = range(len(one.positions))[-_LAST:]
        head = [el("th", token(one.tokens[one.positions[column]])) for column in shown]
        body = []
        for row, name in enumerate(facts.rows):
            cells = []
            for column in shown:
                word, prob = facts.words[row][column][0], float(facts.probs[row, column, 0])
                cells.append(el("td", token(word), el("br"), el("small", percent(prob))))
            body.append(el("tr", el("th", name), cells))
        caption = el("caption", "Logit lens: the likeliest next token after each layer")
        head_row = el("tr", el("th", "after layer"), head)
        return [el("table", caption, el("thead", head_row), el("tbody", body))]


def _column_of(query: int | None, positions: list[int]) -> int:
    return positions.index(query) if query in positions else len(positions) - 1
