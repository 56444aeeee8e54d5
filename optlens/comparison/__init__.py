"""Two runs compared: two models on one prompt, or one model on two."""

from optlens.comparison.alignment import align, column_labels
from optlens.comparison.result import Comparison
from optlens.comparison.runs import compare

__all__ = ["Comparison", "align", "column_labels", "compare"]
