"""The numbers of the generation view: every step's distribution, and branches forked from a step."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.checks import InputError
from optlens.generation import Generation
from optlens.plots.draw import percent
from optlens.report.markup import Html, el, token_label
from optlens.report.pieces import token
from optlens.widgets.branches import SAMPLING, Branch, Candidates, candidates, lock_of
from optlens.widgets.part import Part, QuestionError
from optlens.widgets.result_view import ShownText

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAST = 20  # steps of the plain table
_NAMED = 16  # steps that the figure names


class GenerationPart(Part):
    """Hold a generation and what was forked from it.

    Args:
        result: what `model.generate(..., return_dict=True, output_scores=True)` returned.
        top_k: how many tokens to list at a step.

    Raises:
        InputError: if the result holds no distributions, or comes from a beam search, whose rows
            are not texts.
        TypeError: if it is no result of a generation.
    """

    kind = "generation"
    title = "Generation"

    def __init__(self, result: Generation, top_k: int = 10):
        if not isinstance(result, Generation):
            raise TypeError(
                f"GenerationView shows a Generation, not {type(result).__name__}; write "
                "model.generate(prompt, return_dict=True, output_scores=True)."
            )
        if result.options.num_beams > 1:
            raise InputError(
                "A beam search drops and copies texts while it runs, so its steps belong to no one "
                "text; generate with num_beams=1 to see them."
            )
        if not (result.scores or result.logits):
            raise InputError(
                "This generation kept no distributions; write model.generate(prompt, ..., "
                "output_scores=True, output_logits=True)."
            )
        self.recording = self.result = result
        self.top_k = top_k
        self.branches = [[Branch(result, row)] for row in range(len(result.sequences))]
        self.prompts = [self._shown_text(row) for row in range(len(result.sequences))]
        self._made: dict[str, int] = {}  # requests that were carried out -> branch

    def label(self, number: int) -> str:
        """Return a token's label."""
        tokenizer = self.result.model.tokenizer if self.result.model is not None else None
        return token_label(f"⟨{number}⟩" if tokenizer is None else tokenizer.display(number))

    def _shown_text(self, row: int) -> ShownText:
        branch = self.branches[row][0]
        ids = branch.ids
        tokens = [self.label(number) for number in ids]
        text = self.result.texts[row] if self.result.texts else " ".join(tokens)
        return ShownText(text, ids, tokens, self._special(ids))

    def _special(self, ids: list[int]) -> list[int]:
        config = self.result.model.config if self.result.model is not None else None
        special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        return [place for place, number in enumerate(ids) if number in special]

    # ------------------------------------------------------------------------------ what it gives

    def state(self, prompt: int) -> dict[str, Any]:
        """Return all branches of one text with the candidates of their steps."""
        branches = [self._branch_facts(prompt, n) for n in range(len(self.branches[prompt]))]
        numbers = {i for facts in branches for i in [*facts["ids"], *facts["tokens"].ravel()]}
        return {
            "start": len(self.branches[prompt][0].ids) - self.branches[prompt][0].n_steps,
            "branches": branches,
            "words": {str(int(n)): self.label(int(n)) for n in sorted(numbers) if n >= 0},
        }

    def steps(self, prompt: int, number: int) -> list[Candidates]:
        """Return the candidates of every step of a branch."""
        branch, start = self.branches[prompt][number], self._start(prompt)
        ids, found = branch.ids, []
        for step in range(branch.n_steps):
            owner = self._owner(prompt, number, step)
            logits, scores = (owner.logits_at(name, step) for name in ("logits", "scores"))
            found.append(candidates(logits, scores, ids[start + step], self.top_k))
        return found

    def _start(self, prompt: int) -> int:
        first = self.branches[prompt][0]
        return len(first.ids) - first.n_steps

    def _owner(self, prompt: int, number: int, step: int) -> Branch:
        """Return the branch whose result holds the distribution of a step."""
        branch = self.branches[prompt][number]
        while step < branch.first:
            branch = self.branches[prompt][branch.parent]
        return branch

    def _branch_facts(self, prompt: int, number: int) -> dict[str, Any]:
        branch, steps = self.branches[prompt][number], self.steps(prompt, number)
        result, shape = branch.result, (len(steps), self.top_k)
        tokens = np.full(shape, -1, np.int32)
        shares = {name: np.full(shape, np.nan, np.float32) for name in ("own", "after")}
        for row, step in enumerate(steps):
            tokens[row, : len(step.ids)] = step.ids
            for name, table in shares.items():
                values = getattr(step, name)
                if values is not None:
                    table[row, : len(step.ids)] = values
        return {
            "ids": branch.ids,
            "special": self._special(branch.ids),
            "parent": branch.parent,
            "step": branch.step,
            "forced": branch.forced,
            "reason": result.finish_reasons[branch.row],
            "seed": None if result.seed is None else str(result.seed),  # beyond 2**53 in JSON
            "sampling": {name: getattr(result.options, name) for name in SAMPLING}
            if result.options.samples
            else None,
            "tokens": tokens,
            **shares,
            "entropy": np.array([step.entropy for step in steps], np.float32).reshape(-1, 2),
            "allowed": np.array([step.allowed for step in steps], np.int32),
            "rank": np.array([step.rank for step in steps], np.int32),
        }

    # ------------------------------------------------------------------------------------- forking

    def answer_live(self, prompt: int) -> dict[str, Any]:
        """Return whether there is a model to fork with, and the newest state."""
        return {"live": self.result.model is not None, "state": self.state(prompt)}

    def answer_fork(
        self,
        prompt: int,
        branch: int,
        step: int,
        request: str,
        token: int | None = None,
        text: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fork a branch and return the new state; the same request twice forks once.

        Args:
            prompt: which text.
            branch: which of its branches.
            step: the first step to be chosen anew.
            request: a name for this request: a question whose answer is late is asked again.
            token: the id to put there, or
            text: its text, such as " dog"; with neither, the model chooses.
            options: temperature, top_k, top_p and seed for a sample, greedy if all are None, and
                max_new_tokens, how many tokens to add.
        """
        model = self.result.model
        if model is None:
            raise QuestionError("This result has no model any more; generate it again to fork it.")
        with lock_of(model):
            if request not in self._made:
                try:
                    number = model.to_single_token(text) if token is None and text else token
                    made = self.fork(prompt, step, number, branch, options or {})
                except ValueError as error:  # what was asked for cannot be done, and says why
                    raise QuestionError(str(error)) from error
                self._made[request] = made
        return {"state": self.state(prompt), "branch": self._made[request]}

    def fork(
        self,
        prompt: int,
        step: int,
        token: int | None = None,
        branch: int = 0,
        options: dict[str, Any] | None = None,
    ) -> int:
        """Write another branch and return its number; see `answer_fork`."""
        branches = self.branches[prompt]
        if not (0 <= branch < len(branches) and 0 <= step <= branches[branch].n_steps):
            raise QuestionError(f"There is no step {step} in branch {branch}.")
        owner = self._owner(prompt, branch, step)
        given = {name: value for name, value in (options or {}).items() if value is not None}
        changes: dict[str, Any] = dict.fromkeys((*SAMPLING, "seed")) | given
        changes["do_sample"] = any(name in given for name in (*SAMPLING, "seed"))
        result = owner.result.fork(step - owner.first, token, owner.row, **changes)
        forced = token is not None
        branches.append(Branch(result, 0, step + forced, branch, step, forced))
        return len(branches) - 1

    # ---------------------------------------------------------------- pictures without a browser

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give the one answer that a page has: that nothing can be written without Python."""
        yield {"what": "live"}, {"live": False, "state": None}

    def counts(self) -> str:
        """Return steps and branches."""
        steps = [branches[0].n_steps for branches in self.branches]
        many = f"{len(steps)} texts, " if len(steps) > 1 else ""
        return f"{many}steps={max(steps)}, branches={sum(map(len, self.branches))}"

    def step_of(self, selected: dict[str, Any]) -> int:
        """Return the selected step, that of the token at "query"; the last unless there is one."""
        n_steps, query = self.branches[selected["prompt"]][0].n_steps, selected["query"]
        step = -1 if query is None else query - self._start(selected["prompt"])
        return step if 0 <= step < n_steps else n_steps - 1

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the entropy over the steps, or the candidates of the selected step."""
        from optlens import plots

        prompt, steps = selected["prompt"], self.steps(selected["prompt"], 0)
        names = self.prompts[prompt].tokens[self._start(prompt) :]
        if not detail:
            table = np.array([step.entropy for step in steps])
            kinds = ("own", "processed")
            series = {
                k: table[:, i] for i, k in enumerate(kinds) if not np.isnan(table[:, i]).any()
            }
            every = -(-len(names) // _NAMED)  # more names than that would run into each other
            rows = [name if i % every == 0 else " " for i, name in enumerate(names)]
            return plots.lens_trace(
                series, rows=rows, label="entropy, nats", xlabel="token written at each step",
                title="How undecided the model is at each step", style=style,
            )  # fmt: skip
        number = self.step_of(selected)
        step = steps[number]
        shares = step.own if step.after is None else step.after
        words = [self.label(int(i)) for i in step.ids]
        title = f"Step {number}: {names[number]} was written"
        return plots.next_tokens(words, shares, title=title, style=style)

    def fallback(self, prompt: int) -> list[Html]:
        """Return the last steps as a table: what was written, how likely it was, what else could be."""
        start, steps = self._start(prompt), self.steps(prompt, 0)
        body = []
        for number, step in list(enumerate(steps))[-_LAST:]:
            shares = step.own if step.after is None else step.after
            chosen = self.prompts[prompt].ids[start + number]
            place = int(np.flatnonzero(step.ids == chosen)[0])
            others = [int(i) for i in np.argsort(-shares, kind="stable") if i != place][:3]
            cells = [
                el("td", token(self.label(chosen))),
                el("td", percent(float(shares[place]))),
                el("td", [[token(self.label(int(step.ids[i]))), " "] for i in others]),
            ]
            body.append(el("tr", el("th", str(number)), cells))
        head = [el("th", text) for text in ("step", "written", "probability", "others")]
        caption = el("caption", "The last steps: what was written, and what else was likely")
        return [el("table", caption, el("thead", el("tr", head)), el("tbody", body))]
