"""The pieces that sections of the page share: tokens, tables that scroll, bars."""

import numpy as np

from optlens.plots.draw import percent
from optlens.report.facts import Facts
from optlens.report.markup import Html, el

LEVELS = 10  # steps of the colour classes p0..p10, e0..e10, k0..k10, n0..n10


def token(text: str) -> Html:
    """Return a token in its own direction and typeface."""
    return el("bdi", text)


def section(anchor: str, title: str, lead: str | None, *children: object) -> Html:
    """Return a section with its heading, a quiet sentence about it, and what it shows."""
    return el(
        "section",
        el("h2", title, id=f"{anchor}-h"),
        el("p", lead, class_="quiet") if lead else None,
        list(children),
        id=anchor,
        aria_labelledby=f"{anchor}-h",
    )


def bar_row(
    first: list[object], share: float, kind: str | None, more: list[Html] | None = None
) -> Html:
    """Return a row of a table with a bar and its number; NaN has neither."""
    known = not np.isnan(share)
    bar = el("i", style=f"--w:{100 * share:.1f}") if known else None
    return el(
        "tr",
        el("th", first, scope="row"),
        more,
        el("td", bar, class_="bar", aria_hidden="true"),
        el("td", percent(share) if known else "?", class_="n"),
        class_=kind,
    )


def bar_table(columns: list[str], rows: list[Html]) -> Html:
    """Return a table of `bar_row`s; a column without a name holds the bars."""
    head = [
        el("th", name, scope="col", class_="n" if name in ("rank", "probability") else None)
        if name
        else el("td", aria_hidden="true")
        for name in columns
    ]
    return el("table", el("thead", el("tr", head)), el("tbody", rows), class_="bars")


def column_names(facts: Facts) -> Html:
    """Return the head of a table with a column for every recorded position, the last one marked."""
    names = [el("th", "after layer", scope="col")]
    for position in facts.positions:
        last = "last" if position == len(facts.tokens) - 1 else None
        label = [token(facts.tokens[position]), el("small", position)]
        names.append(el("th", label, scope="col", class_=last))
    return el("tr", names)


def scroll(table: Html, name: str) -> Html:
    """Wrap a wide table so that it scrolls by itself, by keyboard too."""
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label=name)


def level(share: float) -> int:
    """Return the colour class of a share of the largest value, 0..1, NaN counting as 0."""
    return int(round(LEVELS * float(np.clip(np.nan_to_num(share), 0.0, 1.0))))
