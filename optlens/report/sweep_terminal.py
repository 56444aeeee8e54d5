"""Show a sweep's result as plain text: the two ends, a table of patches, the strongest of them."""

import numpy as np

from optlens.report.markup import visible
from optlens.report.sweep_facts import Axis, SweepFacts
from optlens.report.sweep_tables import number
from optlens.report.terminal import (
    BOLD,
    DIM,
    PLAIN,
    WARM,
    columns,
    cut,
    finished,
    padded,
    token_lines,
)

_MOST_COLUMNS = 96  # of a table; beyond, the strongest must do
_MOST_TOP = 8


def text_of_sweep(
    facts: SweepFacts, width: int = 80, color: bool = False, encoding: str = "utf-8"
) -> str:
    """Return what a terminal shows of a sweep, ending with a line break.

    Args:
        facts: what was found.
        width: columns of the terminal; lines keep within it from 40 on.
        color: whether to mark with ANSI escapes.
        encoding: what the terminal is written in; characters that it lacks become ASCII.
    """
    parts = [_prompts(facts, width), _ends(facts, width), _result(facts, width)]
    if facts.top:
        parts.append(_strongest(facts, width))
    return finished("\n".join("\n".join([*part, ""]) for part in parts), color, encoding)


def _prompts(facts: SweepFacts, width: int) -> list[str]:
    """Return the first prompt, or pair of prompts, and where the two differ."""
    lines = []
    for prompt in facts.prompts[:1]:
        names = ("Clean", "Corrupt") if prompt.other else ("Prompt",)
        for name, tokens in zip(names, (prompt.tokens, prompt.other), strict=False):
            lines += token_lines(name, tokens or [], width)
        pairs = zip(prompt.tokens, prompt.other or prompt.tokens, strict=True)
        differing = [
            f"{at}: {one} / {other}" for at, (one, other) in enumerate(pairs) if one != other
        ]
        if differing:
            lines += token_lines(
                "Differ", [f"{text}{_comma(text, differing)}" for text in differing], width
            )
    if len(facts.prompts) > 1:
        lines.append(f"and {len(facts.prompts) - 1} more prompts")
    return lines


def _comma(text: str, texts: list[str]) -> str:
    return "" if text == texts[-1] else ","


def _ends(facts: SweepFacts, width: int) -> list[str]:
    """Return the metric of the unpatched runs."""
    ends = [("clean" if facts.kind.has_corrupt else "unpatched", facts.clean)]
    if facts.kind.has_corrupt:
        ends.append(("corrupt", facts.corrupt))
    lines = [f"{BOLD}{cut(facts.metric, width)}{PLAIN}"]
    lines += [f"  {name:<10}{value:>10.4g}" for name, value in ends]
    if facts.interventions:
        lines.append(cut("All runs are under interventions:", width))
    return lines + [f"  {cut(visible(each), width - 2)}" for each in facts.interventions]


def _result(facts: SweepFacts, width: int) -> list[str]:
    """Return the table, or for one axis a bar for each patch."""
    scale = facts.kind.reading
    if facts.scale == "change" and facts.kind.has_corrupt:
        scale = "the runs hardly differ: change of the metric, not normalized"
    lines = [f"{BOLD}{cut(facts.title, width)}{PLAIN}", f"{DIM}{cut(scale, width)}{PLAIN}"]
    if facts.missing:
        text = f"NOT COMPLETE: {facts.missing:,} of {facts.values.size:,} patches not computed (-)"
        lines.append(f"{WARM}{cut(text, width)}{PLAIN}")
    if facts.effect.ndim == 1:
        return lines + _bars(facts, width)
    if facts.effect.ndim > 2:
        rest = " and ".join(axis.name for axis in facts.axes[2:])
        lines.append(f"{DIM}{cut(f'each cell: the strongest over every {rest}', width)}{PLAIN}")
    cells = facts.strongest_over(2)
    if cells.shape[1] > _MOST_COLUMNS:
        text = f"{cells.shape[1]:,} columns are too many for a table"
        return [*lines, cut(text, width)]
    return lines + _table(facts, cells, width)


