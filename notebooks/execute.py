"""Run the notebooks afresh and store them with their outputs and nothing else.

    python notebooks/execute.py [NOTEBOOK ...]

Each notebook runs from the top in a kernel of its own, with the optlens of this folder. Times,
machine names and cell settings are left out, so that running twice gives the same file where
results are the same. A cell that fails ends the run, and that notebook is left as it was.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def execute(path: Path) -> None:
    """Run one notebook and write it back."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
    NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(HERE)}},
        coalesce_streams=True,  # else what a cell prints is cut in pieces by how fast it was
    ).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # the times at which it ran
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)
    print(f"{path.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    # The kernel is a process of its own and finds the package by this.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
    )
    os.environ["TQDM_DISABLE"] = "1"  # a slow machine shows progress bars, a stored page does not
    for name in sys.argv[1:] or sorted(HERE.glob("*.ipynb")):
        execute(Path(name).resolve())
