"""Draw terms of a sum as steps from zero to the total."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.plots import draw
from optlens.plots.style import StyleName, look_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def waterfall(
    values: Any,
    labels: Sequence[Any] | None = None,
    *,
    most: int = 20,
    total: str = "sum",
    label: str = "value",
    title: str = "What adds up to the total",
    note: str = "",
    style: StyleName = "light",
) -> "Figure":
    """Draw each term as a bar that begins where the one above it ended, and their sum below.

    Bars to the right (positive) are orange, bars to the left blue, as in the heatmaps. The largest
    terms of either sign keep their order; all others are one bar, so that the bars still add up.

    Args:
        values: the terms, [component], none of them NaN.
        labels: their names, by default 0, 1, ...
        most: how many terms have a bar of their own.
        total: name of the sum.
        label: what the numbers are, with their unit, for the level axis.
        title: heading of the figure.
        note: a line below the heading; what the bars are unless given.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: for a NaN, when there are more or fewer labels than terms, or `most` is below 1.

    Example:
        >>> from optlens import plots
        >>> figure = plots.waterfall([3.0, -1.0, 0.1, 0.2], ["L0H1", "mlp0", "a", "b"], most=2)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['L0H1', 'mlp0', '2 others', 'sum']
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['+3.00', '−1.00', '+0.30', '2.30']
    """
    terms = draw.array(values, "values", 1)
    names = draw.labels(labels, len(terms), "labels")
    if not np.isfinite(terms).all():
        raise ValueError(f"the term of {names[int(np.argmin(np.isfinite(terms)))]!r} is not finite")
    if most < 1:
        raise ValueError(f"most={most}: at least one term has a bar of its own")
    look = look_of(style)
    steps, names = _steps(terms, names, most)
    ends = np.cumsum(steps)
    starts = ends - steps
    count = len(steps) + 1  # and the sum
    room = 0.085 * min(max(map(len, [*names, total])), draw.LONGEST) + 0.3
    height = 0.21 * count
    figure = draw.new_figure(room + 5.2, 0.62 + height + 0.6, look, least=(4.4, 2.0))
    axes = draw.panel(figure, room, 0.62, 4.7, height)
    low, high = min(0.0, *ends, *starts), max(0.0, *ends, *starts)
    margin = 0.16 * (high - low or 1.0)  # for the numbers
    axes.set(xlim=(low - margin, high + margin), ylim=(count - 0.4, -0.6))
    colors = [look.diverging[-2] if step > 0 else look.diverging[1] for step in steps]
    axes.barh(range(len(steps)), steps, left=starts, height=0.68, color=colors)
    axes.barh(len(steps), ends[-1], height=0.68, color=look.muted)
    axes.vlines(
        ends, np.arange(len(steps)) - 0.34, np.arange(len(steps)) + 1.34, look.muted, lw=0.6
    )
    axes.axvline(0, color=look.rule, linewidth=0.9, zorder=0)
    gap = 0.02 * (high - low or 1.0)
    shown = [_signed(step) for step in steps] + [_signed(ends[-1], plus="")]
    for row, (step, end, word) in enumerate(
        zip([*steps, ends[-1]], [*ends, ends[-1]], shown, strict=True)
    ):
        side = "left" if step >= 0 else "right"
        draw.write(
            axes, end + (gap if step >= 0 else -gap), row, word, look.ink, 7.5, ha=side, va="center"
        )
    draw.tick_labels(axes, "y", [*names, total], look, 7.5)
    axes.tick_params(axis="x", colors=look.muted, labelsize=7.5)
    axes.set_xlabel(label, color=look.muted, fontsize=8)
    draw.heading(figure, title, look, note or "Each bar begins where the one above it ended.")
    return figure


def _steps(terms: np.ndarray, names: list[str], most: int) -> tuple[np.ndarray, list[str]]:
    """Keep the largest terms in their order, and put the others together."""
    if len(terms) <= most + 1:
        return terms, names
    kept = np.sort(np.argsort(-np.abs(terms), kind="stable")[:most])
    rest = terms.sum() - terms[kept].sum()
    return np.append(terms[kept], rest), [
        *(names[place] for place in kept),
        f"{len(terms) - most} others",
    ]


def _signed(value: float, plus: str = "+") -> str:
    """Write a number with its sign, the minus as long as the plus."""
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else f"{'−' if value < 0 else plus}{text}"
