"""Reading predictions out of the residual stream."""

from optlens.lens.logit import LogitLens, lens_of_recording, logit_lens, store_lens

__all__ = ["LogitLens", "lens_of_recording", "logit_lens", "store_lens"]
