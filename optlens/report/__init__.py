"""Show a recording outside Python: one self-contained HTML page, and a view for notebooks."""

from optlens.report.view import RecordingView, write_html

__all__ = ["RecordingView", "write_html"]
