"""Write the sections of the page about a sweep."""

import numpy as np

from optlens.plots.style import STYLES
from optlens.report.markup import Html, el, visible
from optlens.report.pictures import sweep_png
from optlens.report.pieces import scroll, section, token
from optlens.report.sweep_facts import Axis, PromptFacts, SweepFacts
from optlens.report.sweep_tables import cell_table, number, themed_legend

_MOST_PROMPTS = 20
_MOST_CELLS = 10_000  # of one table; beyond, and over so many columns, a picture is drawn
_MOST_COLUMNS = 200


def header(facts: SweepFacts, anchors: list[tuple[str, str]]) -> Html:
    """Return the page's head: what was done, what it found, links to the sections."""
    links = [el("a", name, href=f"#{anchor}") for anchor, name in anchors]
    return el(
        "header",
        el("p", "optlens", class_="mark"),
        el("h1", visible(facts.title)),
        _finding(facts),
        partial(facts),
        el("nav", links, aria_label="Sections"),
    )


def partial(facts: SweepFacts) -> Html | None:
    """Say so where the sweep was cut short."""
    if not facts.missing:
        return None
    return el(
        "p",
        el("b", "Not complete. "),
        f"{facts.missing:,} of {facts.values.size:,} patches were not computed; their cells are "
        "grey. What follows is about the others.",
        class_="partial",
        role="note",
    )


def measured(facts: SweepFacts) -> Html:
    """Return the metric, its two ends, and how to read the numbers."""
    several = len(facts.prompts) > 1
    rows = [("Clean run" if facts.kind.has_corrupt else "Run without a patch", facts.clean)]
    if facts.kind.has_corrupt:
        rows.append(("Corrupt run", facts.corrupt))
    mean = f", mean of {len(facts.prompts)} prompts" if several else ""
    body = [el("tr", el("th", name, scope="row"), el("td", f"{v:.4g}")) for name, v in rows]
    head = el(
        "tr",
        el("th", "run", scope="col"),
        el("th", visible(facts.short_metric), mean, scope="col", class_="n"),
    )
    return section(
        "measured",
        "What was measured",
        None,
        el("p", visible(facts.meaning), class_="lead"),
        el("table", el("thead", head), el("tbody", body), class_="ends"),
        el("p", visible(facts.kind.doing), " ", el("b", _scale(facts)), class_="lead"),
        _standing(facts),
    )


def prompts(facts: SweepFacts) -> Html | None:
    """Return the prompts cut into tokens; those in which the two differ stand out."""
    if not facts.prompts:
        return None
    pairs = [_pair(facts, place) for place in range(min(len(facts.prompts), _MOST_PROMPTS))]
    shown: list[object] = pairs[:1]
    if len(pairs) > 1:
        total = len(facts.prompts)
        more = f"and {total - len(pairs)} more" if total > len(pairs) else None
        summary = el("summary", "The other prompts", el("small", f"{total} in all"))
        shown.append(el("details", summary, pairs[1:], el("p", more, class_="quiet")))
    lead = "Numbers count positions; a dot stands for a leading space, an arrow for a line break."
    if facts.kind.has_corrupt and any(prompt.other for prompt in facts.prompts):
        lead += " Framed: the tokens in which the two prompts differ."
    return section("prompts", "The prompts", lead, el("div", shown, class_="prompts"))


def result(facts: SweepFacts) -> Html:
    """Return the heatmap: one table; of three axes also one for each entry of the first."""
    flat = facts.effect.reshape(-1)
    many = facts.effect.ndim > 2
    kept = min(2, facts.effect.ndim)
    cells = facts.strongest_over(kept).reshape(facts.effect.shape[:kept])
    if kept == 1:
        cells = cells[None]
    rest = [axis.name for axis in facts.axes[2:]]
    lead = "Point at a cell, or walk with the arrow keys, for its value."
    if many:
        lead = (
            f"Each cell shows the patch with the largest effect over every {' and '.join(rest)}; "
            "point at it to see which. " + ("Below, all of them." if _has_panels(facts) else "")
        )
    if any(other for axis in facts.axes[:2] for other in axis.others) and facts.prompts:
        mine, theirs = ("clean", "corrupt") if facts.kind.from_clean else ("corrupt", "clean")
        lead += f" Where the prompts differ: first the {mine} run's token, then the {theirs} one's."
    columns = facts.axes[kept - 1]
    rows = facts.axes[0] if kept == 2 else None
    if cells.size > _MOST_CELLS or cells.shape[1] > _MOST_COLUMNS:
        shown = _picture(facts, flat[cells])
        lead = "One pixel for each patch. "
        lead += f"Down: {_ends(rows)}. " if rows else ""
        lead += f"Across: {_ends(columns)}. The strongest are listed below."
    else:
        shown = scroll(cell_table(facts, cells, rows, columns), "Result of every patch")
    panels = _panels(facts) if _has_panels(facts) else None
    return section("result", "Where it matters", lead.strip(), shown, themed_legend(facts), panels)


