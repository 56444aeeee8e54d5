"""Damaged notebooks: what is wrong with one thing in them is said there, and the rest is shown."""

import base64
import json
import re
import time
from pathlib import Path

import matplotlib
import nbformat
import pytest
from executed_notebook import DOT

from optlens.widgets import AttentionView
from optlens.widgets.export import NotebookError, export_notebook
from optlens.widgets.export.clean import cleaned
from optlens.widgets.export.outputs import MOST_AGAIN, VIEW
from optlens.widgets.export.prose import _drawn, formula, terminal
from optlens.widgets.export.read import STATE

NAN = float("nan")
NOTE = '<p class="nb-note">Not interactive in this page.'


def saved_view(selection: str = "s", **more) -> dict:
    """Return the least state that a view can be rebuilt from."""
    part = {"kind": AttentionView.kinds[0], "state": {}}
    own = {"format": AttentionView.FORMAT, "prompts": ["a"], "parts": [part]}
    own |= {"_anywidget_id": "optlens.widgets.views.AttentionView"}
    return {"state": own | {"selection": f"IPY_MODEL_{selection}"} | more, "buffers": []}


def box(*children: str, **more) -> dict:
    references = [f"IPY_MODEL_{child}" for child in children]
    return {"model_name": "VBoxModel", "state": {"children": references}} | more


def exported(folder: Path, models: dict, *shown, cells=()) -> tuple:
    """Export a notebook that shows these models and then a sound view; return result and text."""
    sound = {"v": saved_view(), "s": {"state": {"value": {"prompt": 0}}}}
    outputs = [
        nbformat.v4.new_output("display_data", {VIEW: name, "text/plain": f"still {number}"})
        for number, name in enumerate([*shown, {"model_id": "v"}])
    ]
    code = nbformat.v4.new_code_cell("1", outputs=outputs)
    book = nbformat.v4.new_notebook(cells=[*cells, code])
    book.metadata["widgets"] = {STATE: {"state": sound | models}}
    (folder / "book.ipynb").write_text(json.dumps(book), encoding="utf-8")
    made = export_notebook(folder / "book.ipynb")
    return made, made.path.read_text(encoding="utf-8")


def contents(page: str) -> dict:
    return json.loads(re.search(r'id="contents">(.*?)</script>', page)[1])


# --- saved widgets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        box(state={"children": 3}),
        box(state=[1]),
        {"model_name": ["VBoxModel"], "state": {}},
        saved_view(_anywidget_id=5),
        saved_view(prompts=[NAN]),
        saved_view(selection="with_nan"),
        saved_view(selection="list"),
    ],
    ids=["children", "state", "name", "id", "nan", "nan-selected", "selection"],
)
def test_a_damaged_widget_is_shown_as_saved_and_the_others_live(tmp_path, model):
    models = {
        "x": model,
        "with_nan": {"state": {"value": {"layer": NAN}}},
        "list": {"state": {"value": [1]}},
    }
    made, page = exported(tmp_path, models, {"model_id": "x"}, {"model_id": "x"})
    assert made.views == 1 and page.count(NOTE) == 2
    assert "still 0" in page and "still 1" in page
    held = contents(page)
    assert [view["selection"] for view in held["views"]] == ["IPY_MODEL_0"]
    assert len(held["selections"]) == 1


def test_an_output_that_names_no_widget_is_shown_as_saved(tmp_path):
    made, page = exported(tmp_path, {}, "x", ["x"], 3)
    assert made.views == 1 and page.count(NOTE) == 3


def test_a_box_in_itself_is_shown_once(tmp_path):
    models = {"x": box("y", "v"), "y": box("x")}
    made, page = exported(tmp_path, models, {"model_id": "x"})
    assert made.views == 2 and page.count(f"{NOTE} This box stands in itself") == 1


def test_boxes_deep_inside_each_other_end_in_a_note(tmp_path):
    models = {f"b{number}": box(f"b{number + 1}") for number in range(1500)}
    made, page = exported(tmp_path, models, {"model_id": "b0"})
    assert made.views == 1 and page.count(NOTE) == 1


