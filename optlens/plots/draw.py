"""Draw the pieces that all figures share: panels placed in inches, images, labels, colour bars.

Panels are placed in inches from the top left corner and not by matplotlib's layout engines, since
cells must stay square and of one size whether a prompt has one token or a hundred. Labels are made
legible first: no mathematics from dollar signs, no empty boxes for characters that no installed
font has, no invisible control characters, and a cut in the middle of long tokens.
"""

import functools
import io
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.plots.style import Style, lightness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SQRT_LABEL = "attention weight\n(square-root scale)"
LONGEST = 14  # characters of a token that are printed at most
DPI = 110


# --- what comes in ---------------------------------------------------------------------------


def array(values: Any, name: str, ndim: int) -> np.ndarray:
    """Return `values` (list, NumPy or torch, any dtype) as float64 with `ndim` axes, none empty.

    Args:
        values: numbers.
        name: what to call them in the error.
        ndim: the number of axes that the caller draws.

    Raises:
        ValueError: when the number of axes differs, or an axis is empty.
    """
    if hasattr(values, "detach"):  # torch: bfloat16 has no NumPy dtype, so widen there first
        values = values.detach().cpu().double().numpy()
    result = np.asarray(values, dtype=np.float64)
    if result.ndim != ndim or 0 in result.shape:
        raise ValueError(
            f"{name} has shape {list(result.shape)}; this figure needs {ndim} axes, none of them "
            "empty. Index a batch first, for example values[0]."
        )
    return result


def labels(
    given: Sequence[Any] | None, count: int, name: str, convert: Callable[[Any], Any] = str
) -> list[Any]:
    """Return `count` labels: those given, or 0, 1, 2, ...

    Raises:
        ValueError: when there are more or fewer labels than things to label.
    """
    result = [convert(item) for item in (range(count) if given is None else given)]
    if len(result) != count:
        raise ValueError(f"{name} has {len(result)} entries for {count} rows or columns to label")
    return result


def hidden_cells(n_query: int, n_key: int, positions: Sequence[int] | None) -> np.ndarray:
    """Return a boolean [query, key]: True where the key lies in the query's future.

    Raises:
        ValueError: when rows are missing and `positions` does not say which remain, or says what
            is no column of the pattern.
    """
    if positions is None and n_query != n_key:
        raise ValueError(
            f"the pattern has {n_query} query rows for {n_key} keys; say which positions the rows "
            "are with query_positions=[...]"
        )
    rows = np.arange(n_query) if positions is None else np.asarray(positions)
    if rows.shape != (n_query,):
        raise ValueError(f"query_positions has {rows.size} entries for {n_query} query rows")
    wrong = [row for row in rows.tolist() if row not in range(n_key)]
    if wrong:
        raise ValueError(
            f"query_positions holds {wrong[0]}; it must say for each query row which of the "
            f"pattern's columns it is, 0 to {n_key - 1}, padding counted"
        )
    return np.arange(n_key)[None, :] > rows[:, None]