def strongest(facts: SweepFacts) -> Html | None:
    """Return the patches with the largest effect, with their values."""
    if not facts.top:
        return None
    interval = facts.low is not None
    heads = ["place", "", facts.scale, visible(facts.short_metric)] + ["95 % interval"] * interval
    rows = []
    for index in facts.top:
        effect = float(facts.effect[index])
        width = min(100 * abs(effect) / facts.limit, 100.0)
        bar = el("i", style=f"--w:{width:.1f}", class_="down" if effect < 0 else "up")
        cells = [
            el("th", token(facts.place(index)), scope="row"),
            el("td", bar, class_="bar", aria_hidden="true"),
            el("td", number(float(facts.shown[index]), facts.limit), class_="n"),
            el("td", f"{facts.values[index]:.4g}", class_="n"),
        ]
        if interval:
            ends = f"{facts.low[index]:.3g} to {facts.high[index]:.3g}"
            cells.append(el("td", ends, class_="n"))
        rows.append(el("tr", cells))
    head = [
        el("th", name, scope="col", class_="n" if place > 1 else None)
        if name
        else el("td", aria_hidden="true")
        for place, name in enumerate(heads)
    ]
    lead = "The largest effects, compared with the run without a patch."
    if interval:
        lead += f" Intervals: bootstrap over {len(facts.prompts)} prompts, of the value."
    table = el("table", el("thead", el("tr", head)), el("tbody", rows), class_="bars strong")
    return section("strongest", "The strongest patches", lead, table)


def provenance(facts: SweepFacts) -> Html:
    """Return where the numbers come from."""
    pairs = [(el("dt", name), el("dd", visible(value))) for name, value in facts.provenance]
    return section("provenance", "Where this comes from", None, el("dl", pairs))


# --- pieces ------------------------------------------------------------------------------------


def _standing(facts: SweepFacts) -> Html | None:
    """Return the interventions that act on every run, if there are any."""
    if not facts.interventions:
        return None
    calls = []
    for each in facts.interventions:
        calls += [", " if calls else "", el("code", visible(each))]
    return el("p", "All runs are under interventions: ", calls, ".", class_="lead")


def _finding(facts: SweepFacts) -> Html:
    """Say in a sentence which patch matters most."""
    if not facts.top:
        return el("p", "No patch changes what was measured.", class_="finding")
    best = facts.top[0]
    value = float(facts.shown[best])
    decimals = 0 if abs(value) >= 0.1 else 1
    share = f"{round(100 * value, decimals) + 0.0:.{decimals}f}\u00a0%"  # never minus zero
    if facts.scale == "change":
        says = f" changes the metric by {number(value, facts.limit)}."
    elif facts.kind.from_clean:
        says = f" leaves {share} of the difference between the two runs."
    else:
        says = f" brings back {share} of the difference between the two runs."
    return el(
        "p", "The strongest of ", f"{facts.values.size - facts.missing:,} patches, at ",
        token(facts.place(best)), ",", says, class_="finding",
    )  # fmt: skip


def _ends(axis: Axis) -> str:
    """Name the first and the last entry of an axis, such as "layer 0 to layer 4"."""
    return " to ".join(axis.place(at) for at in dict.fromkeys((0, len(axis.headings) - 1)))


def _scale(facts: SweepFacts) -> str:
    if facts.scale == "normalized" or not facts.kind.has_corrupt:
        return facts.kind.reading
    return (
        "The two runs hardly differ, so nothing can be normalized: shown is the change of the "
        "metric against the run without a patch."
    )


def _pair(facts: SweepFacts, place: int) -> list[Html]:
    """Return one prompt, or the clean and the corrupt one below each other, with their metric."""
    prompt = facts.prompts[place]
    number_of = f" {place}" if len(facts.prompts) > 1 else ""
    name = visible(facts.metric.partition("(")[0])

    def heading(which: str, value: float) -> Html:
        says = None if np.isnan(value) else el("small", f" {name} {value:.4g}")
        return el("h3", which + number_of, says)

    parts = [heading("Clean" if prompt.other else "Prompt", prompt.clean)]
    parts.append(_tokens(prompt, prompt.tokens))
    if prompt.other:
        parts += [heading("Corrupt", prompt.corrupt), _tokens(prompt, prompt.other)]
    return parts


def _tokens(prompt: PromptFacts, shown: list[str]) -> Html:
    """Return one prompt's tokens with their positions."""
    items = []
    for position, text in enumerate(shown):
        differs = prompt.other is not None and prompt.tokens[position] != prompt.other[position]
        special = position == 0 and text.startswith("<") and text.endswith(">")
        kind = "swap" if differs else "special" if special else None
        note = f"position {position}" + (", differs" if differs else "")
        items.append(el("li", token(text), el("small", position), class_=kind, title=note))
    return el("ol", items, class_="tokens")


def _has_panels(facts: SweepFacts) -> bool:
    shape = facts.effect.shape
    return len(shape) == 3 and facts.effect.size <= _MOST_CELLS and shape[2] <= _MOST_COLUMNS


def _panels(facts: SweepFacts) -> Html:
    """Return one table for each entry of the first of three axes."""
    first, rows, columns = facts.axes
    cells = np.arange(facts.effect.size).reshape(facts.effect.shape)
    figures = []
    for entry in range(len(first.headings)):
        name = first.place(entry)
        table = cell_table(facts, cells[entry], rows, columns)
        figures.append(el("figure", el("h3", token(name)), scroll(table, name)))
    summary = el("summary", f"Every {first.name}", el("small", f"{len(figures)} tables"))
    return el("details", summary, el("div", figures, class_="many"), open=len(figures) <= 8)


def _picture(facts: SweepFacts, effect: np.ndarray) -> Html:
    """Return a table too large for numbers as a picture, in both themes."""
    height, width = effect.shape
    best = facts.place(facts.top[0]) if facts.top else "none"
    words = f"Heatmap of {height} rows and {width} columns; the strongest patch is {best}."
    light, dark = (sweep_png(effect, facts.limit, STYLES[name]) for name in ("light", "dark"))
    source = el("source", media="(prefers-color-scheme: dark)", srcset=dark)
    image = el("img", src=light, alt=words, width=width, height=height)
    return el("figure", el("picture", source, image), class_="map-wide")
