"""A view as one HTML file: the same modules, the same state, and answers to what it may ask.

The page states its own policy: nothing is loaded, and nothing runs or styles but what is written in
it, known by its hash. The state lies in a data block, in which every `<` is written as an escape, so
that no token can end it.
"""

import json
from typing import TYPE_CHECKING, Any

from optlens.report.markup import Html, el, visible
from optlens.report.page import around, digest, page_head
from optlens.widgets.arrays import as_text, packed
from optlens.widgets.modules import page_module
from optlens.widgets.stylesheet import stylesheet

if TYPE_CHECKING:
    from optlens.widgets.view import View

_MODEL = "selection"  # what the page calls the shared selection


def html_page(view: "View") -> str:
    """Return the page of a view; the same view gives the same text."""
    title = visible(" ".join(view._parts[0].prompts[0].text.split()))
    sheet, script = _page_sheet() + stylesheet(), page_module(*view.kinds)
    policy = (
        f"default-src 'none'; style-src '{digest(sheet)}'; script-src '{digest(script)}'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    head = page_head(title, policy, sheet)
    body = el(
        "body",
        el("main", id="view"),
        el("noscript", view._fallback()),
        el("script", Html(escaped(contents(view))), type="application/json", id="contents"),
        el("script", Html(script), type="module"),
    )
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def contents(view: "View") -> dict[str, Any]:
    """Return what a page's stand-in for the kernel needs: the states, and all answers."""
    answers = []
    for number, part in enumerate(view._parts):
        for prompt in range(len(part.prompts)):
            place = {"part": number, "prompt": prompt}
            if prompt != view._prompt:
                answers.append([{**place, "what": "state"}, part.state(prompt)])
            answers += [[place | question, found] for question, found in part.page_answers(prompt)]
    prompt = view._prompt
    parts = [view._part_facts(part, prompt, data=lambda state: state) for part in view._parts]
    state = {"format": view.format, "prompts": view.prompts, "parts": parts}
    state["selection"] = f"IPY_MODEL_{_MODEL}"
    filled = {"state": state, "selected": view.selected, "answers": answers}
    return packed(filled, as_text)


def escaped(value: Any) -> str:
    """Return JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Inside a script these two are line ends to some parsers; `<` could end or open a tag.
    for char in "<\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _page_sheet() -> str:
    light, dark = (around(name)["page"] for name in ("light", "dark"))
    return (
        f"html{{color-scheme:light dark}}body{{margin:0;background:{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{body{{background:{dark}}}}}"
        "main,noscript{display:block;box-sizing:border-box;max-width:90rem;margin:0 auto;"
        "padding:clamp(.5rem,2.5vw,2rem)}noscript{font-family:system-ui,sans-serif;background:#fff}\n"
    )
