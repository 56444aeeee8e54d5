"""Read a notebook file, and say in words why it cannot be read."""

import json
import os
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optlens.files import why_unreadable

STATE = "application/vnd.jupyter.widget-state+json"
_HALF = re.compile(r"[\ud800-\udfff]")
_HALF_WRITTEN = re.compile(r"\\u[dD][89a-fA-F]")


class NotebookError(ValueError):
    """A file that cannot be exported as a notebook; the message says why, and what to try."""


def read_notebook(path: str | os.PathLike) -> Any:
    """Return a notebook in format 4, older ones converted.

    Raises:
        OSError: if the file cannot be read.
        NotebookError: if it holds no notebook, or a damaged one.
        RuntimeError: if nbconvert is missing, which comes with JupyterLab.
    """
    if find_spec("nbconvert") is None:
        raise RuntimeError(
            "Exporting notebooks needs nbconvert, which comes with JupyterLab: "
            "pip install 'optlens[notebooks]'"
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors write a mark before it
    except OSError as error:
        raise type(error)(
            error.errno, f"Cannot read {path}: {why_unreadable(path, error)}."
        ) from error
    except UnicodeDecodeError as error:
        raise NotebookError(f"{path} is no notebook: it is not UTF-8 text.") from error
    return _parsed(text, path)


def _parsed(text: str, path: str | os.PathLike) -> Any:
    import nbformat

    try:
        raw = json.loads(text)
    except ValueError as error:
        raise NotebookError(
            f"{path} is no notebook, or was cut short: {error}. Save it again in Jupyter."
        ) from error
    except RecursionError as error:
        raise NotebookError(f"{path} is no notebook: its JSON is nested too deeply.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("nbformat"), int):
        raise NotebookError(
            f"{path} is JSON, but no notebook: a notebook has 'nbformat' and 'cells'."
        )
    if raw["nbformat"] > 4:
        raise NotebookError(
            f"{path} has notebook format {raw['nbformat']}; formats up to 4 can be read. "
            "A newer optlens may know it."
        )
    if _HALF_WRITTEN.search(text):  # halves of characters, which no file can hold as text
        text = _HALF.sub("\ufffd", json.dumps(raw, ensure_ascii=False))
    damage: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cells without ids, which nothing here needs
            notebook = nbformat.reads(text, as_version=4, capture_validation_error=damage)
    except Exception as error:  # a converter met something it did not expect
        raise NotebookError(f"{path} is damaged as a notebook: {error!r}.") from error
    if damage:
        (found,) = damage.values()
        where = "/".join(map(str, getattr(found, "absolute_path", ())))
        raise NotebookError(
            f"{path} is damaged as a notebook{f' at {where}' if where else ''}: "
            f"{getattr(found, 'message', found)}. Save it again in Jupyter."
        )
    return notebook


def saved_models(notebook: Any) -> dict[str, Any]:
    """Return the saved widget models of a notebook by id; none if it was saved without them."""
    widgets = notebook.metadata.get("widgets")
    saved = widgets.get(STATE) if isinstance(widgets, dict) else None
    models = saved.get("state") if isinstance(saved, dict) else None
    return models if isinstance(models, dict) else {}
