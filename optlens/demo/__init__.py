"""The embedded demo checkpoint: a small OPT trained on a synthetic corpus whose truth is known.

`path` gives its folder; ``MODEL_CARD.md`` there says what it can do and how that was measured.
"""

from pathlib import Path


def path() -> Path:
    """Give the folder of the embedded checkpoint, in Hugging Face format.

    Returns:
        The folder that holds ``config.json``, ``model.safetensors`` and the tokenizer files.

    Example:
        >>> from optlens import demo
        >>> (demo.path() / "config.json").name
        'config.json'
    """
    return Path(__file__).resolve().parent
