"""Draw what a recording holds as matplotlib figures, from arrays and labels alone.

Nothing here knows a model or a recording: every function takes arrays (NumPy or torch) with the
labels to print, and returns a matplotlib `Figure` that belongs to the caller. It is registered
nowhere, so nothing has to be closed, and a notebook shows it as the last value of a cell.
`figure.savefig("x.png")` writes it, `style="dark"` draws it for a dark page.
"""

from optlens.plots.attention import attention_grid, attention_head, head_scores
from optlens.plots.graph import contribution_graph
from optlens.plots.neurons import neuron_examples
from optlens.plots.stages import stages
from optlens.plots.stream import lens_heatmap, lens_trace, next_tokens, residual_norms
from optlens.plots.style import STYLES, Style
from optlens.plots.sweep import estimate_scatter, sweep_heatmap
from optlens.plots.waterfall import waterfall

__all__ = [
    "STYLES",
    "Style",
    "attention_grid",
    "attention_head",
    "contribution_graph",
    "estimate_scatter",
    "head_scores",
    "lens_heatmap",
    "lens_trace",
    "neuron_examples",
    "next_tokens",
    "residual_norms",
    "stages",
    "sweep_heatmap",
    "waterfall",
]
