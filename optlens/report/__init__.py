"""Show results outside Python: one self-contained HTML page, and a view for notebooks."""

from optlens.report.sweep_view import PatchView, write_sweep_html
from optlens.report.view import RecordingView, write_html

__all__ = ["PatchView", "RecordingView", "write_html", "write_sweep_html"]
