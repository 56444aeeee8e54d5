"""What a plan is made for: a model that may not be here, and memory that may not be here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optlens.checkpoints.config_file import read_config
from optlens.checkpoints.errors import CheckpointError
from optlens.checkpoints.placement import device_name, free_memory, parse_device, parse_dtype
from optlens.checkpoints.shards import parse_size
from optlens.config import ConfigError, OPTConfig
from optlens.memory import available_bytes

_PUBLISHED = torch.float16  # what Meta's weights are stored in


@dataclass(frozen=True)
class Stored:
    """A model as its config describes it.

    Attributes:
        name: What to call it.
        config: Its config.
        dtype: Of its weights, in the files or in memory.
        loaded: Whether it is in memory already.
    """

    name: str
    config: OPTConfig
    dtype: torch.dtype
    loaded: bool = False


def find_stored(model: Any) -> Stored:
    """Return what is known of a model without loading it.

    Args:
        model: A model, a config, a checkpoint folder, or the name of a published size; a folder
            wins where both exist.

    Raises:
        CheckpointError: If it is none of these.
    """
    if isinstance(model, nn.Module):
        return Stored(type(model).__name__, model.config, model.dtype, loaded=True)
    if isinstance(model, OPTConfig):
        return Stored("this config", model, _stated_dtype(model, torch.float32))
    folder = Path(model).expanduser()
    if str(model) and folder.is_dir():
        config = read_config(folder)
        return Stored(str(model), config, _stated_dtype(config, torch.float32))
    try:
        config = OPTConfig.from_name(str(model))
    except ConfigError as error:
        raise CheckpointError(
            f"{os.fspath(model)!r} is no folder, and {str(error)[0].lower()}{str(error)[1:]} "
            "A plan downloads nothing: for another model give its folder, or its OPTConfig."
        ) from error
    return Stored(str(model), config, _PUBLISHED)


def _stated_dtype(config: OPTConfig, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype that a config.json names for its weights."""
    stated = config.extra.get("torch_dtype") or config.extra.get("dtype")
    try:
        return parse_dtype(stated or "auto") or otherwise
    except ValueError:
        return otherwise


def memory_of(device: Any) -> dict[str, int | None]:
    """Return device -> free bytes, GPUs before the CPU; None where the system does not say.

    Args:
        device: One device; a table of devices and sizes; None or "auto" for all that is here.

    Raises:
        ValueError: If there is no such device, or a size is none.
    """
    if isinstance(device, Mapping):
        if not device:
            raise ValueError('device={} names no memory; give for example {"cpu": "16GiB"}.')
        sizes = {
            device_name(name): parse_size(size, f"device[{name!r}]")
            for name, size in device.items()
        }
        return dict(sorted(sizes.items(), key=lambda entry: entry[0] == "cpu"))
    if device is None or device == "auto":
        return free_memory()
    try:
        parsed = parse_device(device)
    except ValueError as error:
        raise ValueError(
            f'{error} For a machine that is elsewhere, state its memory: device={{"cuda:0": "24GiB"}}.'
        ) from error
    return {device_name(parsed): available_bytes(parsed)}
