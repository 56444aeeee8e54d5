"""Saving a model as a folder in Hugging Face format, which transformers and optlens read.

Parameter names are the checkpoint's already, so saving is writing them down: `config.json`,
safetensors (in shards with an index if they are large), `generation_config.json` and the
tokenizer's files. A tied unembedding is written once, as the embedding. Nothing in the folder
changes before all of it is on the disk.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optlens.checkpoints.empty import empty_model
from optlens.checkpoints.errors import CheckpointError, listing
from optlens.checkpoints.layout import (
    CONFIG,
    GENERATION_CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TOKENIZER_FILES,
)
from optlens.checkpoints.matching import HEAD
from optlens.checkpoints.safetensors_file import DTYPES, write_safetensors
from optlens.checkpoints.shards import (
    SHARD,
    advice_on,
    as_json,
    check_room,
    index_of,
    parse_size,
    split,
)
from optlens.config import OPTConfig
from optlens.staging import commit, staging_folder

_OTHER_WEIGHTS = re.compile(r"pytorch_model.*\.bin|tf_model.*\.h5|flax_model.*\.msgpack")


def save_model(
    model: nn.Module, folder: str | os.PathLike, max_shard_size: int | str = "5GB"
) -> None:
    """Write a checkpoint folder.

    An earlier checkpoint in the folder is replaced, all of it with its tokenizer or, if anything
    fails, none of it; weights of its own in other formats (`.bin`) stay, with a warning.

    Args:
        model: `OPTForCausalLM` or `OPTModel`; its `tokenizer`, if it has one, is saved with it.
        folder: Where to write; made if it does not exist.
        max_shard_size: Bytes in one weight file, as a number or like "500MB"; a larger tensor gets
            a file of its own.

    Raises:
        CheckpointError: If the folder cannot be written (a full disk, no permission), or the
            model is not one that a checkpoint can hold. Nothing has changed then.

    Example:
        >>> model.save_pretrained("my-opt")  # doctest: +SKIP
    """
    target = _target(folder)
    limit = parse_size(max_shard_size, "max_shard_size")
    reason = getattr(model.placement, "no_saving", None)
    if reason is not None:
        raise CheckpointError(reason)
    tensors, config = _contents(model)
    dtype = next(iter(tensors.values())).dtype
    about = config_text(config, dtype, _optlens_class(model).__name__)
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        with staging_folder(target) as staging:
            check_room(target, size)
            _write(model, config, tensors, limit, staging)
            (staging / CONFIG).write_text(about, encoding="utf-8")
            if (target / GENERATION_CONFIG).exists():  # the user's own, which this knows less than
                (staging / GENERATION_CONFIG).unlink(missing_ok=True)
            _commit(staging, target)
    except OSError as error:
        raise CheckpointError(
            f"The model could not be saved to {target}: {error.strerror or error}. "
            f"{advice_on(error, size)}Nothing was changed: what was there is as it was."
        ) from error
    others = sorted(e.name for e in target.iterdir() if _OTHER_WEIGHTS.fullmatch(e.name))
    if others:
        warnings.warn(
            f"{target} still holds other weights from before ({listing(others)}). {SAFETENSORS} is "
            "read before them; remove them if they are not needed.",
            stacklevel=3,
        )


def _target(folder: str | os.PathLike) -> Path:
    """Return the folder to write to."""
    if not os.fspath(folder):
        raise CheckpointError('There is no folder named ""; the current folder is ".".')
    target = Path(folder).expanduser()
    if target.is_symlink() and not target.exists():
        raise CheckpointError(
            f"The model could not be saved to {target}: it is a link to {os.readlink(target)}, "
            "which does not exist. Make that folder, or save to another one."
        )
    return target


def _contents(model: nn.Module) -> tuple[dict[str, Tensor], OPTConfig]:
    """Return the parameters by name, each once, and a config that is true of them."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    config = copy.copy(model.config)
    if hasattr(model, "lm_head"):
        config.tie_word_embeddings = HEAD not in tensors
    empty = empty_model(_optlens_class(model), config)
    expected = {name: parameter.shape for name, parameter in empty.named_parameters()}
    extra = [name for name in tensors if name not in expected]
    missing = [name for name in expected if name not in tensors]
    if extra or missing:
        raise CheckpointError(
            "This model is not an OPT that a checkpoint can hold: it has "
            f"{listing(extra) if extra else 'no further tensors'} and lacks "
            f"{listing(missing) if missing else 'none'}. Merge adapters and remove "
            "parametrisations before saving."
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(tensors[name].shape)}, but the model's config says "
                f"{list(shape)}. Set the fields of model.config to what the model is."
            )
        if tensors[name].is_meta:
            raise CheckpointError(f"{name} has no values (it is on the meta device).")
        if tensors[name].dtype not in DTYPES:
            raise CheckpointError(
                f"{name} is {tensors[name].dtype}, which an OPT's checkpoint does not hold; convert "
                "the model first, as model.to(torch.bfloat16) does."
            )
    return tensors, config