def test_boxes_that_share_their_children_do_not_fill_the_page(tmp_path):
    models = {f"b{number}": box(*[f"b{number + 1}"] * 2) for number in range(16)}
    models |= {"b16": box("v", "v", "new"), "new": saved_view()}
    made, page = exported(tmp_path, models, {"model_id": "b0"})
    assert 3 < made.views < MOST_AGAIN + 3
    assert any(f"{MOST_AGAIN} times" in note for note in made.notes)
    assert page.count(NOTE) < 2 * MOST_AGAIN


# --- text, pictures and markup -------------------------------------------------------------------


def test_a_long_line_is_read_in_a_moment():
    begun = time.perf_counter()
    assert terminal("x" * 100_000) == "x" * 100_000
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize(
    ("printed", "seen"),
    [("a\rb\r\nc", "b\nc"), ("a\r\r\nb", "a\nb"), ("a\r\n\rb\r", "a\nb"), ("a\n\n", "a\n\n")],
)
def test_a_line_written_over_shows_its_end(printed, seen):
    assert terminal(printed) == seen


def test_a_picture_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "dot.png").write_bytes(base64.b64decode(DOT))

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for source in ("%00.png", "dot.png"):
        expected = f"[picture not in this page: {source}]"
        assert cleaned(f'<img src="{source}">', tmp_path) == expected


def test_an_attached_picture_may_be_saved_in_lines():
    attached = {"dot.png": {"image/png": [DOT[:40] + "\n", DOT[40:]]}}
    assert DOT in cleaned('<img src="attachment:dot.png">', None, attached)


def test_a_section_that_is_none_is_text():
    assert cleaned("<b>a</b><![foo[ x") == "<b>a</b>&lt;![foo[ x"


@pytest.mark.parametrize(
    "address",
    ["da\tta:text/html,x", "d\nata:text/html,x", "\x01data:text/html,x", "da&Tab;ta:text/html,x"],
)
def test_an_address_with_data_is_taken_out_however_it_is_written(address):
    assert cleaned(f'<a href="{address}">x</a>') == "<a>x</a>"


@pytest.mark.parametrize(
    "tex", [r"\sqrt{" * 30 + "x" + "}" * 30, r"\frac{1}{" * 60 + "x" + "}" * 60]
)
def test_a_formula_too_deep_to_be_drawn_is_shown_as_written(tex):
    assert formula(tex, False) == f'<code class="math-source">{tex}</code>'


def test_formulas_do_not_take_the_style_of_the_users_plots():
    plain = formula("q_1", False)
    _drawn.cache_clear()
    with matplotlib.rc_context({"text.color": "white", "mathtext.default": "bf"}):
        assert formula("q_1", False) == plain
        assert matplotlib.rcParams["text.color"] == "white"


# --- files ---------------------------------------------------------------------------------------


def test_halves_of_characters_are_replaced(tmp_path):
    half = "\ud800"
    prose = nbformat.v4.new_markdown_cell(f"# title {half}")
    printed = nbformat.v4.new_output("stream", text=f"printed {half}")
    code = nbformat.v4.new_code_cell(f"code = '{half}'  # \\ud800 😀", outputs=[printed])
    _, page = exported(tmp_path, {"x": {half: half}}, cells=[prose, code])
    assert "<h1>title \ufffd</h1>" in page and "printed \ufffd" in page
    assert page.count("\ufffd") == 4 and "\\ud800 😀" in page


def test_nesting_without_end_is_refused(tmp_path):
    (tmp_path / "it.ipynb").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(NotebookError, match="nested too deeply"):
        export_notebook(tmp_path / "it.ipynb")


def test_a_mark_of_the_byte_order_is_no_damage(tmp_path):
    text = json.dumps(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Read")]))
    (tmp_path / "it.ipynb").write_text(text, encoding="utf-8-sig")
    page = export_notebook(tmp_path / "it.ipynb").path.read_text(encoding="utf-8")
    assert "<h1>Read</h1>" in page
