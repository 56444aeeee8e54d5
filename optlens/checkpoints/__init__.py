"""Checkpoints: finding, reading, checking, downloading, writing and converting them.

`layout` knows the files and spellings, `read` gets tensors out of them, `metaseq` out of Meta's
original ones, `matching` compares them with a model, `load` builds the model, `write` saves one,
`conversion` makes safetensors of any of them, `hub` downloads. For models larger than one device:
`streaming` reads blocks when a run reaches them (with `stored_tensors` and `on_disk`), `device_map`
divides a model among devices, `quantize` keeps matrices in 8 or 4 bits, and `arrangement` says
which of these is needed.
"""

from optlens.checkpoints.conversion import Conversion, convert
from optlens.checkpoints.errors import CheckpointError
from optlens.checkpoints.load import load_model
from optlens.checkpoints.write import save_model

__all__ = ["CheckpointError", "Conversion", "convert", "load_model", "save_model"]
