"""Checkpoints in Hugging Face format: finding, reading, checking, downloading and writing them.

`layout` knows the files and spellings, `read` gets tensors out of them, `matching` compares them
with a model, `load` builds the model, `write` saves one, `hub` downloads.
"""

from optlens.checkpoints.errors import CheckpointError
from optlens.checkpoints.load import load_model
from optlens.checkpoints.write import save_model

__all__ = ["CheckpointError", "load_model", "save_model"]
