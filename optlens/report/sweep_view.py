"""Show a sweep's result: write its page to a file, or stand for it in a notebook."""

import os
from typing import TYPE_CHECKING

from optlens.files import replacing
from optlens.report.markup import Html, el, visible
from optlens.report.pictures import png_uri
from optlens.report.pieces import token
from optlens.report.sweep_facts import Axis, SweepFacts, gather_sweep
from optlens.report.sweep_page import sweep_page
from optlens.report.sweep_tables import number

if TYPE_CHECKING:
    from optlens.patching import PatchResult

_ROWS = 8  # of the list of the strongest in a notebook
_COLUMNS = 60  # of all panels of a figure together; beyond, the last axis is reduced


def write_sweep_html(result: "PatchResult", path: str | os.PathLike) -> None:
    """Write one self-contained page about a sweep's result: no kernel, no network.

    The page shows the prompts and what was measured, every patch as a coloured cell that names its
    place and value, and the strongest patches, in light and dark. The same result gives the same
    bytes. A result that was cut short is marked as such.

    Args:
        result: what to show.
        path: the file to write; an existing one is replaced when the page is complete.

    Raises:
        OSError: when the file cannot be written; nothing is changed then.

    Example:
        >>> write_sweep_html(result, "patching.html")  # doctest: +SKIP
    """
    page = sweep_page(gather_sweep(result))
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


class PatchView:
    """Stand for a sweep's result in a notebook, as `result.show()` returns it.

    Its HTML is a picture and a table, which a notebook shows even when it is not trusted.

    Args:
        result: what to show.

    Example:
        >>> import optlens
        >>> from optlens.metrics import prob
        >>> result = optlens.ablate_sweep(
        ...     optlens.load(), "The capital of France is", "z", ("layer", "head"), mode="zero",
        ...     metric=prob(" Paris"), progress=False,
        ... )
        >>> result.show()  # doctest: +ELLIPSIS
        PatchResult(z: layer 5 x head 8; prob(' Paris'); ...)
    """

    def __init__(self, result: "PatchResult"):
        self.result = result

    def __repr__(self) -> str:
        """Return the text that stands for the result where there is no HTML."""
        return repr(self.result)

    def _repr_html_(self) -> str:
        """Return plain markup that a notebook shows even when it is not trusted."""
        facts = gather_sweep(self.result, _ROWS)
        ends = f"clean {facts.clean:.4g}" if facts.kind.has_corrupt else f"{facts.clean:.4g}"
        ends += f", corrupt {facts.corrupt:.4g}" if facts.kind.has_corrupt else " without a patch"
        lost = f" Not complete: {facts.missing:,} patches were not computed."
        return el(
            "div",
            el("p", el("b", visible(facts.title))),
            el("p", visible(f"{facts.short_metric}: {ends}."), lost if facts.missing else None),
            _picture(facts),
            _strongest(facts) if facts.top else None,
        )


def _picture(facts: SweepFacts) -> Html:
    """Draw the heatmap; of many panels, the strongest over the axes after the first two."""
    from optlens.plots import sweep_heatmap

    shown, axes, note = facts.shown, facts.axes, ""
    panels = shown.ndim == 3 and shown.shape[0] * shown.shape[2] <= _COLUMNS
    if shown.ndim > 2 and not panels:
        rest = " and ".join(axis.name for axis in axes[2:])
        shown = shown.reshape(-1)[facts.strongest_over(2)]
        axes = axes[:2]
        note = f"Rows: {axes[0].name}. Columns: {axes[1].name}. The strongest over every {rest}."
    scale = "normalized (1 = clean)"
    figure = sweep_heatmap(
        shown[None] if shown.ndim == 1 else shown,
        rows=_headings(axes[-2]) if len(axes) > 1 else [""],
        columns=_headings(axes[-1]),
        panels=[f"{axes[0].name} {name}" for name in _headings(axes[0])] if panels else None,
        axes_names=[axis.name for axis in axes[-2:]] if len(axes) > 1 else ("", axes[0].name),
        label=scale if facts.scale == "normalized" else f"change of {facts.short_metric}",
        title=facts.title,
        note=note or (f"Columns: {axes[0].name}." if len(axes) == 1 else ""),
    )
    width = round(figure.get_size_inches()[0] * 96)
    best = facts.place(facts.top[0]) if facts.top else "none"
    words = f"Heatmap: {facts.title}. The strongest patch is {best}."
    return el("img", src=png_uri(figure._repr_png_()), alt=words, width=width)


def _headings(axis: Axis) -> list[str]:
    pairs = zip(axis.numbers, axis.headings, strict=True)
    return [f"{count} {heading}" if count else heading for count, heading in pairs]


def _strongest(facts: SweepFacts) -> Html:
    """Return the strongest patches as a plain table."""
    rows = [
        el(
            "tr",
            el("th", token(facts.place(index))),
            el("td", number(float(facts.shown[index]), facts.limit)),
            el("td", f"{facts.values[index]:.4g}"),
        )
        for index in facts.top
    ]
    heads = ("place", facts.scale, visible(facts.short_metric))
    head = el("thead", el("tr", [el("th", name) for name in heads]))
    caption = el("caption", "The strongest patches")
    return el("table", caption, head, el("tbody", rows))
