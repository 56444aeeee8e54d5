"""Notebooks as pages: what stands in them, what cannot, and that no file is ever lost."""

import base64
import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from executed_notebook import DOT, executed

from optlens.cli import main
from optlens.widgets.export import NotebookError, clean, export_notebook
from optlens.widgets.export.clean import cleaned
from optlens.widgets.export.prose import code, formula, markdown, terminal
from optlens.widgets.export.read import STATE


@pytest.fixture(scope="module")
def notebook():
    return executed()


@pytest.fixture
def written(notebook, tmp_path):
    """Return a function that writes the notebook, changed as asked, and gives its path."""

    def write(change=lambda book: None) -> Path:
        book = copy.deepcopy(notebook)
        change(book)
        path = tmp_path / "book.ipynb"
        nbformat.write(book, path)
        return path

    (tmp_path / "dot.png").write_bytes(base64.b64decode(DOT))
    return write


def contents(page: str) -> dict:
    return json.loads(re.search(r'id="contents">(.*?)</script>', page)[1])


def models_of(book) -> dict:
    return book.metadata["widgets"][STATE]["state"]


def model_of(book, view: str) -> dict:
    return next(
        model for model in models_of(book).values()
        if model["state"].get("_anywidget_id", "").endswith(f".{view}")
    )  # fmt: skip


