"""Draw the stages of a forward pass, one under the other along the residual stream."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.plots import draw
from optlens.plots.style import StyleName, look_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 26  # characters of a label


def stages(
    names: Sequence[str],
    shapes: Sequence[str],
    measures: Any,
    counts: Any,
    *,
    stream: Sequence[bool],
    groups: Sequence[str] | None = None,
    title: str = "Stages of a forward pass",
    note: str = "",
    style: StyleName = "light",
) -> "Figure":
    """Draw each stage as a box with its shape, a histogram and a few numbers.

    The residual stream is a line from top to bottom; stages that are the stream itself sit on it,
    all others beside it.

    Args:
        names: what the stages are called, in the order of the computation.
        shapes: their sizes, as they should be printed.
        measures: mean, standard deviation, smallest and largest number of each, [stage, 4].
        counts: a histogram of each from smallest to largest, [stage, bin].
        stream: which stages are the stream itself.
        groups: what each belongs to, printed where it changes.
        title: heading of the figure.
        note: a line below the heading.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: when there are more or fewer of one thing than of another.

    Example:
        >>> from optlens import plots
        >>> figure = plots.stages(
        ...     ["resid_pre", "q"], ["6 × 32", "6 × 4 × 8"], [[0, 1, -2, 2], [0.1, 1, -3, 3]],
        ...     [[1, 4, 1], [2, 3, 1]], stream=[True, False],
        ... )
        >>> [text.get_text() for text in figure.axes[0].texts][:2]
        ['resid_pre', '6 × 32']
    """
    look = look_of(style)
    table = draw.array(measures, "measures", 2)
    bars = draw.array(counts, "counts", 2)
    labels = draw.labels(names, len(table), "names")
    sizes = draw.labels(shapes, len(table), "shapes")
    on_stream = draw.labels(stream, len(table), "stream", convert=bool)
    parts = draw.labels([""] * len(table) if groups is None else groups, len(table), "groups")
    if len(bars) != len(table):
        raise ValueError(f"counts has {len(bars)} rows for {len(table)} stages")
    step, top = 0.34, 0.62
    figure = draw.new_figure(7.6, top + step * len(table) + 0.2, look)
    axes = draw.panel(figure, 0.15, top, 7.3, step * len(table))
    axes.set(xlim=(0, 7.3), ylim=(len(table) - 0.5, -0.5), xticks=[], yticks=[])
    axes.axvline(1.75, color=look.rule, linewidth=3, zorder=0)
    for row, (mean, std, low, high) in enumerate(table):
        left = 1.05 if on_stream[row] else 2.55
        _box(axes, row, left, labels[row], sizes[row], on_stream[row], look)
        floor, heights = row + 0.33, bars[row] / max(bars[row].max(), 1)
        edges = np.linspace(4.75, 5.85, len(heights) + 1)
        axes.stairs(floor - 0.66 * heights, edges, baseline=floor, fill=True, color=look.ramp[3])
        _write(axes, 4.68, row, _brief(low), look.muted, 6.5, "right")
        _write(axes, 5.92, row, _brief(high), look.muted, 6.5, "left")
        middle = "0" if abs(mean) < 0.005 * std else _brief(mean)
        _write(axes, 7.25, row, f"{middle} ± {_brief(std)}", look.ink, 7, "right")
        if parts[row] and (row == 0 or parts[row] != parts[row - 1]):
            _write(axes, 0.0, row, parts[row], look.muted, 7.5, "left")
    draw.heading(figure, title, look, note)
    return figure


def _box(
    axes: Any, row: int, left: float, name: str, shape: str, on_stream: bool, look: Any
) -> None:
    from matplotlib.patches import FancyBboxPatch

    width = 1.4 if on_stream else 1.75
    edge = look.ink if on_stream else look.muted
    axes.add_patch(
        FancyBboxPatch(
            (left, row - 0.36), width, 0.72, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=look.paper, edgecolor=edge, linewidth=1.2 if on_stream else 0.8,
            mutation_aspect=3,
        )
    )  # fmt: skip
    if not on_stream:
        axes.plot([1.75, left], [row, row], color=look.rule, linewidth=1.2, zorder=0)
    weight = "bold" if on_stream else "normal"
    middle = left + width / 2
    _write(axes, middle, row - 0.14, name, look.ink, 7.5, "center", fontweight=weight)
    _write(axes, middle, row + 0.2, shape, look.muted, 6, "center")


def _write(
    axes: Any, x: float, y: float, text: str, color: str, size: float, side: str, **more: Any
) -> None:
    """Write a label that may be longer than a token."""
    axes.text(
        x, y, draw.legible(text, _LONGEST), color=color, fontsize=size, ha=side, va="center",
        family=draw.families(), parse_math=False, **more,
    )  # fmt: skip


def _brief(value: float) -> str:
    """Write a number with two or three digits, the minus as long as the plus."""
    return f"{value:.3g}".replace("-", "−")
