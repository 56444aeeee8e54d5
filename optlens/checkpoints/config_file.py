"""Reading a checkpoint's `config.json`, and saying so when it is not an OPT's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from optlens.checkpoints.errors import CheckpointError, listing
from optlens.checkpoints.layout import (
    CONFIG,
    CONVERSION,
    READABLE,
    choose_weights,
    metaseq_files,
    read_json,
)
from optlens.checkpoints.metaseq_config import infer_config
from optlens.config import ConfigError, OPTConfig


def read_config(folder: Path) -> OPTConfig:
    """Return the config of a checkpoint folder.

    Args:
        folder: A local folder in Hugging Face format, or with Meta's original files, from which
            the config is inferred where they have none.

    Raises:
        CheckpointError: If there is no config.json, it is not an OPT's, the weights are
            quantised, or a field has an impossible value.
    """
    path = folder / CONFIG
    if not os.path.lexists(path):
        return _config_of_metaseq(folder)
    values = read_json(path)
    _refuse_foreign(path, values)
    try:
        return OPTConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _config_of_metaseq(folder: Path) -> OPTConfig:
    """Infer the config of a folder without config.json, if Meta's original files are in it."""
    found = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    original = metaseq_files(folder) if choose_weights(found) is None else ()
    if original:
        return infer_config(original)
    if CONVERSION in found:
        raise CheckpointError(
            f"{folder} holds a conversion that did not finish. Run `optlens convert` again with "
            "the same source and this folder; what is done is kept."
        )
    holds = f"it holds {listing(found)}" if found else "it is empty"
    raise CheckpointError(
        f"{folder} is not a checkpoint: there is no {CONFIG} ({holds}). {READABLE}."
    )


def _refuse_foreign(path: Path, values: dict[str, Any]) -> None:
    """Raise on another model's config and on formats of weights that are not read."""
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(
            f"{path}: architectures must be a list of names, got {architectures!r}."
        )
    other = [name for name in architectures if not str(name).startswith("OPT")]
    if model_type not in (None, "opt") or (model_type is None and other):
        given = f"a {model_type!r} model" if model_type else f"a {other[0]}"
        raise CheckpointError(
            f"{path} describes {given}; optlens reads OPT models only (model_type 'opt'): "
            "facebook/opt-125m to opt-66b, facebook/opt-iml-*, facebook/galactica-*, and models "
            "fine-tuned from them."
        )
    if values.get("quantization_config"):
        method = values["quantization_config"]
        if isinstance(method, dict):
            method = method.get("quant_method", "unknown")
        raise CheckpointError(
            f"{path} describes weights quantised with {method!r}, which optlens does not read. "
            "Load the model that it was made from."
        )
