"""Draw what a sweep found: a number for every place, and estimates of it against the truth."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.plots import draw
from optlens.plots.style import Style, StyleName, look_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_WORDS = 16  # columns up to which numbers are written into the cells
_LONGEST = 24  # characters of a label: a position, and the tokens of two prompts there


def sweep_heatmap(
    values: Any,
    *,
    rows: Sequence[Any] | None = None,
    columns: Sequence[Any] | None = None,
    panels: Sequence[Any] | None = None,
    axes_names: Sequence[str] = ("row", "column"),
    label: str = "metric",
    title: str = "A number for every patch",
    note: str = "",
    style: StyleName = "light",
) -> "Figure":
    """Draw one number for every patch, as a table or as one table beside the other.

    Numbers are blue below and orange above zero, with equal limits on both sides. NaN (not
    computed) has the colour of masked cells.

    Args:
        values: numbers [row, column], or [panel, row, column].
        rows: labels of the rows, by default 0, 1, ...
        columns: labels of the columns, by default 0, 1, ...
        panels: labels of the panels.
        axes_names: what rows and columns are, such as `("layer", "pos")`.
        label: what the numbers are, with their unit, for the colour bar.
        title: heading of the figure.
        note: a line below the heading; what rows and columns are unless given.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: when the shape or the number of labels does not fit.

    Example:
        >>> from optlens import plots
        >>> figure = plots.sweep_heatmap([[0.0, 1.0]], columns=["</s>", "Mary"], label="recovered")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.00', '1.00']
    """
    from matplotlib.colors import Normalize

    n_axes = np.ndim(values) if not hasattr(values, "ndim") else values.ndim
    tables = draw.array(values, "values", 3 if n_axes == 3 else 2)
    tables = tables if tables.ndim == 3 else tables[None]
    n_panels, n_rows, n_columns = tables.shape
    row_names = draw.labels(rows, n_rows, "rows")
    column_names = draw.labels(columns, n_columns, "columns")
    panel_names = draw.labels(panels, n_panels, "panels") if n_axes == 3 else [""]
    look = look_of(style)
    limit = draw.largest(np.abs(tables))
    norm = Normalize(-limit, limit)
    cell = float(np.clip(8.5 / n_columns, 0.14, 0.46))
    tall = float(np.clip(6.0 / n_rows, 0.12, 0.32))
    longest = min(max(map(len, column_names)), _LONGEST)
    turned = longest * 0.075 > cell
    above = 0.085 * longest if turned else 0.22 if panel_names[0] else 0.1  # for column labels
    top = 0.62 + above + (0.22 if panel_names[0] else 0.0)
    left = 0.25 + 0.075 * min(max(map(len, row_names)), _LONGEST)
    width, height = cell * n_columns, tall * n_rows
    full = left + n_panels * (width + 0.25) + 0.85
    figure = draw.new_figure(full, top + max(height, 1.2) + 0.2, look, least=(4.4, 2.3))
    for number, (table, name) in enumerate(zip(tables, panel_names, strict=True)):
        axes = draw.panel(figure, left + number * (width + 0.25), top, width, height)
        picture = _table(axes, table, norm, look)
        draw.tick_labels(axes, "x", column_names, look, 7.5, turned, _LONGEST)
        side = row_names if number == 0 else [""] * n_rows
        draw.tick_labels(axes, "y", side, look, 7.5, longest=_LONGEST)
        if name:
            inside = {"transform": axes.transAxes, "ha": "left", "va": "bottom"}
            draw.write(axes, 0.0, 1 + above / height, name, look.ink, 8.5, **inside)
    what = note or f"Rows: {axes_names[0]}. Columns: {axes_names[1]}."
    draw.heading(figure, title, look, what)
    draw.add_colorbar(figure, picture, label, look, top, float(np.clip(height, 1.2, 2.2)))
    if np.nanmin(tables, initial=0.0) == 0.0:
        figure.axes[-1].set_ylim(0.0, limit)  # no blue where nothing is negative
    return figure


def estimate_scatter(
    truth: Any,
    estimates: Mapping[str, Any],
    *,
    names: Sequence[Any] | None = None,
    named: int = 4,
    label: str = "change of the metric",
    title: str = "Estimates against the truth",
    note: str = "A point for every place; on the line the estimate is right.",
    style: StyleName = "light",
) -> "Figure":
    """Draw estimates of patches over what the patches really do, a point for every place.

    Both axes have the same scale, and a line shows where an estimate is right. Places where the
    truth or the estimate is NaN are left out.

    Args:
        truth: numbers of any shape.
        estimates: name -> numbers of that shape, six at most; they differ in colour and marker.
        names: the name of each place, in the order of `truth` flattened.
        named: how many of the places that are furthest from the line carry their name.
        label: what the numbers are, with their unit, for both axes.
        title: heading of the figure.
        note: a line below the heading.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: without estimates, with over six, or when shapes or names do not fit.

    Example:
        >>> from optlens import plots
        >>> figure = plots.estimate_scatter([0.0, 2.0], {"AtP": [0.1, 0.5]}, names=["a", "b"], named=1)
        >>> [text.get_text().strip() for text in figure.axes[0].texts]
        ['b']
    """
    look = look_of(style)
    if not 1 <= len(estimates) <= len(look.series):
        raise ValueError(
            f"estimate_scatter draws 1 to {len(look.series)} estimates, not {len(estimates)}"
        )
    true = _flat(truth, "truth")
    found = {name: _flat(values, name) for name, values in estimates.items()}
    wrong = {name: len(values) for name, values in found.items() if len(values) != len(true)}
    if wrong:
        raise ValueError(f"truth has {len(true)} places and the estimates {wrong}")
    places = draw.labels(names, len(true), "names")
    lines = -(-len(estimates) // 3)  # of the legend
    top = 0.62 + 0.22 * lines
    figure = draw.new_figure(5.6, top + 4.55, look)
    axes = draw.panel(figure, 0.75, top, 4.6, 4.0)
    every = np.concatenate([true, *found.values()])
    every = every[np.isfinite(every)]
    low, high = (every.min(), every.max()) if every.size else (0.0, 1.0)
    edge = 0.06 * (high - low or 1.0)
    low, high = low - edge, high + edge
    axes.plot([low, high], [low, high], color=look.muted, linewidth=0.9, linestyle="--", zorder=1)
    for (name, values), color, marker in zip(found.items(), look.series, "osD^vP", strict=False):
        axes.scatter(
            true,
            values,
            color=color,
            marker=marker,
            s=22,
            linewidths=0,
            alpha=0.8,
            label=draw.legible(name, 30),
        )
    _name_furthest(axes, true, found, places, named if names is not None else 0, look)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.grid(color=look.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=look.muted, labelsize=8)
    axes.set_xlabel(f"truth: {label}", color=look.muted, fontsize=8)
    axes.set_ylabel(f"estimate: {label}", color=look.muted, fontsize=8)
    about = {"fontsize": 8, "frameon": False, "labelcolor": look.ink, "ncols": 3}
    legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.99), **about)
    for text in legend.get_texts():
        text.set(parse_math=False, family=draw.families())
    draw.heading(figure, title, look, note)
    return figure


def _flat(values: Any, name: str) -> np.ndarray:
    """Return numbers of any shape as one row."""
    count = np.ndim(values) if not hasattr(values, "ndim") else values.ndim
    return draw.array(values, name, count).ravel()


def _name_furthest(
    axes: "Axes",
    true: np.ndarray,
    found: Mapping[str, np.ndarray],
    places: Sequence[str],
    count: int,
    look: Style,
) -> None:
    """Write the names of the places whose worst estimate is furthest from the truth."""
    errors = np.stack([values - true for values in found.values()])  # [estimate, place]
    worst = np.abs(np.nan_to_num(errors)).max(0)
    for place in np.argsort(-worst, kind="stable")[:count]:
        if worst[place] == 0:
            continue
        which = int(np.abs(np.nan_to_num(errors[:, place])).argmax())
        at = true[place], list(found.values())[which][place]
        # a point in the right half of the figure has its name on the left
        right = at[0] > np.nanmean([np.nanmin(true), np.nanmax(true)])
        name = f"{places[place]} " if right else f" {places[place]}"
        draw.write(axes, *at, name, look.ink, 7.5, ha="right" if right else "left", va="center")


def _table(axes: "Axes", table: np.ndarray, norm: "Normalize", look: Style) -> "AxesImage":
    """Draw one table, with its numbers where there is room for them."""
    picture = draw.draw_image(axes, table, look, norm)
    if table.shape[1] <= _WORDS:
        draw.rule_cells(axes, look)
        decimals = 2 if norm.vmax < 10 else 1 if norm.vmax < 100 else 0
        rounded = np.round(table, decimals) + 0.0  # no minus sign before a zero
        words = [["" if np.isnan(v) else f"{v:.{decimals}f}" for v in row] for row in rounded]
        draw.write_words(axes, words, look, 6.0)
    return picture
