"""Show a recording: write its page to a file, or stand for it in a notebook.

In a notebook an untrusted cell keeps only plain markup: no script, no style sheet, no frame. So the
view is a table of pictures (data URIs) and a table of words, which survive every sanitiser, and its
repr is the same on every run, which lets tests compare notebooks.
"""

import os
from typing import TYPE_CHECKING

from optlens.files import replacing
from optlens.plots.draw import percent
from optlens.plots.style import STYLES
from optlens.report.facts import Facts, gather
from optlens.report.markup import Html, el, visible
from optlens.report.page import html_page
from optlens.report.pictures import attention_png
from optlens.report.pieces import token

if TYPE_CHECKING:
    from optlens.recording import Recording

_SIDE = 72  # pixels of one head's picture in a notebook


def write_html(recording: "Recording", path: str | os.PathLike, top_k: int = 5) -> None:
    """Write one self-contained page about a recording: no kernel, no network.

    The page shows the tokens, the next-token predictions and their way through the layers, the
    logit lens, every attention head and the residual stream, in light and dark. The same recording
    gives the same bytes. What was not recorded is left out.

    Args:
        recording: what to show; of a batch, every prompt.
        path: the file to write; an existing one is replaced when the page is complete.
        top_k: how many tokens a cell of the logit lens lists.

    Raises:
        OSError: when the file cannot be written; nothing is changed then.
        ValueError: when `top_k` is under 1.

    Example:
        >>> import optlens
        >>> recording = optlens.load().record("The cat sat on the")
        >>> write_html(recording, "recording.html")  # doctest: +SKIP
    """
    page = html_page(gather(recording, top_k))
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


class RecordingView:
    """Stand for a recording in a notebook, as `recording.show()` returns it.

    Args:
        recording: what to show.

    Example:
        >>> import optlens
        >>> optlens.load().record("The cat sat on the").show()  # doctest: +ELLIPSIS
        RecordingView(6 tokens, ... layers of ... heads)
    """

    def __init__(self, recording: "Recording"):
        self.recording = recording
        self._prompts = gather(recording)

    def __repr__(self) -> str:
        """Return a line that is the same on every run."""
        counts = sorted({len(facts.tokens) for facts in self._prompts})
        several = f"{len(self._prompts)} prompts, " if len(self._prompts) > 1 else ""
        tokens = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        return f"RecordingView({several}{tokens} tokens, {self._prompts[0].shape})"

    def _repr_html_(self) -> str:
        """Return plain markup that a notebook shows even when it is not trusted."""
        return el("div", [_prompt(facts) for facts in self._prompts])


def _prompt(facts: Facts) -> Html:
    parts = [el("p", el("b", visible(facts.prompt)))]
    if facts.lens is not None:
        parts.append(_lens_table(facts))
    if facts.attention is not None:
        parts.append(_heads(facts))
    return el("div", parts)


def _lens_table(facts: Facts) -> Html:
    """Return the top word and its probability for each row, at the last twelve positions."""
    shown = range(len(facts.positions))[-12:]
    head = [el("th", token(facts.tokens[facts.positions[column]])) for column in shown]
    body = []
    for row, name in enumerate(facts.lens.rows):
        cells = []
        for column in shown:
            word, prob = facts.lens.words[row][column][0], facts.lens.probs[row, column, 0]
            cells.append(el("td", token(word), el("br"), el("small", percent(float(prob)))))
        body.append(el("tr", el("th", name), cells))
    caption = el("caption", "Logit lens: top token after each layer")
    return el("table", caption, el("thead", el("tr", el("th", "layer"), head)), el("tbody", body))


def _heads(facts: Facts) -> Html:
    zoom = max(1, _SIDE // len(facts.tokens))
    rows = [el("tr", el("th", "layer \\ head"), [el("th", head) for head in facts.heads])]
    for i, layer in enumerate(facts.layers):
        pictures = []
        for j, head in enumerate(facts.heads):
            source = attention_png(facts.attention[i, j], STYLES["light"], _SIDE, zoom)
            alt = f"attention of layer {layer}, head {head}"
            pictures.append(el("td", el("img", src=source, alt=alt, width=_SIDE)))
        rows.append(el("tr", el("th", layer), pictures))
    return el("table", el("caption", "Attention of every head"), el("tbody", rows))