def largest(table: np.ndarray) -> float:
    """Return the largest finite value, or 1 where nothing is above zero."""
    finite = table[np.isfinite(table)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


# --- panels ----------------------------------------------------------------------------------


def new_figure(
    width: float, height: float, look: Style, least: tuple[float, float] = (0.0, 0.0)
) -> "Figure":
    """Return an empty figure of a size in inches that pyplot knows nothing of."""
    from matplotlib.figure import Figure

    size = (max(width, least[0]), max(height, least[1]))
    figure = Figure(figsize=size, dpi=DPI, facecolor=look.paper)
    # IPython draws a Figure by itself only after pyplot was imported; this way it always does.
    figure._repr_png_ = functools.partial(_png, figure)
    return figure


def panel(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Add axes without frame at a place in inches, counted from the top left corner."""
    full_w, full_h = figure.get_size_inches()
    place = (left / full_w, 1 - (top + height) / full_h, width / full_w, height / full_h)
    axes = figure.add_axes(place)
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=3)
    return axes


def draw_image(axes: "Axes", values: np.ndarray, look: Style, norm: Any) -> "AxesImage":
    """Draw a matrix in the theme's ramp; NaN gets the colour of masked cells.

    Args:
        axes: where to draw.
        values: numbers [row, column].
        look: the theme.
        norm: a matplotlib norm; one with `vmin < 0` takes the diverging table.
    """
    from matplotlib.colors import LinearSegmentedColormap

    table = look.diverging if (norm.vmin or 0) < 0 else look.ramp
    ramp = LinearSegmentedColormap.from_list("optlens", table, N=256)
    ramp = ramp.with_extremes(bad=look.masked)
    return axes.imshow(
        np.ma.masked_invalid(values), cmap=ramp, norm=norm, aspect="auto", interpolation="nearest"
    )


def draw_attention(axes: "Axes", values: np.ndarray, look: Style) -> "AxesImage":
    """Draw one pattern [query, key], NaN where masked, on a square-root scale from 0 to 1."""
    from matplotlib.colors import PowerNorm

    return draw_image(axes, values, look, PowerNorm(0.5, vmin=0.0, vmax=1.0))


def pool_max(values: np.ndarray, most: int) -> np.ndarray:
    """Shrink a matrix to at most `most` rows and columns, each cell the largest of its block.

    Args:
        values: numbers [row, column]; NaN stays only where a whole block is NaN.
        most: the largest number of rows and columns wanted.

    Example:
        >>> pool_max(np.array([[0.1, 0.9], [0.2, np.nan]]), 1)
        array([[0.9]])
    """
    rows, columns = (-(-count // most) for count in values.shape)
    if rows == columns == 1:
        return values
    pad = ((0, -values.shape[0] % rows), (0, -values.shape[1] % columns))
    whole = np.pad(np.where(np.isnan(values), -np.inf, values), pad, constant_values=-np.inf)
    blocks = whole.reshape(whole.shape[0] // rows, rows, whole.shape[1] // columns, columns)
    top = blocks.max(axis=(1, 3))  # [row, column]
    return np.where(np.isneginf(top), np.nan, top)


def rule_cells(axes: "Axes", look: Style) -> None:
    """Separate the cells of an image by thin lines in the colour of the paper."""
    n_rows, n_columns = axes.images[0].get_array().shape
    axes.set_xticks(np.arange(n_columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(n_rows - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=look.paper, linewidth=0.8)
    axes.tick_params(which="minor", length=0)


def add_colorbar(
    figure: "Figure", picture: "AxesImage", label: str, look: Style, top: float, height: float
) -> None:
    """Put a colour bar with its scale in words at the right edge, `top` inches down."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    axes = panel(figure, figure.get_size_inches()[0] - 0.8, top, 0.1, height)
    bar = figure.colorbar(picture, cax=axes)
    bar.outline.set_visible(False)
    bar.set_label(label, color=look.muted, fontsize=7, family=families())
    bar.ax.tick_params(length=0, colors=look.muted, labelsize=7, which="both")
    if label == SQRT_LABEL:
        bar.set_ticks([0, 0.05, 0.25, 0.5, 1.0])
    if isinstance(picture.norm, LogNorm):
        bar.set_ticks(LogLocator(subs=(1, 2, 5)), minor=False)
        bar.ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        bar.ax.minorticks_off()


# --- words -----------------------------------------------------------------------------------


def heading(figure: "Figure", title: str, look: Style, note: str = "") -> None:
    """Write a title, and a quieter line under it, at the top left corner."""
    height = figure.get_size_inches()[1]
    common = {"ha": "left", "va": "top", "family": families(), "parse_math": False}
    x = 0.12 / figure.get_size_inches()[0]
    figure.text(
        x, 1 - 0.12 / height, legible(title, 200), color=look.ink, fontsize=10.5,
        fontweight="bold", **common,
    )  # fmt: skip
    figure.text(x, 1 - 0.35 / height, note, color=look.muted, fontsize=8, **common)


def write(axes: "Axes", x: float, y: float, text: str, color: Any, size: float, **where: Any):
    """Write one label into axes, in data coordinates unless `where` says otherwise."""
    axes.text(
        x, y, legible(text), color=color, fontsize=size, family=families(), parse_math=False,
        **where,
    )  # fmt: skip


def tick_labels(
    axes: "Axes",
    axis: str,
    texts: Sequence[str],
    look: Style,
    size: float,
    turned: bool = False,
    longest: int = LONGEST,
) -> None:
    """Label rows or columns of an image; columns are labelled above it.

    Args:
        axes: where to write.
        axis: `"x"` or `"y"`.
        texts: one label for each row or column. Over 110 only every second (third, ...) is set.
        look: the theme.
        size: font size in points.
        turned: write column labels upwards.
        longest: characters of a label that are printed at most.
    """
    step = -(-len(texts) // 110)
    places = range(0, len(texts), step)
    shown = [legible(texts[place], longest) for place in places]
    common = {"color": look.ink, "fontsize": size, "family": families(), "parse_math": False}
    if axis == "y":
        axes.set_yticks(list(places), shown, **common)
        return
    axes.xaxis.tick_top()
    axes.set_xticks(list(places), shown, rotation=90 if turned else 0, **common)


def write_words(axes: "Axes", words: Sequence[Sequence[str]], look: Style, size: float) -> None:
    """Write a word into every cell of the image in `axes`, light on dark and dark on light."""
    picture = axes.images[0]
    colors = picture.to_rgba(picture.get_array())  # [row, column, rgba], NaN in its own colour
    for row, line in enumerate(words):
        for column, word in enumerate(line):
            ink = contrasting(colors[row, column, :3], look)
            write(axes, column, row, word, ink, size, ha="center", va="center", clip_on=True)


def contrasting(background: Sequence[float], look: Style) -> str:
    """Return the theme's ink or paper, whichever stands out from an rgb in 0..1."""
    level = lightness(tuple(round(255 * float(channel)) for channel in background))
    return max((look.ink, look.paper), key=lambda color: abs(lightness(color) - level))


def legible(text: str, longest: int = LONGEST) -> str:
    r"""Return text as it can be printed: cut in the middle, nothing invisible, no missing glyph.

    Example:
        >>> legible("incomprehensibilities")
        'incompr…lities'
        >>> legible("a\u202eb")
        'a⟨U+202E⟩b'
    """
    if len(text) > longest:
        half = longest // 2
        text = text[:half] + "…" + text[len(text) - (longest - half - 1) :]
    return "".join(char if _drawable(char) else f"⟨U+{ord(char):04X}⟩" for char in text)


def percent(share: float) -> str:
    """Return a probability for people, never rounded to certainty.

    Example:
        >>> percent(0.931), percent(0.0001), percent(0.9999)
        ('93.1 %', '< 0.1 %', '> 99.9 %')
    """
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


@functools.cache
def families() -> list[str]:
    """Return the fonts to try in turn: matplotlib's own, then what this machine has for others."""
    from matplotlib import font_manager

    here = set(font_manager.get_font_names())
    others = [f"Noto Sans CJK {region}" for region in ("SC", "JP", "KR", "TC")]
    others += ["Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai"]
    return ["DejaVu Sans", *(name for name in others if name in here)]


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    paths = [font_manager.findfont(font_manager.FontProperties(family=f)) for f in families()]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def _drawable(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs") and ord(char) in _glyphs()


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
