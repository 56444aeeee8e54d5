"""The notebooks as they are stored: with outputs, without noise, one place to name the model.

That they run, and that their asserts hold, is checked by `pytest --nbval-lax`.
"""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks_and_the_readme_names_them():
    assert "00_quick_tour" in [path.stem for path in NOTEBOOKS]
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"(notebooks/{path.name})" not in readme] == []


def test_stored_as_run_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    # A warning in a lesson is either wrong or in the way.
    streams = [o for cell in cells for o in cell.outputs if o.output_type == "stream"]
    assert [stream.text for stream in streams if stream.name == "stderr"] == []


def test_stored_without_noise(notebook):
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert all(cell.metadata == {} for cell in notebook.cells)
    texts = [
        output.data.get("text/plain", "")
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "data" in output
    ]
    assert [text for text in texts if "0x" in text] == []  # addresses differ on every run


def test_model_is_named_once(notebook):
    named = [
        line
        for cell in code_cells(notebook)
        for line in cell.source.splitlines()
        if line.startswith("MODEL =")
    ]
    assert len(named) == 1 and named[0].startswith("MODEL = None")


def test_claims_are_asserted_and_chance_is_seeded(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert source.count("assert") >= 5
    assert "manual_seed" in source or "rand" not in source


def test_length_is_readable(notebook):
    assert 20 <= len(notebook.cells) <= 60
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= len(notebook.cells) / 3