def _table(facts: SweepFacts, cells: np.ndarray, width: int) -> list[str]:
    """Return the first axis down and the second across, folded where it is too wide."""
    rows, across = facts.axes[:2]
    effect, shown = (values.reshape(-1)[cells] for values in (facts.effect, facts.shown))
    first, lines = 0, []
    if across.name.endswith("position"):
        matters = np.flatnonzero((effect != 0).any(0))  # NaN does
        first = int(matters[0]) if matters.size else 0
    if first > 1:
        text = f"positions {_name(across, 0)} to {_name(across, first - 1)} change nothing"
        lines.append(f"{DIM}{cut(text, width)}{PLAIN}")
    names = [rows.headings[at] for at in range(len(cells))]
    side = min(max(columns(name) for name in [rows.name, *names]), 16) + 1
    words = [[_word(float(value), facts.limit) for value in line] for line in shown]
    widest = max(len(word) for line in words for word in line)
    room = max(widest, 4 if not any(across.numbers) else 6) + 1
    fit = max((width - side) // room, 1)
    for start in range(first, cells.shape[1], fit):
        span = range(start, min(start + fit, cells.shape[1]))
        lines += _head(rows, across, span, side, room)
        for line, name in enumerate(names):
            text = padded(name, side)
            for at in span:
                text += _marked(words[line][at].rjust(room), float(effect[line, at]), facts.limit)
            lines.append(text)
    return lines


def _head(rows: Axis, across: Axis, span: range, side: int, room: int) -> list[str]:
    """Return the heads of some columns: of positions the number above the token."""
    numbers = "".join(f"{across.numbers[at]:>{room}}" for at in span)
    tokens = [cut(across.headings[at], room - 1) for at in span]
    heads = "".join(" " * (room - columns(text)) + text for text in tokens)
    corner = " " * side
    lines = [f"{DIM}{corner}{numbers}{PLAIN}"] if numbers.strip() else []
    return [*lines, f"{DIM}{padded(rows.name, side)}{heads}{PLAIN}"]


def _bars(facts: SweepFacts, width: int) -> list[str]:
    """Return a line for each entry of the only axis, at most as many as make a table."""
    (axis,) = facts.axes
    if len(axis.headings) > _MOST_COLUMNS:
        return [f"{len(axis.headings):,} rows are too many for a table"]
    names = [axis.place(at) for at in range(len(axis.headings))]
    side = min(max(map(columns, names)), 24)
    lines = []
    for name, value, effect in zip(names, facts.shown, facts.effect, strict=True):
        share = min(np.nan_to_num(abs(effect)) / facts.limit, 1.0)
        bar = "█" * round(share * min(width - side - 14, 40))
        word = _word(float(value), facts.limit)
        text = f"  {padded(name, side)}{word:>9}  {bar}".rstrip()
        lines.append(_marked(text, float(effect), facts.limit))
    return lines


def _strongest(facts: SweepFacts, width: int) -> list[str]:
    """Return the strongest patches with the metric itself."""
    best = facts.top[:_MOST_TOP]
    side = max(min(max(columns(facts.place(index)) for index in best), width - 26), 12)
    metric = facts.metric.partition("(")[0]
    lines = [f"{BOLD}{padded('Strongest', side + 2)}{facts.scale:>11} {cut(metric, 11):>11}{PLAIN}"]
    for index in best:
        shown = _word(float(facts.shown[index]), facts.limit)
        name = padded(facts.place(index), side)
        lines.append(f"  {name}{shown:>11} {facts.values[index]:>11.4g}")
    return lines


def _marked(text: str, effect: float, limit: float) -> str:
    share = abs(effect) / limit
    mark = WARM if share >= 0.5 else DIM if not share >= 0.05 else ""
    return f"{mark}{text}{PLAIN}" if mark else text


def _word(value: float, limit: float) -> str:
    return "-" if np.isnan(value) else number(value, limit)


def _name(axis: Axis, at: int) -> str:
    return axis.numbers[at] or axis.headings[at]
