"""Show results outside Python: self-contained HTML pages, and a still view of sweeps for notebooks."""

from optlens.report.sweep_view import PatchView, write_sweep_html
from optlens.report.view import write_html

__all__ = ["PatchView", "write_html", "write_sweep_html"]
