"""Draw what a neuron fires on, as text shaded by its activation, and what it writes, as bars."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.plots import draw
from optlens.plots.style import Style, StyleName, look_of, mix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 8.2  # inches of a line of text
_LINE = 0.27  # inches from line to line
_LETTER = 0.069  # inches of one letter, at the size below
_SIZE = 8.0
_SHOWN = 12  # examples, and tokens of each side

Bars = Sequence[tuple[str, float]] | None


def neuron_examples(
    tokens: Sequence[Sequence[str]],
    activations: Sequence[Sequence[float]],
    triggers: Sequence[int],
    *,
    promoted: Bars = None,
    suppressed: Bars = None,
    title: str = "A neuron's strongest examples",
    style: StyleName = "light",
) -> "Figure":
    """Draw examples of a neuron as text, each token as dark as the neuron is active there.

    Args:
        tokens: labels of the tokens of each example, strongest first; 12 are drawn.
        activations: the activation at each of these; below zero counts as zero.
        triggers: which token of each example it is about; it has a frame.
        promoted: tokens that the neuron makes likelier, with the size of the effect.
        suppressed: tokens that it makes less likely, likewise.
        title: heading of the figure.
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: when an example has more labels than activations, or fewer, or its trigger is
            none of its tokens.

    Example:
        >>> from optlens import plots
        >>> figure = plots.neuron_examples([["</s>", "The", "·cat"]], [[0.0, 0.2, 3.1]], [2])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['3.100', '</s>', 'The', '·cat']
    """
    look = look_of(style)
    for number, (words, values) in enumerate(zip(tokens, activations, strict=True)):
        if len(words) != len(values) or not 0 <= triggers[number] < len(words):
            raise ValueError(
                f"example {number} has {len(words)} labels, {len(values)} activations and trigger "
                f"{triggers[number]}; each label needs one activation, and the trigger is one of them"
            )
    lines = [_broken(words) for words in tokens[:_SHOWN]]
    n_lines = sum(map(len, lines)) + 0.35 * len(lines)
    sides = [("promoted", promoted), ("suppressed", suppressed)]
    sides = [(name, list(bars)[:_SHOWN]) for name, bars in sides if bars]
    tall = 0.42 + 0.22 * max((len(bars) for _, bars in sides), default=0) if sides else 0.0
    text = max(n_lines, 1.0) * _LINE
    figure = draw.new_figure(_WIDTH + 1.0, 0.62 + text + tall + 0.15, look)
    axes = draw.panel(figure, 0.15, 0.62, _WIDTH + 0.7, text)
    axes.set(xlim=(0, _WIDTH + 0.7), ylim=(text, 0), xticks=[], yticks=[])
    top = draw.largest(np.array([value for values in activations for value in values], float))
    y = 0.0
    for number, broken in enumerate(lines):
        values, trigger = activations[number], triggers[number]
        _write(axes, 0.0, y, f"{values[trigger]:.3f}", look.muted)
        y = _example(axes, broken, values, trigger, top, y, look) + 0.35 * _LINE
    if not lines:
        _write(axes, 0.0, 0.0, "It fires nowhere in this text.", look.muted)
    width = (_WIDTH + 0.5) / 2
    largest = max((abs(value) for _, bars in sides for _, value in bars), default=1.0) or 1.0
    for at, (name, bars) in enumerate(sides):
        _bars(
            figure, 0.15 + at * (width + 0.1), 0.62 + text + 0.1, width, name, bars, largest, look
        )
    note = "Shade: activation, from 0 to the largest. Frame: the token an example is about."
    draw.heading(figure, title, look, note)
    return figure


def _broken(words: Sequence[str]) -> list[list[tuple[int, str, float]]]:
    """Break an example into lines of (token, text, place in inches)."""
    lines: list[list[tuple[int, str, float]]] = [[]]
    x = 0.6
    for number, word in enumerate(words):
        shown = draw.legible(word)
        width = _LETTER * len(shown) + 0.05
        if x + width > _WIDTH + 0.6 and lines[-1]:
            lines.append([])
            x = 0.6
        lines[-1].append((number, shown, x))
        x += width
    return lines


def _example(
    axes: "Axes",
    lines: list,
    values: Sequence[float],
    trigger: int,
    top: float,
    y: float,
    look: Style,
) -> float:
    """Draw one example from a height on; return where it ends."""
    from matplotlib.patches import Rectangle

    for line in lines:
        for number, shown, x in line:
            ground = mix(look.ramp, max(values[number], 0.0) / top)
            width = _LETTER * len(shown) + 0.05
            edge = look.series[1] if number == trigger else "none"
            color = tuple(channel / 255 for channel in ground)
            place = (x + 0.01, y + 0.02)
            axes.add_patch(
                Rectangle(place, width - 0.02, _LINE - 0.05, facecolor=color, edgecolor=edge)
            )
            _write(axes, x + width / 2, y, shown, draw.contrasting(color, look), "center")
        y += _LINE
    return y


def _write(axes: "Axes", x: float, y: float, text: str, color: Any, side: str = "left") -> None:
    axes.text(
        x, y + _LINE / 2, text, color=color, fontsize=_SIZE, ha=side, va="center",
        family=["DejaVu Sans Mono", *draw.families()], parse_math=False,
    )  # fmt: skip


def _bars(
    figure: Any,
    left: float,
    top: float,
    width: float,
    name: str,
    bars: list,
    largest: float,
    look: Style,
) -> None:
    """Draw the tokens of one side with their effects."""
    count = len(bars)
    axes = draw.panel(figure, left + 1.15, top + 0.28, width - 1.75, 0.22 * count)
    color = look.diverging[4 if name == "promoted" else 2]
    axes.barh(range(count), [abs(value) for _, value in bars], color=color, height=0.78)
    axes.set(xlim=(0, largest), ylim=(count - 0.5, -0.5), xticks=[])
    draw.tick_labels(axes, "y", [text for text, _ in bars], look, 7.5)
    for row, (_, value) in enumerate(bars):
        draw.write(axes, abs(value), row, f" {value:+.3f}", look.muted, 7.5, va="center")
    about = {"transform": axes.transAxes, "ha": "left", "va": "bottom"}
    draw.write(axes, 0.0, 1.02, name, look.ink, 8.5, **about)
