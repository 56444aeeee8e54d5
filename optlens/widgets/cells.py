"""Which views a notebook cell has shown, so that running it again frees those it showed before.

A widget lives as long as the kernel, shown or not: a cell run ten times would hold its data ten
times, and a saved notebook would hold all ten.
"""

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

_SHOWN: dict[str, tuple[str, WeakSet]] = {}  # cell -> its last run, what it has shown
_PLACES: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # view -> the cells that show it


def shown(view: Any) -> None:
    """Note that a view is being shown, and close what an earlier run of the same cell has shown.

    A view that another cell shows too stays open; so does everything outside of notebooks, where
    no cell is known.
    """
    cell, run = _running()
    if cell is None:
        return
    last, views = _SHOWN.get(cell, (run, WeakSet()))
    if last != run:
        for old in list(views):
            places = _PLACES.get(old, set())
            places.discard(cell)
            if old is not view and not places:
                old.close()
        views = WeakSet()
    views.add(view)
    _SHOWN[cell] = (run, views)
    _PLACES.setdefault(view, set()).add(cell)


def _running() -> tuple[str | None, str]:
    """Return the cell that runs, by the notebook's own id for it, and the id of this run."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None, ""
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return None, ""
    request = kernel.get_parent("shell")
    cell = request.get("metadata", {}).get("cellId")
    return cell, request.get("header", {}).get("msg_id", "")
