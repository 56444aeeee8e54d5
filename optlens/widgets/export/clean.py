"""Markup that nobody vouches for, made harmless: what a notebook's prose and outputs hold.

The page's policy stops scripts and requests whatever stands in it. This comes before: of the markup
only what formats text stays, so that a page holds nothing that would wait for a weaker policy.
Scripts, styles, frames, forms and drawings are taken out with their contents; pictures stay if they
are in the notebook or beside it, since a page that is one file can have no others.
"""

import base64
import mimetypes
import os
import re
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from optlens.report.markup import Html

TEXT = "a abbr b blockquote br code dd del div dl dt em h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark"
TEXT += " ol p pre q s samp small span strong sub sup u ul var details summary figure figcaption"
TABLES = "table caption colgroup col thead tbody tfoot tr th td"
TAGS = frozenset(f"{TEXT} {TABLES}".split())
_LOST = ["script", "style", "template", "iframe", "object", "embed", "svg", "math", "head"]
_LOST += ["form", "button", "select", "textarea", "video", "audio", "canvas", "link", "meta"]
_PLAIN = {"title", "class", "dir", "lang"}
_OF_TAG = {
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    **{name: {"colspan", "rowspan", "scope", "align"} for name in ("th", "td", "tr")},
    "ol": {"start"},
    "details": {"open"},
}
_OWN = re.compile(r"(^|\s)(nb|ol)-")  # classes of the page itself
# Browsers read over the first of these in an address, and bleach over all.
_READ_OVER = re.compile(r"[\x00-\x20\x7f-\xa0\ufffd]")
_ALIGN = re.compile(r"text-align:\s*(left|right|center)")
# SVG as an image is drawn without its scripts and without what it would load.
_PICTURES = {"image/png", "image/jpeg", "image/gif", "image/webp", "image/svg+xml"}
_DATA = re.compile(r"data:(image/[\w.+-]+);base64,", re.IGNORECASE)
MOST_BYTES = 20_000_000  # of a picture beside the notebook


def cleaned(markup: str, folder: Path | None = None, attachments: Any = None) -> Html:
    """Return markup that formats text and does nothing else.

    Args:
        markup: any HTML.
        folder: where the notebook lies; pictures in it and below may be put into the page.
        attachments: pictures of a cell, `{name: {mime type: base64}}`.

    Example:
        >>> cleaned('<b onclick="go()">bold</b><script>go()</script>')
        '<b>bold</b>'
    """
    import bleach
    from bs4.element import PreformattedString

    soup = _read(markup)
    for lost in soup(_LOST):
        lost.decompose()
    for comment in soup(string=lambda text: isinstance(text, PreformattedString)):
        comment.extract()  # browsers differ from this reader on where some of them end
    for box in soup("input"):  # of a list of tasks; any other has no use in a page
        ticked = "☑ " if box.has_attr("checked") else "☐ "
        box.replace_with(ticked if box.get("type") == "checkbox" else "")
    for picture in soup("img"):
        _settle(picture, folder, attachments or {})
    for cell in soup(["th", "td", "tr"]):
        side = _ALIGN.search(cell.get("style", ""))
        if side:  # a style attribute would be stopped by the policy
            cell["align"] = side[1]
    text = bleach.clean(
        str(soup), tags=TAGS, attributes=_allowed, protocols={"http", "https", "mailto", "data"},
        strip=True, strip_comments=True,
    )  # fmt: skip
    return Html(text)


def _read(markup: str) -> Any:
    """Return markup as a tree."""
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
    from bs4.builder import ParserRejectedMarkup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        try:
            return BeautifulSoup(markup, "html.parser")
        except ParserRejectedMarkup:  # a marked section that is none: text, as in browsers
            return BeautifulSoup(markup.replace("<![", "&lt;!["), "html.parser")


def is_empty(markup: str) -> bool:
    """Say whether cleaned markup shows nothing."""
    return "<img" not in markup and not re.sub(r"<[^>]*>", "", markup).strip()


def picture_uri(kind: str, data: str) -> str:
    """Return a picture of an output as a data URI; SVG comes as text, others as base64."""
    if kind == "image/svg+xml":
        data = base64.b64encode(data.encode()).decode("ascii")
    return f"data:{kind};base64,{''.join(data.split())}"


def _allowed(tag: str, name: str, value: str) -> bool:
    if name == "class":
        return not _OWN.search(value)
    if name == "src":
        found = _DATA.match(value)
        return bool(found) and found[1].lower() in _PICTURES
    if name == "href":
        return not _READ_OVER.sub("", value).lower().startswith("data:")
    return name in _PLAIN or name in _OF_TAG.get(tag, ())


def _settle(picture: Any, folder: Path | None, attachments: dict[str, Any]) -> None:
    """Put the picture that an element names into it, or words where it is not to be had."""
    source = picture.get("src", "").strip()
    if _DATA.match(source):
        return
    if source.startswith("attachment:"):
        found = attachments.get(unquote(source.removeprefix("attachment:")), {})
        kind = next((kind for kind in found if kind in _PICTURES), None)
        lines = found[kind] if kind else ""  # base64 may be saved in one piece or in many
        uri = f"data:{kind};base64,{''.join(''.join(lines).split())}" if kind else None
    else:
        try:
            uri = _beside(source, folder)
        except (OSError, ValueError):  # not to be read, or no path at all
            uri = None
    if uri:
        picture["src"] = uri
        return
    words = picture.get("alt") or source
    picture.replace_with(f"[picture not in this page: {words}]")


def _beside(source: str, folder: Path | None) -> str | None:
    """Return a picture file beside or below the notebook as a data URI; None if it is none."""
    kind = mimetypes.guess_type(source)[0]
    if folder is None or kind not in _PICTURES or "://" in source:
        return None
    base = os.path.realpath(folder)
    file = os.path.realpath(os.path.join(base, unquote(source)))
    # A notebook of somebody else's must not bring other files of this machine into the page.
    if os.path.commonpath([base, file]) != base or not os.path.isfile(file):
        return None
    if os.path.getsize(file) > MOST_BYTES:
        return None
    return f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode('ascii')}"
