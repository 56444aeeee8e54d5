"""Views of a recording in a notebook: look, click, select; in a page of their own; as a picture.

The only part of optlens that imports a Jupyter library. `rec.show()` gives the `Explorer`; the other
views show one thing each, and all views of one recording are linked: what is selected in one is
selected in all, in Python too.

Example:
    >>> import optlens
    >>> rec = optlens.load().record("When Mary and John went to the store, John gave a drink to")
    >>> view = optlens.widgets.AttentionView(rec)
    >>> view.observe(lambda change: print(change["new"]["head"]), "selected")
    >>> optlens.widgets.LensView(rec).selected = {"head": 2}  # a linked view hears of it
    2
"""

from optlens.widgets.architecture_view import ArchitectureView
from optlens.widgets.circuit_views import AttributionView, GraphView
from optlens.widgets.explorer import Explorer
from optlens.widgets.export import export_notebook
from optlens.widgets.neuron_view import NeuronsView
from optlens.widgets.patching_view import PatchingView
from optlens.widgets.result_views import CompareView, GenerationView
from optlens.widgets.selection import Selection
from optlens.widgets.views import AttentionView, LensView, ResidualView

__all__ = [
    "ArchitectureView",
    "AttentionView",
    "AttributionView",
    "CompareView",
    "Explorer",
    "GenerationView",
    "GraphView",
    "LensView",
    "NeuronsView",
    "PatchingView",
    "ResidualView",
    "Selection",
    "export_notebook",
]
