"""Executed notebooks as one HTML file, with every view of optlens alive: no kernel, no network.

The views are rebuilt from the widget state that the notebook holds, by the modules of this
installation: no code of the notebook runs, neither in Python nor in the browser.
"""

from optlens.widgets.export.page import Exported, export_notebook
from optlens.widgets.export.read import NotebookError

__all__ = ["Exported", "NotebookError", "export_notebook"]
