"""What cells have printed, returned and shown, as markup that does nothing by itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optlens.report.markup import Html, el, visible
from optlens.widgets.export.clean import cleaned, is_empty, picture_uri
from optlens.widgets.export.prose import code, markdown, terminal
from optlens.widgets.export.saved import CannotRebuild, Saved

VIEW = "application/vnd.jupyter.widget-view+json"
_PICTURES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp")
MOST_AGAIN = 200  # places of widgets that stand elsewhere too: few boxes can name millions
DEEPEST_BOX = 32  # boxes inside each other, far beyond what a screen shows
_TOO_OFTEN = f"A page repeats widgets at most {MOST_AGAIN} times."
_ENDLESS = f"This box stands in itself, or in more than {DEEPEST_BOX - 1} others."


@dataclass
class Outputs:
    """Write outputs, and count what could not be shown as it was.

    Attributes:
        saved: the notebook's saved widgets.
        folder: where the notebook lies.
        alive: how many views were rebuilt, each place in which one is shown counting once.
        reasons: why others were not, each with how many.
        met: the widgets that have a place.
        again: how many places are not the first of their widget.
    """

    saved: Saved
    folder: Path
    alive: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)
    again: int = 0

    def written(self, output: Any) -> Html:
        """Return one output of a cell."""
        kind = output.output_type
        if kind == "stream":
            name = "nb-text nb-stderr" if output.get("name") == "stderr" else "nb-text"
            return el("pre", terminal(output.get("text", "")), class_=name, tabindex="0")
        if kind == "error":
            lines = output.get("traceback") or [f"{output.ename}: {output.evalue}"]
            return el("pre", terminal("\n".join(lines)), class_="nb-text nb-error", tabindex="0")
        data = output.get("data", {})
        if VIEW in data:
            named = data[VIEW] if isinstance(data[VIEW], dict) else {}
            key = str(named.get("model_id", ""))
            return self._widget(key, self._still(data, output.get("metadata", {})))
        return self._still(data, output.get("metadata", {}))

    def _widget(self, key: str, still: Html | None, around: tuple[str, ...] = ()) -> Html:
        """Return the place of a widget, with what stands there until, or unless, it is drawn.

        Args:
            key: the widget's model.
            still: what was saved beside it.
            around: the boxes that it stands in.
        """
        try:
            if self._too_often(key):
                raise CannotRebuild(_TOO_OFTEN)
            self.again += key in self.met
            self.met.add(key)
            box = self.saved.box(key)
            if box is not None:
                if key in around or len(around) >= DEEPEST_BOX:
                    raise CannotRebuild(_ENDLESS)
                direction, children = box
                inner = self._inner(children, (*around, key))
                return el("div", inner, class_=f"nb-box nb-{direction}")
            number = self.saved.view(key)
        except CannotRebuild as reason:
            self.reasons[str(reason)] = self.reasons.get(str(reason), 0) + 1
            return el("div", note(f"Not interactive in this page. {reason}"), still)
        self.alive += 1
        return el("div", still, class_="nb-view", data_view=number)

    def _inner(self, children: list[str], around: tuple[str, ...]) -> list[Html]:
        """Return what a box holds; one note stands for all children that are met too often."""
        inner, said = [], False
        for child in children:
            refused = self._too_often(child)
            if not (refused and said):
                inner.append(self._widget(child, None, around))
            said |= refused
        return inner

    def _too_often(self, key: str) -> bool:
        return key in self.met and self.again >= MOST_AGAIN

    def _still(self, data: Any, metadata: Any) -> Html | None:
        """Return the best of an output's forms that needs no script."""
        if "text/html" in data:
            markup = cleaned(_text(data["text/html"]))
            if not is_empty(markup):
                return el("div", markup, class_="nb-html")
        if "text/markdown" in data:
            return el("div", markdown(_text(data["text/markdown"])), class_="nb-prose")
        for kind in _PICTURES:
            if kind in data:
                size = metadata.get(kind, {})
                wide = size.get("width") if isinstance(size, dict) else None
                words = visible(_text(data.get("text/plain", "picture")))
                uri = picture_uri(kind, _text(data[kind]))
                return el("img", src=uri, alt=words, width=wide, class_="nb-picture")
        if "text/latex" in data:
            source = _text(data["text/latex"]).strip()
            return el("div", markdown(source), class_="nb-prose")
        if "text/plain" in data:
            return el("pre", terminal(_text(data["text/plain"])), class_="nb-text", tabindex="0")
        if not data:
            return None
        return note(f"An output of this kind needs a notebook: {', '.join(sorted(data))}.")


def note(words: str) -> Html:
    """Return a remark of the page itself."""
    return el("p", visible(words), class_="nb-note")


def source_of(cell: Any, language: str) -> Html:
    """Return the code of a cell."""
    return code(_text(cell.source), language)


def _text(value: Any) -> str:
    return "".join(value) if isinstance(value, list) else str(value)
