"""Draw a contribution graph: streams as columns of dots, and what leads from one to the next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.plots import draw
from optlens.plots.style import Style, StyleName, look_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL = 12  # characters of a token


def contribution_graph(
    edges: Sequence[tuple[float, str, tuple[int, int], tuple[int, int]]],
    tokens: Sequence[str],
    *,
    rows: Sequence[str],
    title: str = "What the last residual stream is made of",
    note: str = "",
    style: StyleName = "light",
) -> "Figure":
    """Draw edges between layers and positions, the wider the larger their weight.

    What is carried along is a straight grey line, what an MLP adds a green bow with a diamond, what
    a head brings a blue curve from the token it reads. Tokens without an edge are left out.

    Args:
        edges: `(weight, part, source, target)`: a weight in 0..1; "residual", "mlp3" or "L3H0"; and
            two places, row and column.
        tokens: the prompt, [pos], as it should be printed.
        rows: names of the rows from the embedding down.
        title: heading of the figure.
        note: a line below the heading.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: for a weight outside 0..1, or a place that is in no row or column.

    Example:
        >>> from optlens import plots
        >>> edges = [(0.7, "residual", (0, 1), (1, 1)), (0.3, "L0H2", (0, 0), (1, 1))]
        >>> figure = plots.contribution_graph(edges, ["The", "·cat"], rows=["embed", "0 mid"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['embed', '0 mid']
    """
    look = look_of(style)
    names, prompt = [str(row) for row in rows], [str(text) for text in tokens]
    _check(edges, len(names), len(prompt))
    columns = sorted({place[1] for edge in edges for place in edge[2:]}) or [len(prompt) - 1]
    at = {column: number for number, column in enumerate(columns)}
    pitch = float(np.clip(9 / len(columns), 0.2, 0.62))
    step = float(np.clip(9 / len(names), 0.16, 0.42))
    room = 0.085 * max(map(len, names)) + 0.35
    turned = pitch < 0.5
    above = 0.075 * _LABEL + 0.15 if turned else 0.4
    top, height = 0.62 + above, step * len(names)
    width = pitch * len(columns)
    figure = draw.new_figure(room + width + 0.3, top + height + 0.45, look, least=(5.0, 2.4))
    axes = draw.panel(figure, room, top, width, height)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(names) - 0.5, -0.5))
    axes.hlines(range(len(names)), -0.5, len(columns) - 0.5, look.rule, linewidth=0.6, zorder=0)
    drawn = [
        (weight, part, (row, at[column]), (to, at[other]))
        for weight, part, (row, column), (to, other) in edges
    ]
    _draw_edges(axes, drawn, look, pitch / step)
    labels = [f"{draw.legible(prompt[column], _LABEL)} {column}" for column in columns]
    draw.tick_labels(
        axes, "x", labels, look, 7 if turned else 7.5, turned=turned, longest=_LABEL + 5
    )
    draw.tick_labels(axes, "y", names, look, 7.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _draw_legend(figure, look)
    draw.heading(figure, title, look, note)
    return figure


def _check(edges: Sequence[Any], n_rows: int, n_columns: int) -> None:
    for weight, part, source, target in edges:
        if not 0 <= weight <= 1:
            raise ValueError(f"the edge of {part!r} has weight {weight}; weights are in 0..1")
        for row, column in (source, target):
            if row not in range(n_rows) or column not in range(n_columns):
                raise ValueError(
                    f"the edge of {part!r} is at row {row}, column {column}; there are {n_rows} "
                    f"rows and {n_columns} columns"
                )


def _colors(look: Style) -> dict[str, str]:
    return {"residual": look.muted, "head": look.series[0], "mlp": look.series[2]}


def _kind(part: str) -> str:
    return "residual" if part == "residual" else "mlp" if part.startswith("mlp") else "head"


def _draw_edges(axes: "Axes", edges: Sequence[Any], look: Style, stretch: float) -> None:
    """Draw the edges, the strongest last, and a dot at each of their ends."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    colors = _colors(look)
    bow = min(0.3, 0.16 / stretch)
    for weight, part, (row, column), (to, other) in sorted(edges):
        kind, middle = _kind(part), (row + to) / 2
        if kind == "head":
            aside = -bow if column == other else 0.0  # a head that reads its own token
            bends = [(column + 1.6 * aside, row + 0.55), (other + 1.6 * aside, to - 0.55)]
        else:
            aside = 1.6 * bow if kind == "mlp" else 0.0
            bends = [(column + aside, row + 0.3), (column + aside, to - 0.3)]
        path = Path([(column, row), *bends, (other, to)], codes)
        width = 0.5 + 6 * weight
        axes.add_patch(
            PathPatch(path, facecolor="none", edgecolor=colors[kind], linewidth=width, alpha=0.6)
        )
        if kind == "mlp":
            axes.plot(
                column + 0.75 * aside, middle, "D", color=colors[kind], markersize=4, zorder=4
            )
    dots = sorted({place for edge in edges for place in edge[2:]})
    if dots:
        ys, xs = zip(*dots, strict=True)
        axes.scatter(xs, ys, s=22, facecolor=look.paper, edgecolor=look.ink, zorder=5)


def _draw_legend(figure: "Figure", look: Style) -> None:
    from matplotlib.lines import Line2D

    colors = _colors(look)
    entries = (("carried along", "residual", ""), ("head", "head", ""), ("MLP", "mlp", "D"))
    handles = [
        Line2D([], [], color=colors[kind], marker=marker, markersize=4, linewidth=2.4, label=label)
        for label, kind, marker in entries
    ]
    figure.legend(
        handles=handles, loc="lower left", ncols=3, frameon=False, fontsize=8,
        labelcolor=look.muted, bbox_to_anchor=(0.0, 0.0), prop={"family": draw.families(), "size": 8},
    )  # fmt: skip