def bare(page: str) -> str:
    """Return what a page shows without its own scripts and sheets."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)


# --- what stands in the page ---------------------------------------------------------------------


def test_views_are_kept_with_their_numbers_and_share_their_selection(notebook, written, tmp_path):
    made = export_notebook(written(), tmp_path / "page.html")
    assert (made.views, made.path) == (3, tmp_path / "page.html")
    assert made.notes == (
        "2 elements are not interactive in this page. "
        "Widgets of other libraries need a running notebook.",
    )
    page = made.path.read_text(encoding="utf-8")
    held = contents(page)
    assert [[part["kind"] for part in view["parts"]] for view in held["views"]] == [
        ["interventions", "lens", "attention", "residual"], ["attention"], ["lens"],
    ]  # fmt: skip
    assert {view["selection"] for view in held["views"]} == {"IPY_MODEL_0"}
    assert held["selections"][0]["layer"] == 4
    saved = model_of(notebook, "AttentionView")
    path = ["parts", 0, "state", "exact", "data"]
    (bytes_saved,) = [entry["data"] for entry in saved["buffers"] if entry["path"] == path]
    assert held["views"][1]["parts"][0]["state"]["exact"]["data"] == bytes_saved
    assert re.findall(r'data-view="(\d)"', page) == ["0", "1", "2"]
    assert "_esm" not in json.dumps(held)  # code of the notebook is not taken


def test_each_view_has_its_picture_and_table_where_scripts_are_off(written, tmp_path):
    page = export_notebook(written()).path.read_text(encoding="utf-8")
    first = page.split('data-view="0"')[1].split("</section>")[0]
    assert first.count("<table>") == 3 and "data:image/png;base64," in first


def test_text_code_and_outputs_are_shown(written):
    page = bare(export_notebook(written()).path.read_text(encoding="utf-8"))
    assert "<title>Heads &amp; tails · optlens</title>" in page
    assert "<h1>Heads &amp; tails</h1>" in page and "<em>text</em>" in page
    assert '<span class="kn">import</span>' in page
    assert "&lt;i&gt;printed&lt;/i&gt;" in page
    assert '<span class="ansi-red-fg"> in red</span>' in page
    assert re.search(r'nb-stderr"[^>]*>to stderr', page)
    assert "ZeroDivisionError" in page and "IntSlider(value=7)" in page
    assert page.count(f"data:image/png;base64,{DOT}") == 2  # attached, and beside the notebook
    assert "[picture not in this page: elsewhere]" in page
    assert '<td align="right">2</td>' in page and "☑ done" in page
    assert page.count('class="math math-') == 2 and '<code class="math-source">' in page


def test_nothing_that_acts_or_loads_is_left(written):
    page = bare(export_notebook(written()).path.read_text(encoding="utf-8"))
    page = re.sub(r'(?s)<pre class="nb-code".*?</pre>', "", page)  # code is text
    assert "<b>kept</b>" in page and "cell</td>" in page
    for gone in ("<script", "<iframe", "<form", "<input", "onerror=", "onclick=", " style=",
                 "javascript:", "display: none", "<svg"):  # fmt: skip
        assert gone not in page, gone
    assert set(re.findall(r'href="([^"]*)"', page)) == {"data:,", "https://example.org"}
    assert all(uri.startswith("data:image/") for uri in re.findall(r'src="([^"]*)"', page))


def test_the_same_notebook_gives_the_same_bytes(written, tmp_path):
    def renamed(book):
        """Give the models other ids, as another run of the notebook would."""
        text = json.dumps(book)
        for number, key in enumerate(models_of(book)):
            text = text.replace(key, f"{number:032x}")
        book.update(nbformat.from_dict(json.loads(text)))

    first = export_notebook(written(), tmp_path / "1.html").path.read_bytes()
    assert export_notebook(written(), tmp_path / "2.html").path.read_bytes() == first
    assert export_notebook(written(renamed), tmp_path / "3.html").path.read_bytes() == first


# --- what cannot be alive ------------------------------------------------------------------------


def without_state(book):
    del book.metadata["widgets"]


def of_another_version(book):
    model_of(book, "AttentionView")["state"]["format"] = 0


def without_version(book):
    del model_of(book, "AttentionView")["state"]["format"]


def of_an_unknown_class(book):
    model_of(book, "AttentionView")["state"]["_anywidget_id"] = "optlens.widgets.views.LaterView"


def without_parts(book):
    del model_of(book, "AttentionView")["state"]["parts"]


def without_selection(book):
    model_of(book, "AttentionView")["state"]["selection"] = "IPY_MODEL_nowhere"


def without_bytes(book):
    model_of(book, "AttentionView")["buffers"].pop()


def with_damaged_bytes(book):
    model_of(book, "AttentionView")["buffers"][0]["data"] = "no base64!"


def with_an_unknown_kind(book):
    model_of(book, "AttentionView")["state"]["parts"][0]["kind"] = "lens"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_another_version, "Saved by another version of optlens"),
        (without_version, "Saved by another version of optlens"),
        (of_an_unknown_class, "Saved by another version of optlens"),
        (without_parts, "The saved state is not complete"),
        (without_selection, "The saved state is not complete"),
        (without_bytes, "The saved state is not complete"),
        (with_damaged_bytes, "The saved state is not complete"),
        (with_an_unknown_kind, "The saved state is not complete"),
    ],
)
def test_a_view_that_cannot_be_rebuilt_is_shown_as_saved_with_a_note(written, change, reason):
    made = export_notebook(written(change))
    assert made.views == 2  # the others are alive
    assert [note for note in made.notes if reason in note] == [made.notes[0]]
    page = made.path.read_text(encoding="utf-8")
    still = page.split(f"Not interactive in this page. {reason}")[1].split("</section>")[0]
    assert "<table>" in still and "data:image/png;base64," in still


def test_a_notebook_saved_without_state_says_how_to_save_it(written):
    made = export_notebook(written(without_state))
    assert made.views == 0
    assert "Save Widget State Automatically" in made.notes[0] and len(made.notes) == 1
    page = made.path.read_text(encoding="utf-8")
    assert "Save Widget State Automatically" in page
    assert page.count("The notebook was saved without its state.") == 4


def test_a_notebook_that_was_never_run_says_so(written):
    def fresh(book):
        without_state(book)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None

    made = export_notebook(written(fresh))
    assert made.notes == (
        "This notebook has not been run, so there are no results to show; run it first.",
    )
    assert made.notes[0] in made.path.read_text(encoding="utf-8")


def test_bytes_as_hexadecimal_are_read(notebook, written):
    def in_hex(book):
        for entry in model_of(book, "AttentionView")["buffers"]:
            entry.update(data=base64.b64decode(entry["data"]).hex(), encoding="hex")

    first = export_notebook(written()).path.read_bytes()
    assert export_notebook(written(in_hex)).path.read_bytes() == first


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no notebook, or was cut short"),
        ('{"cells": [', "no notebook, or was cut short"),
        ("[1, 2]", "JSON, but no notebook"),
        ('{"a": 1}', "JSON, but no notebook"),
        ('{"nbformat": 9, "cells": []}', "notebook format 9"),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 3}', "damaged"),
        ('{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [{"source": 1}]}', "damaged"),
    ],
)  # fmt: skip
def test_what_is_no_notebook_is_refused(tmp_path, text, said):
    (tmp_path / "it.ipynb").write_text(text, encoding="utf-8")
    (tmp_path / "it.html").write_text("kept", encoding="utf-8")
    with pytest.raises(NotebookError, match=said):
        export_notebook(tmp_path / "it.ipynb")
    assert (tmp_path / "it.html").read_text(encoding="utf-8") == "kept"


def test_other_bytes_and_missing_files_are_refused(tmp_path):
    (tmp_path / "it.ipynb").write_bytes(b"\xff\xfe\x00PNG")
    with pytest.raises(NotebookError, match="not UTF-8"):
        export_notebook(tmp_path / "it.ipynb")
    with pytest.raises(FileNotFoundError, match=r"none\.ipynb: No such file"):
        export_notebook(tmp_path / "none.ipynb")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        export_notebook(tmp_path, tmp_path / "page.html")


def test_the_notebook_itself_is_never_written_over(written, tmp_path):
    path = written()
    before = path.read_bytes()
    (tmp_path / "link.html").symlink_to(path)
    for out in (path, tmp_path / "link.html"):
        with pytest.raises(NotebookError, match="the notebook itself"):
            export_notebook(path, out)
    with pytest.raises(FileNotFoundError, match="create it first"):
        export_notebook(path, tmp_path / "no" / "page.html")
    assert path.read_bytes() == before


def test_an_old_page_stays_if_the_new_one_cannot_be_made(written, tmp_path, monkeypatch):
    (tmp_path / "book.html").write_text("old", encoding="utf-8")
    path = written()

    def full(*given, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device. Nothing was changed."):
        export_notebook(path)
    monkeypatch.undo()
    assert (tmp_path / "book.html").read_text(encoding="utf-8") == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "book.html",
        "book.ipynb",
        "dot.png",
    ]


def test_notebooks_of_older_formats_are_read(tmp_path):
    old = {
        "nbformat": 3, "nbformat_minor": 0, "metadata": {"name": ""},
        "worksheets": [{"metadata": {}, "cells": [
            {"cell_type": "heading", "level": 1, "metadata": {}, "source": ["Old"]},
            {"cell_type": "code", "collapsed": False, "input": ["1 + 1"], "language": "python",
             "metadata": {}, "prompt_number": 1, "outputs": [
                 {"output_type": "pyout", "prompt_number": 1, "metadata": {}, "text": ["2"]}]},
        ]}],
    }  # fmt: skip
    (tmp_path / "old.ipynb").write_text(json.dumps(old), encoding="utf-8")
    page = export_notebook(tmp_path / "old.ipynb").path.read_text(encoding="utf-8")
    assert "<h1>Old</h1>" in page and ">2</pre>" in page


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_what_is_in_it(written, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["export", str(written()), "-o", str(page)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{page}: 3 views rebuilt\n"
    assert err == (
        "optlens: 2 elements are not interactive in this page. "
        "Widgets of other libraries need a running notebook.\n"
    )


def test_the_command_refuses_in_one_sentence(tmp_path, capsys):
    (tmp_path / "it.ipynb").write_text("{", encoding="utf-8")
    assert main(["export", str(tmp_path / "it.ipynb")]) == 2
    assert "is no notebook, or was cut short" in capsys.readouterr().err


def test_importing_the_views_loads_no_converter():
    code = "import optlens.widgets, sys; print([n for n in ('nbconvert', 'bleach') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- pieces --------------------------------------------------------------------------------------


def test_pictures_come_from_the_notebooks_folder_alone(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    for folder in (inside, tmp_path):
        (folder / "dot.png").write_bytes(base64.b64decode(DOT))
    (inside / "secret.txt").write_text("secret", encoding="utf-8")
    (inside / "out.png").symlink_to(tmp_path / "dot.png")
    assert DOT in cleaned('<img src="dot.png">', inside)
    for source in ("../dot.png", str(tmp_path / "dot.png"), "secret.txt", "out.png", "file:///x.png",
                   "data:text/html;base64,AAAA", "none.png", "attachment:none.png"):  # fmt: skip
        assert "<img" not in cleaned(f'<img src="{source}">', inside), source


def test_a_huge_picture_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "dot.png").write_bytes(base64.b64decode(DOT))
    monkeypatch.setattr(clean, "MOST_BYTES", 20)
    assert cleaned('<img src="dot.png">', tmp_path) == "[picture not in this page: dot.png]"


@pytest.mark.parametrize(
    "hostile",
    [
        "<scr<script>ipt>alert(1)</script>",
        "<svg><style><img src=x onerror=alert(1)>",
        "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
        '<a href="java\tscript:alert(1)">x</a>',
        '<a href=" data:text/html,x">x</a>',
        "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
        '<b class="nb-view" data-view="0" id="contents" style="top:0">x</b>',
        "<!--><img src=x onerror=alert(1)>-->",
    ],
)
def test_tricks_of_markup_come_to_nothing(hostile):
    found = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, given: found.append((tag, [name for name, _ in given]))
    reader.feed(cleaned(hostile))
    assert [tag for tag, _ in found if tag not in ("a", "b", "p", "table")] == []
    assert [names for _, names in found if names not in ([], ["title"])] == []


def test_a_terminal_shows_the_end_of_a_line_written_over():
    assert terminal("10 %\r50 %\r100 %\nend\r\n") == "100 %\nend\n"
    assert terminal("\x1b[38;5;123m<b>\x1b[0m") == "<span>&lt;b&gt;</span>"


def test_a_formula_says_its_source_and_code_of_any_language_is_shown():
    assert 'alt="x &lt; y"' in formula("x < y", False)
    assert formula(r"\unknown{x}", False) == r'<code class="math-source">\unknown{x}</code>'
    assert "select &lt;" in code("select <", "no such language")
    assert markdown("```mermaid\na-->b\n```") == "<pre>a--&gt;b\n</pre>"
