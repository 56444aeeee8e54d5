"""Draw what happens along the layers: lens tables, chosen tokens, lengths, the next token."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optlens.plots import draw
from optlens.plots.style import StyleName, look_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = {
    "probability": "probability of the word",
    "entropy": "entropy (nats)",
    "kl": "KL, final to this layer (nats)",
}
_PER_LINE = 22  # positions of a lens table that stand side by side


def lens_heatmap(
    words: Sequence[Sequence[str]],
    values: Any,
    tokens: Sequence[str],
    *,
    rows: Sequence[str] | None = None,
    quantity: Literal["probability", "entropy", "kl"] = "probability",
    title: str = "Logit lens: the next token, as each layer would have it",
    style: StyleName = "light",
) -> "Figure":
    """Draw the logit lens as a table: the best word of each row and position over its colour.

    A long prompt is broken into lines, one under the other, as text is.

    Args:
        words: the word to write into each cell, [row][pos].
        values: what colours the cells, [row, pos]: probabilities in 0..1, or nats; NaN is left out.
        tokens: the prompt, [pos], as it should be printed.
        rows: row names from the embedding up, by default "embed", "0", "1", ...
        quantity: what `values` are; entropy and KL are drawn up to their own largest value.
        title: heading of the figure.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: for an unknown quantity, or when shapes and labels do not fit together.

    Example:
        >>> from optlens import plots
        >>> figure = plots.lens_heatmap([["·cat"], ["·dog"]], [[0.1], [0.8]], ["A"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['·cat', '·dog']
    """
    from matplotlib.colors import Normalize

    if quantity not in QUANTITIES:
        raise ValueError(f"quantity={quantity!r} is unknown; give one of {list(QUANTITIES)}")
    table = draw.array(values, "values", 2)
    n_rows, n_pos = table.shape
    names = draw.labels(_row_names(rows, n_rows), n_rows, "rows")
    prompt = draw.labels(tokens, n_pos, "tokens")
    lines = draw.labels(words, n_rows, "words", convert=list)
    lines = [draw.labels(line, n_pos, "words") for line in lines]
    look = look_of(style)
    n_lines = -(-n_pos // _PER_LINE)
    per_line = -(-n_pos // n_lines)
    cell_w, cell_h, left, top = 0.72, 0.27, 0.75, 0.85
    pitch = cell_h * n_rows + 0.45  # from one line of text to the next, inches
    size = (left + cell_w * per_line + 1.0, top + pitch * n_lines - 0.15)
    figure = draw.new_figure(*size, look, least=(5.0, 2.4))
    norm = Normalize(0.0, 1.0 if quantity == "probability" else draw.largest(table))
    for line in range(n_lines):
        part = slice(line * per_line, min((line + 1) * per_line, n_pos))
        width = cell_w * (part.stop - part.start)
        axes = draw.panel(figure, left, top + pitch * line, width, cell_h * n_rows)
        picture = draw.draw_image(axes, table[:, part], look, norm)
        draw.tick_labels(axes, "x", [_fit(text) for text in prompt[part]], look, 7.5)
        draw.tick_labels(axes, "y", names, look, 7.5)
        draw.rule_cells(axes, look)
        draw.write_words(axes, [[_fit(word) for word in row[part]] for row in lines], look, 7)
    draw.heading(figure, title, look, "Above: the prompt. Downwards: deeper layers.")
    bar = float(np.clip(cell_h * n_rows, 1.2, 2.2))
    draw.add_colorbar(figure, picture, QUANTITIES[quantity], look, top, bar)
    return figure


def residual_norms(
    norms: Any,
    tokens: Sequence[str],
    *,
    rows: Sequence[str] | None = None,
    title: str = "Length of the residual stream",
    style: StyleName = "light",
) -> "Figure":
    """Draw the Euclidean length of the residual stream for every row and position.

    The colour is logarithmic when the largest length is over ten times the smallest: the first
    token of a trained OPT often carries a vector many times longer than all the others.

    Args:
        norms: lengths [row, pos], row 0 being the embedding; NaN is left out.
        tokens: the prompt, [pos], as it should be printed.
        rows: row names from the embedding up, by default "embed", "0", "1", ...
        title: heading of the figure.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: when the shape or the number of labels does not fit.

    Example:
        >>> from optlens import plots
        >>> figure = plots.residual_norms([[1.0, 2.0], [3.0, 4.0]], ["A", "·cat"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['embed', '0']
    """
    from matplotlib.colors import LogNorm, Normalize

    table = draw.array(norms, "norms", 2)
    n_rows, n_pos = table.shape
    names = draw.labels(_row_names(rows, n_rows), n_rows, "rows")
    prompt = draw.labels(tokens, n_pos, "tokens")
    look = look_of(style)
    cell = float(np.clip(12 / n_pos, 0.13, 0.5))
    size = float(np.clip(72 * cell * 0.5, 4.5, 8))
    room = 0.0095 * size * min(max(map(len, prompt)), draw.LONGEST) + 0.12
    top, height = 0.62 + room, max(0.26 * n_rows, 1.2)
    figure = draw.new_figure(0.7 + cell * n_pos + 1.0, top + height + 0.2, look, least=(5.0, 2.4))
    axes = draw.panel(figure, 0.7, top, cell * n_pos, height)
    above_zero = table[np.isfinite(table) & (table > 0)]
    low, high = (above_zero.min(), above_zero.max()) if above_zero.size else (1.0, 1.0)
    spread = high > 10 * low
    # Starting below the smallest length keeps that cell apart from the paper.
    norm = LogNorm(low / 1.5, high) if spread else Normalize(0.0, high)
    picture = draw.draw_image(axes, table, look, norm)
    draw.tick_labels(axes, "x", prompt, look, size, turned=True)
    draw.tick_labels(axes, "y", names, look, 7.5)
    if n_pos <= 60:
        draw.rule_cells(axes, look)
    draw.heading(figure, title, look, "Columns: the prompt. Downwards: deeper layers.")
    label = "length (L2 norm), logarithmic" if spread else "length (L2 norm)"
    draw.add_colorbar(figure, picture, label, look, top, float(np.clip(height, 1.2, 2.2)))
    return figure


def lens_trace(
    series: Mapping[str, Any],
    *,
    rows: Sequence[str] | None = None,
    label: str = "probability",
    xlabel: str = "residual stream after layer",
    title: str = "Chosen tokens, layer by layer",
    style: StyleName = "light",
) -> "Figure":
    """Draw how a few numbers change from the embedding to the last layer, one line each.

    Lines differ in colour and in marker, and carry their name at the right end.

    Args:
        series: name -> numbers [row], for example the lens probability of a token at one position.
        rows: row names from the embedding up, by default "embed", "0", "1", ...
        label: what the numbers are, for the upright axis.
        xlabel: what the rows are, for the level axis.
        title: heading of the figure.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: without a series, with over six, or when their lengths differ.

    Example:
        >>> from optlens import plots
        >>> figure = plots.lens_trace({"·Mary": [0.0, 0.2, 0.9], "·John": [0.0, 0.3, 0.1]})
        >>> len(figure.axes[0].lines)
        2
    """
    look = look_of(style)
    if not 1 <= len(series) <= len(look.series):
        raise ValueError(f"lens_trace draws 1 to {len(look.series)} series, not {len(series)}")
    lines = {name: draw.array(values, name, 1) for name, values in series.items()}
    n_rows = len(next(iter(lines.values())))
    names = draw.labels(_row_names(rows, n_rows), n_rows, "rows")
    if any(len(values) != n_rows for values in lines.values()):
        raise ValueError(f"the series differ in length: { {n: len(v) for n, v in lines.items()} }")
    width = float(np.clip(0.5 * n_rows, 3.0, 9.0))
    figure = draw.new_figure(0.75 + width + 1.2, 3.3, look)
    axes = draw.panel(figure, 0.75, 0.62, width, 2.1)
    markers = dict(zip(lines, "osD^vP", strict=False))
    for color, (name, values) in zip(look.series, lines.items(), strict=False):
        axes.plot(values, color=color, marker=markers[name], markersize=4.5, linewidth=1.8)
    ends = _spread_out([values[-1] for values in lines.values()], axes.get_ylim(), 0.085)
    for color, name, y in zip(look.series, lines, ends, strict=False):
        draw.write(
            axes, (n_rows - 1) * 1.02 + 0.04, y, name, color, 9, va="center", fontweight="bold"
        )
    axes.set_xticks(range(n_rows), names, color=look.ink, fontsize=8, parse_math=False)
    axes.tick_params(axis="y", colors=look.muted, labelsize=8)
    axes.grid(axis="y", color=look.rule, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=look.muted, fontsize=8)
    axes.set_ylabel(label, color=look.muted, fontsize=8)
    draw.heading(figure, title, look)
    return figure


def next_tokens(
    words: Sequence[str],
    probabilities: Any,
    *,
    title: str = "The model's next token",
    style: StyleName = "light",
) -> "Figure":
    """Draw the most likely next tokens as bars with their probabilities.

    Args:
        words: the candidates, [k], as they should be printed.
        probabilities: their probabilities [k] in 0..1.
        title: heading of the figure.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: when there are more or fewer words than probabilities.

    Example:
        >>> from optlens import plots
        >>> figure = plots.next_tokens(["·Mary", "·John"], [0.9, 0.1])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['90.0 %', '10.0 %']
    """
    values = draw.array(probabilities, "probabilities", 1)
    names = draw.labels(words, len(values), "words")
    look = look_of(style)
    room = 0.085 * min(max(map(len, names)), draw.LONGEST) + 0.3
    height = 0.27 * len(values)
    figure = draw.new_figure(room + 4.0, 0.5 + height + 0.15, look)
    axes = draw.panel(figure, room, 0.5, 3.2, height)
    axes.barh(range(len(values)), values, height=0.66, color=look.ramp[4])
    axes.set(xlim=(0, 1), ylim=(len(values) - 0.5, -0.5), xticks=[])
    draw.tick_labels(axes, "y", names, look, 9)
    for row, value in enumerate(values):
        draw.write(axes, value + 0.015, row, draw.percent(value), look.muted, 8, va="center")
    draw.heading(figure, title, look)
    return figure


def _row_names(rows: Sequence[str] | None, n_rows: int) -> Sequence[str]:
    return ["embed", *map(str, range(n_rows - 1))] if rows is None else rows


def _fit(word: str) -> str:
    """Cut a word to what a cell of a lens table holds."""
    return draw.legible(word, 9)


def _spread_out(heights: Sequence[float], span: tuple[float, float], gap: float) -> list[float]:
    """Move labels at the ends of lines apart, keeping their order, so that none covers another."""
    least = gap * (span[1] - span[0])
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(map(float, heights))
    for below, above in zip(order, order[1:], strict=False):
        placed[above] = max(placed[above], placed[below] + least)
    excess = max(0.0, placed[order[-1]] - max(span[1], heights[order[-1]]))
    return [height - excess for height in placed]
