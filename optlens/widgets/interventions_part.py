"""The numbers of the interventions view: what is in force, what it did, who wrote what.

Its questions are the ones that change what the other views show. What a click asks for arrives as a
small description (`{"do": "ablate", "part": "head", "layer": 3, "head": 2, "pos": None}`) and becomes
one of `optlens.interventions`; what is in force already is named by a number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.checks import InputError
from optlens.interventions import Ablate, Freeze, Intervention, Scale
from optlens.interventions.address import SITES
from optlens.plots.draw import percent
from optlens.recording import NotRecordedError
from optlens.report.markup import Html, el, token_label, visible
from optlens.report.pieces import token
from optlens.widgets.branches import lock_of
from optlens.widgets.contributors import Contributor, contributors, record_parts
from optlens.widgets.head_ablations import head_ablations
from optlens.widgets.live_run import LiveRun, Setting
from optlens.widgets.part import Part, QuestionError
from optlens.widgets.predictions import Predictions, predictions
from optlens.widgets.recipe import call_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.recording import Recording

SITE_OF = {"head": "z", "attention": "attn_out", "mlp": "mlp_out", "stream": "resid_post"}
_CLICKABLE = ("head", "mlp")
_PLACEHOLDERS = (9871, 9872)  # the layer and the head that a page puts in place of these
_MOST = 10  # contributors with a line of their own
_PAGE_CELLS = 48  # positions whose contributors a page holds


class InterventionsPart(Part):
    """Hold a run that can be changed.

    Args:
        run: the run.
    """

    kind = "interventions"
    title = "Prompt and interventions"

    def __init__(self, run: LiveRun):
        self.run = run
        self._numbers: dict[int, Intervention] = {}  # what the picture names by number
        self._next_number = itertools.count()
        self.renew()

    def renew(self) -> None:
        """Take over what the run gives now."""
        super().__init__(self.run.recording)
        self._parts: tuple[Setting | None, Recording | None] = None, None  # a setting and its run
        known = [each for setting in self.run.history for each in setting.interventions]
        held = self._numbers.items()
        self._numbers = {n: each for n, each in held if any(each is one for one in known)}
        self._predictions: dict[int, Predictions | None] = {}

    # --------------------------------------------------------------------------- what it gives

    def state(self, prompt: int) -> dict[str, Any]:
        """Return what is in force, what was predicted before and after, and the code for it."""
        run, config = self.run, self.recording.metadata["config"]
        found = self.predictions(prompt)
        return {
            "obstacle": run.obstacle,
            # As JSON in ASCII: it can be edited, and no mark in it acts on what it is written into.
            "prompt": json.dumps(self.prompts[prompt].text),
            "size": [config["num_hidden_layers"], config["num_attention_heads"]],
            "positions": self.prompts[prompt].positions,
            "inForce": [self._entry(n, each) for n, each in enumerate(run.now.interventions)],
            "heads": self._touched(),
            "at": run.at,
            "count": len(run.history),
            "code": run.now.code,
            "prediction": None if found is None else self._prediction_facts(prompt, found),
        }

    def predictions(self, prompt: int) -> Predictions | None:
        """Return the next tokens before and after; None if these were not recorded."""
        if prompt not in self._predictions:
            self._predictions[prompt] = predictions(
                self.run.original, self.recording, self.prompts[prompt]
            )
        return self._predictions[prompt]

    def _prediction_facts(self, prompt: int, found: Predictions) -> dict[str, Any]:
        return {
            "ids": found.ids,
            "before": found.before,
            "after": found.after,
            "kl": found.kl,
            "words": self._words(np.unique(found.ids)),
        }

    def _words(self, ids: Any) -> dict[str, str]:
        return {str(int(number)): token_label(self._label(int(number))) for number in ids}

    def _label(self, number: int) -> str:
        return self.recording.label(number)

    def _entry(self, place: int, each: Intervention) -> dict[str, Any]:
        number = next((n for n, known in self._numbers.items() if known is each), None)
        if number is None:
            number = next(self._next_number)
            self._numbers[number] = each
        return {"number": number, "call": visible(call_of(each, place)), **_description(each)}

    def _touched(self) -> list[list[int]]:
        """Return the heads on which something in force acts, `[[layer, head], ...]`."""
        config, found = self.recording.metadata["config"], set()
        for each in self.run.now.interventions:
            address = each.address
            if "head" not in SITES[address.site] and address.site != "attn_out":
                continue
            layers = _chosen(address.layer, config["num_hidden_layers"])
            heads = _chosen(address.head, config["num_attention_heads"])
            found |= {(layer, head) for layer in layers for head in heads}
        return [list(place) for place in sorted(found)]

    # ------------------------------------------------------------------------ what changes it

    def answer_live(self, prompt: int) -> dict[str, Any]:
        """Return whether there is Python to change the run with, and the newest state."""
        return {"live": self.run.obstacle is None, "state": self.state(prompt)}

    def answer_set(
        self, prompt: int, wanted: list[dict[str, Any]], text: str | None = None
    ) -> dict[str, Any]:
        """Run with the wanted interventions, on a new text if there is one; return the new state.

        The question names all that is to be in force, so that it may come twice, and that of two
        quick ones the newer is enough.

        Args:
            prompt: which prompt is on show.
            wanted: `{"number": n}` for what has been in force, else what a click asks for.
            text: a text to run on in its place.
        """
        given = self.run.now.prompt
        if text is not None and text == self.prompts[prompt].text:
            text = None
        changed: Any = text
        if text is not None and self.recording.is_batch:
            if not isinstance(given, list | tuple):
                raise QuestionError(
                    "These prompts were given as token ids; to run on texts, show "
                    "optlens.widgets.Explorer(model, [text, text, ...])."
                )
            changed = [text if n == prompt else each for n, each in enumerate(given)]
        try:
            if text is not None and not text:
                raise InputError("The prompt is empty; type some text.")
            self.run.change([self._made(each, prompt) for each in wanted], changed)
        except InputError as error:
            raise QuestionError(str(error)) from error
        return {"state": self.state(min(prompt, len(self.prompts) - 1))}

    def answer_go(self, prompt: int, at: int) -> dict[str, Any]:
        """Go back or forth to a setting by its number; return the new state."""
        self.run.go(at)
        return {"state": self.state(min(prompt, len(self.prompts) - 1))}

    def _made(self, wanted: dict[str, Any], prompt: int) -> Intervention:
        """Return what a description asks for, as the object that is in force if it is."""
        if "number" in wanted:
            if wanted["number"] not in self._numbers:
                raise QuestionError(
                    "This view is older than what Python has now; run its cell again."
                )
            return self._numbers[wanted["number"]]
        made = self._of_click(wanted, prompt)
        return next((each for each in self.run.now.interventions if each == made), made)

    def _of_click(self, wanted: dict[str, Any], prompt: int) -> Intervention:
        layer, site = wanted["layer"], SITE_OF[wanted["part"]]
        if layer == "embed":
            if site != "resid_post":
                raise QuestionError(f"Before the first layer there is no {wanted['part']}.")
            layer, site = 0, "resid_pre"
        place = {"layer": layer, "pos": wanted["pos"]}
        if site == "z":
            place["head"] = wanted["head"]
        other = wanted.get("other") or None
        if wanted["do"] == "scale":
            return Scale(site, factor=wanted["factor"], **place)
        if wanted["do"] == "patch":
            return Freeze(site, source=self._fitting(other, prompt), **place)
        if wanted["do"] == "mean":
            reference = self.run.now.prompt if other is None else other
            return Ablate(site, mode="mean", reference=reference, **place)
        return Ablate(site, **place)

    def _fitting(self, other: str | None, prompt: int) -> str:
        """Check that a prompt to patch from has as many tokens as the one on show."""
        if other is None:
            raise QuestionError("Type the prompt to patch from beside “other prompt”.")
        model, here = self.recording.model, len(self.prompts[prompt].ids)
        there = model.to_tokens(other).shape[-1]
        if there != here:
            pieces = " ".join(model.tokenizer.display_tokens(model.to_tokens(other)[0].tolist()))
            raise QuestionError(
                f"The other prompt has {there} tokens and this one {here}; position by position "
                f"there must be as many. It reads: {visible(pieces)}"
            )
        return other

    # -------------------------------------------------------------------------- who wrote it

    def answer_contributors(
        self, prompt: int, layer: int | str, query: int, token: int
    ) -> dict[str, Any]:
        """Return the heads and MLPs that wrote a lens cell's token, the strongest first.

        Args:
            prompt: which prompt.
            layer: the cell's row: a layer or "embed".
            query: its position.
            token: the token whose logit is divided.
        """
        if self.run.obstacle is not None:
            raise QuestionError(self.run.obstacle)
        try:
            with lock_of(self.recording.model):
                now = self.run.now
                made_for, parts = self._parts
                if made_for is not now:
                    parts = record_parts(self.recording, now)
                    self._parts = now, parts
                terms = contributors(parts, layer, query, token, prompt)
        except (ValueError, NotRecordedError) as error:
            raise QuestionError(str(error)) from error
        named = [term for term in terms if term.kind in _CLICKABLE]
        top = sorted(named, key=lambda term: -abs(term.value))[:_MOST]
        total = sum(term.value for term in terms)
        return {
            "label": token_label(self._label(token)),
            "parts": [_part_facts(term) for term in top],
            "rest": total - sum(term.value for term in top),
            "total": total,
        }

    # ------------------------------------------------------------------- pages without Python

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give what every head's ablation alone would do, and who wrote the predictions."""
        found = self.predictions(prompt)
        ablations = None
        if self.run.obstacle is None and found is not None:
            one, best = self.prompts[prompt], int(found.ids[-1, 0])
            now, last = self.run.now, one.positions[-1]
            # What is written into a prompt from another of its batch has no place in a run of its own.
            with suppress(InputError):
                ablations = head_ablations(self.recording, now, one, last, best)
            if ablations is not None:
                ablations["words"] = self._words(np.unique(ablations["ids"]))
                ablations["code"] = self.run.now.code_with(Ablate("z", *_PLACEHOLDERS))
        yield {"what": "live"}, {"live": False, "state": None, "ablations": ablations}
        if self.run.obstacle is not None or found is None:
            return
        last = self.recording.metadata["config"]["num_hidden_layers"] - 1
        one = self.prompts[prompt]
        for column in range(len(one.positions))[::-1][:_PAGE_CELLS]:
            wanted = {
                "layer": last,
                "query": one.positions[column],
                "token": int(found.ids[column, 0]),
            }
            try:
                answer = self.answer_contributors(prompt, **wanted)
            except QuestionError:  # a model whose stream is no sum
                return
            yield {"what": "contributors", **wanted}, answer

    # ---------------------------------------------------------------- pictures without a browser

    def counts(self) -> str:
        """Return how many are in force; nothing if none is."""
        count = len(self.run.now.interventions)
        return f"interventions={count}" if count else ""

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> Figure:
        """Return the next tokens at the selected position."""
        from optlens import plots

        found, one = self.predictions(selected["prompt"]), self.prompts[selected["prompt"]]
        if found is None:
            raise NotRecordedError("Record 'residual' to see predictions.")
        query = selected["query"]
        column = one.positions.index(query) if query in one.positions else -1
        words = [token_label(self._label(int(number))) for number in found.ids[column]]
        title = f"After {one.tokens[one.positions[column]]}"
        return plots.next_tokens(words, found.after[column], title=title, style=style)

    def fallback(self, prompt: int) -> list[Html]:
        """Return what is in force and what it did to the last prediction; nothing without any."""
        entries, found = self.run.now.interventions, self.predictions(prompt)
        if not entries:
            return []
        listed = el(
            "ul", [el("li", el("code", visible(call_of(e, n)))) for n, e in enumerate(entries)]
        )
        if found is None:
            return [el("p", "Under these interventions:"), listed]
        body = [
            el(
                "tr",
                el("td", token(token_label(self._label(int(number))))),
                el("td", percent(float(was))),
                el("td", percent(float(now))),
            )
            for number, was, now in zip(
                found.ids[-1], found.before[-1], found.after[-1], strict=True
            )
        ]
        head = el("tr", [el("th", name) for name in ("next token", "before", "now")])
        caption = el("caption", "The next token before and under the interventions")
        table = el("table", caption, el("thead", head), el("tbody", body))
        return [el("p", "Under these interventions:"), listed, table]


