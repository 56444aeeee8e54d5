"""Reading predictions out of the residual stream."""

from optlens.lens.direct import direct_logit_attribution
from optlens.lens.direct_result import LogitAttribution
from optlens.lens.logit import LogitLens, lens_of_recording, logit_lens, store_lens

__all__ = [
    "LogitAttribution",
    "LogitLens",
    "direct_logit_attribution",
    "lens_of_recording",
    "logit_lens",
    "store_lens",
]
