"""Put the page of a notebook together; what it may run and load is stated in it, as in all pages."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from optlens.files import check_target, replacing
from optlens.report.markup import Html, el, visible
from optlens.report.page import digest, page_head
from optlens.widgets.export.outputs import VIEW, Outputs, note, source_of
from optlens.widgets.export.prose import DEEPEST, markdown
from optlens.widgets.export.read import NotebookError, read_notebook, saved_models
from optlens.widgets.export.saved import Saved
from optlens.widgets.modules import notebook_module
from optlens.widgets.page import escaped
from optlens.widgets.stylesheet import stylesheet, variables

HOW_TO_SAVE = (
    "In JupyterLab, switch on Settings > Save Widget State Automatically, run all cells and save; "
    "jupyter nbconvert --execute --to notebook --inplace keeps the state by itself."
)


@dataclass(frozen=True)
class Exported:
    """Say what `export_notebook` has written.

    Attributes:
        path: the page.
        views: how many views of optlens are alive in it.
        notes: what a reader of the page should know, in sentences; the page has them too.
    """

    path: Path
    views: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return it in a line."""
        count = f"{self.views} view{'' if self.views == 1 else 's'}"
        return f"{self.path}: {count} rebuilt"


def export_notebook(path: str | os.PathLike, out: str | os.PathLike | None = None) -> Exported:
    """Write an executed notebook as one HTML file in which the views of optlens are alive.

    They are rebuilt from the widget state that the notebook was saved with, linked as they were,
    also from cell to cell. Nothing of the notebook is run: code is shown, markup in outputs and in
    text keeps its formatting and loses scripts, styles and whatever would load something. Other
    widgets, and views without a usable state, are shown as they were saved, with a note. The same
    notebook gives the same bytes.

    Args:
        path: the notebook, executed and saved with its widget state.
        out: the page; the notebook's name with `.html` by default. An existing file is replaced
            when the page is complete.

    Raises:
        OSError: if the notebook cannot be read, or the page cannot be written; an existing file is
            as it was then.
        NotebookError: if it is no notebook, a damaged one, or `out` is the notebook itself.
        RuntimeError: if nbconvert is missing; it comes with JupyterLab.

    Example:
        >>> from optlens.widgets import export_notebook
        >>> print(export_notebook("tour.ipynb", "tour.html"))  # doctest: +SKIP
        tour.html: 4 views rebuilt
    """
    out = Path(path).with_suffix(".html") if out is None else Path(out)
    if os.path.exists(out) and os.path.exists(path) and os.path.samefile(path, out):
        raise NotebookError(f"{out} is the notebook itself; give the page another name.")
    check_target(out)
    notebook = read_notebook(path)
    page, outputs, notes = _page(notebook, Path(path))
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Exported(out, outputs.alive, tuple(notes))


def _page(notebook: Any, path: Path) -> tuple[str, Outputs, list[str]]:
    outputs = Outputs(Saved(saved_models(notebook)), path.parent)
    language = _language(notebook)
    cells = [_cell(cell, outputs, language) for cell in notebook.cells]
    notes = _notes(notebook, outputs)
    saved = outputs.saved
    sheet, script = _sheet() + stylesheet(), notebook_module(*saved.kinds)
    policy = (
        f"default-src 'none'; style-src '{digest(sheet)}'; script-src '{digest(script)}'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    contents = escaped({"views": saved.views, "selections": saved.selections})
    foot = "Made by optlens. This page loads nothing and sends nothing."
    body = el(
        "body",
        el("script", Html(contents), type="application/json", id="contents"),
        el("main", [note(words) for words in notes], cells),
        el("footer", foot),
        el("script", Html(script), type="module"),
    )
    head = page_head(_title(notebook, path), policy, sheet)
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n", outputs, notes


def _cell(cell: Any, outputs: Outputs, language: str) -> Html | None:
    if cell.cell_type == "markdown":
        text = markdown(cell.source, outputs.folder, cell.get("attachments"))
        return el("div", text, class_="nb-prose")
    if cell.cell_type != "code":  # raw text is for other programs
        return None
    count = cell.get("execution_count")
    return el(
        "section",
        el("span", count, class_="nb-count", aria_hidden="true") if count else None,
        source_of(cell, language) if cell.source.strip() else None,
        [el("div", outputs.written(output), class_="nb-output") for output in cell.outputs],
        class_="nb-cell",
        aria_label="code cell" if not count else f"code cell {count}",
    )


def _notes(notebook: Any, outputs: Outputs) -> list[str]:
    """Return what the page says before all: what is not as it was in the notebook, and why."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if code and not any(cell.outputs or cell.execution_count for cell in code):
        return ["This notebook has not been run, so there are no results to show; run it first."]
    found = [output for cell in code for output in cell.outputs if VIEW in output.get("data", {})]
    if found and not outputs.saved.models:
        return [f"Interactive elements were not saved with this notebook. {HOW_TO_SAVE}"]
    return [
        f"{count} element{' is' if count == 1 else 's are'} not interactive in this page. {reason}"
        for reason, count in outputs.reasons.items()
    ]


def _language(notebook: Any) -> str:
    info = notebook.metadata.get("language_info", {})
    lexer = info.get("pygments_lexer") or info.get("name") or "ipython3"
    return "ipython3" if lexer == "python" else str(lexer)


def _title(notebook: Any, path: Path) -> str:
    """Return the first heading, or the file's name."""
    for cell in notebook.cells:
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            if line.startswith("# "):
                return visible(line.removeprefix("# ").strip())
    return visible(path.stem)


@cache
def _sheet() -> str:
    sheet = Path(__file__).with_name("notebook.css").read_text(encoding="utf-8")
    light, dark = (variables(name) for name in ("light", "dark"))
    depths = "".join(
        f".math-{depth}{{vertical-align:-{depth}px}}" for depth in range(1, DEEPEST + 1)
    )
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{dark}}}}}\n"
        f"{sheet}\n{depths}\n"
    )
