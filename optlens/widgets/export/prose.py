"""A notebook's text as markup: Markdown with formulas, code in colours, terminal output.

Markdown is read by mistune, as nbconvert sets it up, so that it comes out as it does in Jupyter.
Formulas are drawn by matplotlib, which is at hand, where Jupyter would load MathJax; one that
matplotlib cannot draw stays as it was written.
"""

import functools
import io
import re
from pathlib import Path
from typing import Any

from optlens.report.markup import Html, el
from optlens.widgets.export.clean import cleaned, picture_uri

DEEPEST = 24  # pixels that a formula may hang below the line it stands in


def markdown(source: str, folder: Path | None = None, attachments: Any = None) -> Html:
    """Return Markdown as harmless markup; see `cleaned` for pictures."""
    from nbconvert.filters.markdown_mistune import MarkdownWithMath

    renderer = _renderer()(escape=False, exclude_anchor_links=True)
    return cleaned(MarkdownWithMath(renderer=renderer).render(source), folder, attachments)


@functools.cache
def _renderer() -> type:
    from mistune import HTMLRenderer
    from nbconvert.filters.markdown_mistune import IPythonRenderer

    class Renderer(IPythonRenderer):
        """Draws formulas, and leaves pictures to `cleaned`."""

        def image(self, text: str, url: str, title: str | None = None) -> str:
            """Return a picture as it is named."""
            return HTMLRenderer.image(self, text, url, title)

        def block_math(self, body: str) -> str:
            """Return a formula on a line of its own."""
            # Fractions on a line of their own are as large there as the rest.
            return el("div", formula(body.replace(r"\frac", r"\dfrac"), True), class_="math-block")

        def latex_environment(self, name: str, body: str) -> str:
            """Return an environment, as matplotlib knows none, as it is written."""
            written = f"\\begin{{{name}}}{body}\\end{{{name}}}"
            return el("div", formula(written, True), class_="math-block")

        def inline_math(self, body: str) -> str:
            """Return a formula in a line."""
            return formula(body, False)

        def block_mermaidjs(self, code: str) -> str:
            """Return a diagram's source; drawing it would take a library from elsewhere."""
            return el("pre", code)

    return Renderer


def formula(tex: str, large: bool) -> Html:
    """Return a formula as a picture, or as it is written if it cannot be drawn."""
    try:
        picture, depth = _drawn(" ".join(tex.split()), 14 if large else 12)
    except (ValueError, RecursionError):  # more, or deeper, TeX than matplotlib can read
        return el("code", tex.strip(), class_="math-source")
    uri = picture_uri("image/svg+xml", picture)
    return el("img", src=uri, alt=tex.strip(), class_=f"math math-{min(depth, DEEPEST)}")


@functools.lru_cache(512)
def _drawn(tex: str, points: int) -> tuple[str, int]:
    """Return a formula as SVG, and how many pixels of it lie below the line."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    # The user's style, say white text on black, is not for this page, and would stay in the cache.
    look = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    look |= {"mathtext.fontset": "stix", "svg.fonttype": "path", "svg.hashsalt": "optlens"}
    with matplotlib.rc_context(look):
        font = FontProperties(size=points)
        text = f"${tex}$"
        width, height, depth, *_ = MathTextParser("path").parse(text, dpi=72, prop=font)
        figure = Figure(figsize=((width + 1) / 72, (height + 1) / 72))
        figure.text(0, (depth + 0.5) / (height + 1), text, fontproperties=font)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue(), round(depth * 96 / 72)


def code(source: str, language: str = "ipython3") -> Html:
    """Return code as a block with a class for each kind of word."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import TextLexer, get_lexer_by_name
    from pygments.util import ClassNotFound

    lexer: Any = TextLexer(stripnl=False)
    for name in (language, "python" if "python" in language else ""):
        try:
            lexer = get_lexer_by_name(name, stripnl=False)
            break
        except ClassNotFound:
            continue
    marked = highlight(source, lexer, HtmlFormatter(nowrap=True)).rstrip("\n")
    return el("pre", el("code", Html(marked)), class_="nb-code", tabindex="0")


_STYLED = re.compile(r' style="[^"]*"')


def terminal(text: str) -> Html:
    """Return what a program has printed, with its colours; a line written over shows its end."""
    from nbconvert.filters.ansi import ansi2html

    # Plain splitting, as a pattern would try a long line again from each of its characters.
    text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    # Colours beyond the sixteen would be style attributes, which the page's policy stops.
    return Html(_STYLED.sub("", str(ansi2html(text))))
