"""Draw attention patterns: all heads at once, one head large, and a score for every head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.plots import draw
from optlens.plots.style import StyleName, look_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALL = 96  # a picture of the grid has about as many pixels a side


def attention_grid(
    patterns: Any,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    query_positions: Sequence[int] | None = None,
    title: str = "Attention of every head",
    style: StyleName = "light",
) -> "Figure":
    """Draw every head of every layer as a small picture.

    Beyond 96 positions a pixel shows the largest of the weights that fall into it: a mean would
    hide the single hot cells that one looks for.

    Args:
        patterns: attention weights [layer, head, query, key] in 0..1; NaN counts as masked.
        layers: layer numbers to print, by default 0, 1, ...
        heads: head numbers to print, by default 0, 1, ...
        query_positions: the column (key) at which each query row stands, where only some were
            kept: whole numbers from 0, a recording's `columns`.
        title: heading of the figure.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: when the shape or the number of labels does not fit.

    Example:
        >>> import numpy as np
        >>> from optlens import plots
        >>> figure = plots.attention_grid(np.tril(np.full((2, 4, 5, 5), 0.2)))
        >>> len(figure.axes)  # eight heads and the colour bar
        9
    """
    values = draw.array(patterns, "patterns", 4)
    n_layers, n_heads, n_query, n_key = values.shape
    layer_names = draw.labels(layers, n_layers, "layers")
    head_names = draw.labels(heads, n_heads, "heads")
    hidden = draw.hidden_cells(n_query, n_key, query_positions)
    look = look_of(style)
    cell = float(np.clip(9.0 / n_heads, 0.55, 1.15))
    left, top = 0.5, 0.95
    figure = draw.new_figure(
        left + n_heads * cell + 0.95, top + n_layers * cell + 0.15, look, least=(4.2, 1.9)
    )
    for row in range(n_layers):
        for column in range(n_heads):
            place = (left + column * cell, top + row * cell, 0.92 * cell, 0.92 * cell)
            axes = draw.panel(figure, *place)
            small = draw.pool_max(np.where(hidden, np.nan, values[row, column]), _SMALL)
            picture = draw.draw_attention(axes, small, look)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=look.rule, linewidth=0.6)
            inside = {"transform": axes.transAxes}
            if row == 0:
                draw.write(
                    axes, 0.5, 1.05, head_names[column], look.muted, 8, ha="center", **inside
                )
            if column == 0:
                draw.write(axes, -0.1, 0.5, layer_names[row], look.muted, 8,
                           ha="right", va="center", **inside)  # fmt: skip
    draw.heading(figure, title, look, "Rows of pictures: layers. Columns: heads.")
    draw.add_colorbar(figure, picture, draw.SQRT_LABEL, look, top, min(2.0, 0.92 * n_layers * cell))
    return figure


def attention_head(
    pattern: Any,
    tokens: Sequence[str],
    *,
    query_positions: Sequence[int] | None = None,
    title: str = "Attention of one head",
    style: StyleName = "light",
) -> "Figure":
    """Draw one head large: which earlier token (column) each token (row) looks at.

    Up to twelve tokens, the weights are written into the cells.

    Args:
        pattern: attention weights [query, key] in 0..1; NaN counts as masked.
        tokens: the text of each key position, as it should be printed.
        query_positions: the column (key) at which each query row stands, where only some were
            kept: whole numbers from 0, a recording's `columns`.
        title: heading of the figure.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: when the shape or the number of labels does not fit.

    Example:
        >>> import numpy as np
        >>> from optlens import plots
        >>> figure = plots.attention_head(np.eye(3), ["</s>", "A", "·cat"], title="layer 0, head 1")
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['</s>', 'A', '·cat']
    """
    values = draw.array(pattern, "pattern", 2)
    n_query, n_key = values.shape
    names = draw.labels(tokens, n_key, "tokens")
    hidden = draw.hidden_cells(n_query, n_key, query_positions)
    rows = range(n_query) if query_positions is None else query_positions
    look = look_of(style)
    side = float(np.clip(0.3 * n_key, 1.6, 9.5))
    size = float(np.clip(72 * side / n_key * 0.5, 4.5, 9))
    room = 0.0095 * size * min(max(map(len, names)), draw.LONGEST) + 0.3  # inches for the labels
    tall = max(side * n_query / n_key, 0.3)
    top = 0.62 + room
    figure = draw.new_figure(room + side + 1.0, top + max(tall, 1.2) + 0.2, look, least=(4.0, 0))
    axes = draw.panel(figure, room, top, side, tall)
    picture = draw.draw_attention(axes, np.where(hidden, np.nan, values), look)
    draw.tick_labels(axes, "x", names, look, size, turned=True)
    draw.tick_labels(axes, "y", [names[row] for row in rows], look, size)
    if n_key <= 40:
        draw.rule_cells(axes, look)
    if n_key <= 12:
        cells = np.where(hidden | (values < 0.005) | np.isnan(values), None, values)
        draw.write_words(axes, [[_short(cell) for cell in row] for row in cells], look, 6.5)
    draw.heading(figure, title, look, "Each row is a token; its columns are what it reads from.")
    draw.add_colorbar(figure, picture, draw.SQRT_LABEL, look, top, float(np.clip(tall, 1.2, 2.2)))
    return figure


def head_scores(
    scores: Any,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    label: str = "score",
    title: str = "A score for every head",
    style: StyleName = "light",
) -> "Figure":
    """Draw one number for every head, as a table of layers and heads.

    Scores of both signs are drawn blue (negative) to orange (positive) around zero, with equal
    limits; scores of one sign start at zero.

    Args:
        scores: numbers [layer, head].
        layers: layer numbers to print, by default 0, 1, ...
        heads: head numbers to print, by default 0, 1, ...
        label: what the numbers are, with their unit, for the colour bar.
        title: heading of the figure.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: when the shape or the number of labels does not fit.

    Example:
        >>> from optlens import plots
        >>> figure = plots.head_scores([[0.1, 0.9]], label="attention to the previous token")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.10', '0.90']
    """
    from matplotlib.colors import Normalize

    values = draw.array(scores, "scores", 2)
    n_layers, n_heads = values.shape
    look = look_of(style)
    left, top, width, height = 0.6, 0.95, 0.52 * n_heads, 0.36 * n_layers
    figure = draw.new_figure(left + width + 1.05, top + height + 0.2, look, least=(4.2, 2.4))
    axes = draw.panel(figure, left, top, width, height)
    limit = draw.largest(np.abs(values))
    norm = Normalize(-limit if np.nanmin(values) < 0 else 0.0, limit)
    picture = draw.draw_image(axes, values, look, norm)
    draw.tick_labels(axes, "x", draw.labels(heads, n_heads, "heads"), look, 8)
    draw.tick_labels(axes, "y", draw.labels(layers, n_layers, "layers"), look, 8)
    draw.rule_cells(axes, look)
    decimals = 2 if limit < 10 else 1 if limit < 100 else 0
    rounded = np.round(values, decimals) + 0.0  # no minus sign before a zero
    words = [["" if np.isnan(v) else f"{v:.{decimals}f}" for v in row] for row in rounded]
    draw.write_words(axes, words, look, 7)
    draw.heading(figure, title, look, "Rows: layers. Columns: heads.")
    draw.add_colorbar(figure, picture, label, look, top, float(np.clip(height, 1.2, 2.2)))
    return figure


def _short(weight: float | None) -> str:
    """Write a weight without its leading zero, the way tables of small numbers do."""
    if weight is None:
        return ""
    return "1" if weight >= 0.995 else f"{weight:.2f}"[1:]
