"""The widget that shows parts of a recording in a notebook, and writes them to files.

One class serves all views: it carries the parts' states to the browser, answers the picture's later
questions, and refers to the selection that links it to other views. What there is to see is decided
by the parts (numbers) and by the JavaScript modules of the same name (pictures).
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import anywidget
import traitlets
from ipywidgets import widget_serialization

from optlens.files import replacing
from optlens.report.markup import Html, el, visible
from optlens.widgets import cells
from optlens.widgets.arrays import packed, with_buffers
from optlens.widgets.home import Home
from optlens.widgets.modules import view_module
from optlens.widgets.part import Part
from optlens.widgets.selection import Selection, selection_of
from optlens.widgets.stylesheet import stylesheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.recording import Recording


class View(anywidget.AnyWidget):
    """Show parts of one recording; `AttentionView` and its neighbours say which.

    Attributes:
        recording: what is shown.
        selected: the selected place, as `Selection.value` describes it. It changes with clicks
            (`view.observe(fn, "selected")` hears of them), and setting it, or some of it, changes
            the picture and every linked view.
        selection: the `Selection` behind it; give the same one to views that shall be linked. Views
            of one recording share one unless told otherwise.
    """

    # What the state means to JavaScript; counted up when a module of another version could not draw it.
    FORMAT = 1

    kinds: tuple[str, ...] = ()
    _css = stylesheet()

    prompts = traitlets.List().tag(sync=True)
    parts = traitlets.List().tag(sync=True)
    selection = traitlets.Instance(Selection).tag(sync=True, **widget_serialization)
    selected = traitlets.Dict()
    format = traitlets.Int(FORMAT, read_only=True).tag(sync=True)
    version = traitlets.Int(0).tag(sync=True)  # counts up with each new set of parts

    def __init_subclass__(cls, **options: Any) -> None:
        """Give each class the one JavaScript module that draws its parts."""
        if "kinds" in cls.__dict__:  # not in the class that traitlets derives for each instance
            cls._esm = view_module(*cls.kinds)
        super().__init_subclass__(**options)

    def __init__(
        self, recording: Recording, parts: list[Part], selection: Selection | None = None
    ) -> None:
        self.recording = recording
        self._parts = parts
        is_given = selection is not None
        selection = selection_of(recording) if selection is None else selection
        prompt = selection.value["prompt"]
        if prompt >= len(parts[0].prompts) and not is_given:
            prompt = 0  # shared with an explorer of more prompts
        elif prompt >= len(parts[0].prompts):
            raise ValueError(
                f"The selection is at prompt {prompt}, but the recording has "
                f"{len(parts[0].prompts)}; give another selection=."
            )
        super().__init__(
            selection=selection,
            selected=selection.value,
            prompts=[self._prompt_facts(index) for index in range(len(parts[0].prompts))],
            parts=[self._part_facts(part, prompt, data=packed) for part in parts],
        )
        traitlets.link((selection, "value"), (self, "selected"))
        home = Home()
        self.on_msg(lambda *message: home.run(partial(self._answer, *message)))

    @traitlets.validate("selected")
    def _complete(self, proposal: Any) -> dict[str, Any]:
        return self.selection.completed(proposal["value"])

    @property
    def _prompt(self) -> int:
        """The selected prompt; the first if a view of more prompts has selected another."""
        prompt = self.selected["prompt"]
        return prompt if prompt < len(self._parts[0].prompts) else 0

    def _show(self, recording: Recording, parts: list[Part], prompt: int) -> None:
        """Show other parts, of another recording, in place of the present ones."""
        self.recording, self._parts = recording, parts
        with self.hold_sync():  # one message for all
            self.prompts = [self._prompt_facts(index) for index in range(len(parts[0].prompts))]
            self.parts = [self._part_facts(part, prompt, data=packed) for part in parts]
            self.version += 1

    # ------------------------------------------------------------------------------ to files

    def to_html(self, path: str | os.PathLike) -> None:
        """Write one self-contained page with the same picture: no kernel, no network.

        What the page would ask a kernel for is in it, attention of long prompts shrunk so that all
        of it fits; where that is so, the picture says it. The same view gives the same bytes.

        Raises:
            OSError: if the file cannot be written; nothing is changed then.
        """
        from optlens.widgets.page import html_page

        page = html_page(self)
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def to_png(
        self,
        path: str | os.PathLike,
        style: Literal["light", "dark"] = "light",
        detail: bool = False,
    ) -> None:
        """Write the view's figure as a PNG file, drawn without a browser.

        Args:
            path: the file.
            style: the theme.
            detail: draw the selected head or position alone.
        """
        self._write_figure(path, "png", style, detail)

    def to_svg(
        self,
        path: str | os.PathLike,
        style: Literal["light", "dark"] = "light",
        detail: bool = False,
    ) -> None:
        """Write the view's figure as an SVG file; see `to_png`."""
        self._write_figure(path, "svg", style, detail)

    def figure(self, style: Literal["light", "dark"] = "light", detail: bool = False) -> Figure:
        """Return the view's first part as a matplotlib figure; see `to_png`."""
        return self._parts[0].figure(self.selected | {"prompt": self._prompt}, style, detail)

    def _write_figure(self, path: str | os.PathLike, kind: str, style: str, detail: bool) -> None:
        import matplotlib

        figure = self.figure(style, detail)
        # Without these, the file would hold the time and random ids.
        facts = {"Date": None} if kind == "svg" else {"Software": None}
        with matplotlib.rc_context({"svg.hashsalt": "optlens"}), replacing(path) as temporary:
            figure.savefig(temporary, format=kind, facecolor=figure.get_facecolor(), metadata=facts)

    # ------------------------------------------------------------------------- in a notebook

    def static(self) -> Still:
        """Return a picture without JavaScript, for documents, GitHub and e-mail."""
        return Still(repr(self), self._fallback())

    def __repr__(self) -> str:
        """Return a line that is the same on every run."""
        return f"{type(self).__name__}({self._parts[0].counts()})"

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict, dict] | None:
        """Return the widget, and plain markup for frontends that show no widgets."""
        bundle = super()._repr_mimebundle_(**options)
        cells.shown(self)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/html": str(self._fallback()), "text/plain": repr(self)}, metadata

    def _fallback(self) -> Html:
        prompt = self._prompt
        text = el("p", el("b", visible(self._parts[0].prompts[prompt].text)))
        return el("div", text, [part.fallback(prompt) for part in self._parts])

    # ------------------------------------------------------------------------------- messages

    def _prompt_facts(self, index: int) -> dict[str, Any]:
        prompt = self._parts[0].prompts[index]
        config = self.recording.metadata["config"]
        special = {config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
        return {
            "text": visible(prompt.text),
            "tokens": prompt.tokens,
            "ids": prompt.ids,
            "special": [i for i, number in enumerate(prompt.ids) if number in special],
        }

    @staticmethod
    def _part_facts(part: Part, prompt: int, data: Any) -> dict[str, Any]:
        facts = {"kind": part.kind, "title": part.title, "prompt": prompt}
        return facts | {"state": data(part.state(prompt))}

    def _answer(self, _: Any, message: dict[str, Any], __: Any) -> None:
        """Answer a question of the picture; what goes wrong is shown there, not lost in a log."""
        if message.get("kind") != "ask":
            return
        try:
            content, buffers = with_buffers(self.answer(message["question"]))
        except Exception as error:  # the one place where an error becomes a sentence in the view
            reply = {"kind": "error", "id": message.get("id"), "message": visible(str(error))}
            self.send(reply)
        else:
            self.send({"kind": "answer", "id": message["id"], "content": content}, buffers)

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return what the picture asks for: JSON with arrays.

        Args:
            question: `{"part": number, "prompt": number, "what": name}` and what that needs.

        Raises:
            QuestionError: if there is no answer, saying why.
        """
        wanted = dict(question)
        part = self._parts[wanted.pop("part")]
        prompt = wanted.pop("prompt")
        what = wanted.pop("what")
        return part.state(prompt) if what == "state" else part.answer(prompt, what, **wanted)


class Still:
    """Hold a picture of a view as plain markup, as `view.static()` returns it."""

    def __init__(self, name: str, markup: Html):
        self._name = name
        self._markup = markup

    def __repr__(self) -> str:
        """Return the view's own line."""
        return f"<{self._name}, static>"

    def _repr_html_(self) -> str:
        return str(self._markup)