def _part_facts(term: Contributor) -> dict[str, Any]:
    return {
        "part": term.kind,
        "layer": term.layer,
        "head": term.head,
        "value": term.value,
    }


def _chosen(index: Any, count: int) -> list[int]:
    """Return the numbers that an address's layer or head means."""
    if isinstance(index, int):
        return [index % count]
    if isinstance(index, slice):
        return list(range(count)[index])
    return list(range(count)) if index is None else [number % count for number in index]


def _description(each: Intervention) -> dict[str, Any]:
    """Return what an intervention does in the words of a click, as far as a click could ask for it."""
    address = each.address
    parts = {site: part for part, site in SITE_OF.items()}
    part = (
        "stream" if address.site == "resid_pre" and address.layer == 0 else parts.get(address.site)
    )
    simple = isinstance(address.layer, int) and (part == "head") == isinstance(address.head, int)
    if part is None or not simple or not (address.pos is None or isinstance(address.pos, int)):
        return {"do": None}
    layer = "embed" if address.site == "resid_pre" else address.layer
    place = {"part": part, "layer": layer, "head": address.head, "pos": address.pos}
    if isinstance(each, Ablate) and each.mode == "zero":
        return {"do": "ablate", **place}
    if isinstance(each, Ablate) and each.mode == "mean" and not each.per_position:
        return {"do": "mean", **place}
    if isinstance(each, Scale):
        return {"do": "scale", "factor": each.factor, **place}
    if isinstance(each, Freeze) and isinstance(each.source, tuple) and len(each.source) == 1:
        return {"do": "patch", "other": visible(each.source[0]), **place}
    return {"do": None}
