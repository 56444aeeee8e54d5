"""One picture of many heads, for places that show no JavaScript."""

import numpy as np

from optlens.plots.style import STYLES
from optlens.report.pictures import attention_png
from optlens.widgets.arrays import MASKED, STEPS

_GAP = 1  # cells between heads
_SIDE = 40  # pixels a side of one head, about


def mosaic(thumbs: np.ndarray) -> str:
    """Return small pictures of heads in rows of layers, as the data URI of one PNG file.

    Args:
        thumbs: levels `[layer, head, query, key]`, as `optlens.widgets.arrays.levels` gives them.
    """
    weights = np.where(thumbs == MASKED, np.nan, (thumbs / STEPS) ** 2)
    zoom = max(1, _SIDE // thumbs.shape[-1])
    gap = ((0, 0), (0, 0), (0, _GAP), (0, _GAP))
    framed = np.pad(weights, gap, constant_values=0.0)  # zero has the colour of the paper
    n_layers, n_heads, height, width = framed.shape
    sheet = framed.transpose(0, 2, 1, 3).reshape(n_layers * height, n_heads * width)
    return attention_png(sheet, STYLES["light"], zoom=zoom)