def _optlens_class(model: nn.Module) -> type[nn.Module]:
    """Return the class of optlens that `model` is, were it a subclass of the user's."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("optlens."))


def _write(
    model: nn.Module, config: OPTConfig, tensors: dict[str, Tensor], limit: int, staging: Path
) -> None:
    """Write all files of the checkpoint but its config into the staging folder."""
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files = split(sizes, limit)
    if len(files) > 1:
        _write_json(staging / SAFETENSORS_INDEX, index_of(files, sizes))
    for file, names in files.items():
        specs = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in names}
        write_safetensors(staging / file, specs, tensors.__getitem__)
    if hasattr(model, "lm_head"):
        _write_json(staging / GENERATION_CONFIG, generation_config(config))
    if model.tokenizer is not None:
        model.tokenizer.save(staging)


def config_text(config: OPTConfig, dtype: torch.dtype, architecture: str) -> str:
    """Return the contents of a config.json.

    Args:
        config: The model's config.
        dtype: Of the weights beside it.
        architecture: Name of the class that the weights are for.

    Raises:
        CheckpointError: If a value cannot be written as JSON.
    """
    values = config.to_dict()
    # Both spellings are in use; what the weights were before must not be read back as what they are.
    values.pop("dtype", None)
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    values["architectures"] = [architecture]
    for key, value in values.items():
        try:
            as_json({key: value})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"The config's {key!r} cannot be written to {CONFIG}: {error}. Set it to what JSON "
                "holds (text, numbers, lists, tables), or remove it from model.config.extra."
            ) from error
    return as_json(values)


def generation_config(config: OPTConfig) -> dict[str, Any]:
    """Return what `generation_config.json` holds for a model of this config."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True, **{name: getattr(config, name) for name in ids}}


def _commit(staging: Path, target: Path) -> None:
    """Put the staged files in place, and take away what they replace under other names."""
    staged = {entry.name for entry in staging.iterdir()}
    last = [name for name in (SAFETENSORS_INDEX, CONFIG) if name in staged]
    weights = sorted(name for name in staged if name.endswith(".safetensors"))
    rest = sorted(staged.difference(weights, last))
    earlier = {SAFETENSORS, SAFETENSORS_INDEX}
    # Without a config it is no earlier checkpoint; somebody may have put a tokenizer there first.
    if (target / CONFIG).exists() or not staged.isdisjoint(TOKENIZER_FILES):
        earlier.update(TOKENIZER_FILES)
    stale = sorted(
        entry.name
        for entry in target.iterdir()
        if entry.name not in staged
        and (entry.name in earlier or SHARD.fullmatch(entry.name))
        and not entry.is_dir()
    )
    commit(staging, target, [*weights, *rest, *last], stale)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(as_json(values), encoding="utf-8")
