"""Hold the colours of figures and pages: one table for each theme, as data.

Three rules made them. Zero has the colour of the paper, so that what is not there vanishes. The
lightness of a ramp changes in one direction only, so that it survives colour blindness and a grey
printer. And what a causal model cannot see has a colour of its own, `masked`, never that of zero.
The dark tables are chosen for dark paper; they are not the light ones inverted.
"""

from dataclasses import dataclass
from typing import Literal

StyleName = Literal["light", "dark"]


@dataclass(frozen=True)
class Style:
    """Hold the colours of one theme; the HTML page uses the same tables as the figures."""

    paper: str
    ink: str
    muted: str
    rule: str
    masked: str
    ramp: tuple[str, ...]  # zero (the paper) to one, lightness strictly one way
    diverging: tuple[str, ...]  # minus one, zero (the paper) to plus one
    series: tuple[str, ...]  # told apart under the common colour deficiencies (after Okabe & Ito)


STYLES: dict[str, Style] = {
    "light": Style(
        paper="#ffffff",
        ink="#1b1f24",
        muted="#5b6470",
        rule="#d9dcd6",
        masked="#e9e7e0",
        ramp=("#ffffff", "#dbe8f3", "#a9cae4", "#67a3d0", "#3b80bb", "#1d5091", "#122b5c"),
        diverging=("#16427f", "#3478b4", "#a9cae4", "#ffffff", "#f6c99c", "#d9772b", "#8a3f0a"),
        series=("#0072b2", "#d55e00", "#007f5f", "#b0578d", "#8a6d00", "#4d4d4d"),
    ),
    "dark": Style(
        paper="#14171c",
        ink="#e8e6e1",
        muted="#9aa3ae",
        rule="#353a42",
        masked="#25282d",
        ramp=("#14171c", "#1d3350", "#265484", "#4789c3", "#75adda", "#abd0ea", "#f0f4e4"),
        diverging=("#b3d7f2", "#5e9fd4", "#26507c", "#14171c", "#74400f", "#d98236", "#f9d3a5"),
        series=("#56b4e9", "#f08c3c", "#35c49a", "#e08fc0", "#e0c040", "#c9c9c9"),
    ),
}


def look_of(style: str) -> Style:
    """Return the colours of a theme by its name.

    Args:
        style: `"light"` or `"dark"`.

    Raises:
        ValueError: for any other name.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; give one of {list(STYLES)}")
    return STYLES[style]


def mix(ramp: tuple[str, ...], at: float) -> tuple[int, int, int]:
    """Interpolate a table of colours.

    Args:
        ramp: colours as "#rrggbb", evenly spaced from 0 to 1.
        at: where to read the table, 0..1 (clipped).

    Returns:
        Red, green and blue, 0..255.

    Example:
        >>> mix(("#000000", "#ffffff"), 0.5)
        (128, 128, 128)
    """
    place = min(max(float(at), 0.0), 1.0) * (len(ramp) - 1)
    left = min(int(place), len(ramp) - 2)
    share = place - left
    low, high = (_rgb(ramp[left]), _rgb(ramp[left + 1]))
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def lightness(color: str | tuple[int, int, int]) -> float:
    """Return CIE L*, 0 (black) to 100 (white), of an sRGB colour.

    Args:
        color: "#rrggbb", or red, green and blue in 0..255.
    """
    rgb = _rgb(color) if isinstance(color, str) else color
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _unit(rgb)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def _rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _unit(rgb: tuple[int, int, int]) -> list[float]:
    return [channel / 255 for channel in rgb]
