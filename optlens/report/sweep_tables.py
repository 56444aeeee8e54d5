"""The tables of a sweep: a coloured cell for each patch, with a note that says all about it."""

import numpy as np

from optlens.report.markup import Html, el, visible
from optlens.report.pieces import LEVELS, token
from optlens.report.sweep_facts import Axis, SweepFacts


def number(value: float, limit: float) -> str:
    """Return a number with as many decimals as suit the largest of its table; NaN is a dash.

    Example:
        >>> number(0.126, 1.0), number(-0.001, 1.0), number(52.13, 80.0), number(float("nan"), 1.0)
        ('0.13', '0.00', '52.1', '–')
    """
    if np.isnan(value):
        return "–"
    if limit < 0.01:
        return f"{value:.1e}" if value else "0"
    decimals = 3 if limit < 0.1 else 2 if limit < 10 else 1 if limit < 100 else 0
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def cell_table(facts: SweepFacts, cells: np.ndarray, rows: Axis | None, columns: Axis) -> Html:
    """Return a table of patches.

    Args:
        facts: What was found.
        cells: Flat indices of the patches to show, [row, column].
        rows: What the rows are; None for a single row.
        columns: What the columns are.
    """
    corner = f"{rows.name} ↓ {columns.name} →" if rows else columns.name
    heads = [el("th", corner, scope="col")]
    for place, heading in enumerate(columns.headings):
        other, count = columns.others[place], columns.numbers[place]
        label = [token(heading), el("bdi", other, class_="other") if other else None]
        label.append(el("small", count) if count else None)
        swap = "swap" if other else None
        heads.append(el("th", label, scope="col", class_=swap, title=columns.place(place)))
    body = []
    for place, line in enumerate(cells):
        name = _row_name(rows, place) if rows else facts.scale
        body.append(el("tr", el("th", name, scope="row"), [_cell(facts, int(at)) for at in line]))
    return el("table", el("thead", el("tr", heads)), el("tbody", body), class_="grid lens sweep")


def themed_legend(facts: SweepFacts) -> Html:
    """Return the scale of the colours, in both themes."""
    middle = 1.0 if facts.scale == "normalized" and facts.kind.from_clean else 0.0
    ends = [number(middle + sign * facts.limit, facts.limit) for sign in (-1, 1)]
    what = (
        "normalized" if facts.scale == "normalized" else f"change of {visible(facts.short_metric)}"
    )
    return el(
        "p",
        el("span", what, ": ", ends[0], el("span", class_="swing"), ends[1]),
        el("span", f"colourless ({middle:.0f}): as without the patch"),
        el("span", el("span", class_="unseen"), "not computed") if facts.missing else None,
        class_="legend",
    )


def level_class(effect: float, limit: float) -> str:
    """Return the colour class of an effect: u1..u10 above zero, d1..d10 below, z at it."""
    if np.isnan(effect):
        return "gone"
    level = int(round(LEVELS * float(np.clip(abs(effect) / limit, 0.0, 1.0))))
    return "z" if level == 0 else f"{'d' if effect < 0 else 'u'}{level}"


def _row_name(axis: Axis, place: int) -> list[object]:
    return [token(axis.headings[place]), el("small", axis.numbers[place] or None)]


def _cell(facts: SweepFacts, at: int) -> Html:
    index = tuple(map(int, np.unravel_index(at, facts.values.shape)))
    effect, shown = float(facts.effect[index]), float(facts.shown[index])
    lines = [facts.place(index)]
    if np.isnan(effect):
        lines[0] += ": not computed" if facts.lacking[index] else ": the metric is NaN"
    else:
        lines.append(f"{number(shown, min(facts.limit, 0.099))}  {facts.scale}")
        lines.append(f"{facts.values[index]:.5g}  {visible(facts.short_metric)}")
        if facts.low is not None and not np.isnan(facts.low[index]):
            ends = f"{facts.low[index]:.4g} to {facts.high[index]:.4g}"
            lines.append(f"{ends}  95 % interval of it")
    kind = level_class(effect, facts.limit)
    best = " best" if facts.top and index == facts.top[0] and effect else ""
    return el("td", number(shown, facts.limit), class_=kind + best, title="\n".join(lines))
