"""Writing on from a prompt: greedy, sampled or searched with beams, with hooks alive while it runs.

Read `run.py` for what is done with a request, `decode.py` and `beams.py` for how tokens are chosen,
`warpers.py` for what is done to logits before, `options.py` for all that can be asked for.
"""

from optlens.generation.options import GenerationOptions
from optlens.generation.result import Generation
from optlens.generation.run import generate
from optlens.generation.streaming import Stream, stream

__all__ = ["Generation", "GenerationOptions", "Stream", "generate", "stream"]
