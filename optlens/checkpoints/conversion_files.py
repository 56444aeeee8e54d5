"""The small files of a converted checkpoint: tokenizer, generation settings, index, config."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from optlens.checkpoints.layout import (
    CONFIG,
    GENERATION_CONFIG,
    METASEQ_TOKENIZER,
    SAFETENSORS_INDEX,
    TOKENIZER_FILES,
)
from optlens.checkpoints.shards import as_json, index_of
from optlens.checkpoints.write import config_text, generation_config
from optlens.config import OPTConfig
from optlens.files import replacing
from optlens.tokenizer import OPTTokenizer


def write_rest(
    source: Path,
    target: Path,
    config: OPTConfig,
    dtype: torch.dtype,
    files: dict[str, list[str]],
    size: Callable[[str], int],
) -> None:
    """Write all that a checkpoint has beside its weights; the config, which makes it one, last.

    Args:
        source: The checkpoint that was converted.
        target: The new one.
        config: The model's config; its "architectures" names the class.
        dtype: Of the new weights.
        files: Weight file -> the tensors in it.
        size: Returns a tensor's bytes.

    Raises:
        OSError: If a file cannot be written.
    """
    names = {entry.name for entry in source.iterdir()}
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if name in names:
            with replacing(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
    if names.isdisjoint(TOKENIZER_FILES) and names.issuperset(METASEQ_TOKENIZER):
        vocabulary, merges = (source / name for name in METASEQ_TOKENIZER)
        OPTTokenizer.from_files(vocabulary, merges).save(target)
    architecture = config.extra["architectures"][0]
    if GENERATION_CONFIG not in names and architecture == "OPTForCausalLM":
        _write(target / GENERATION_CONFIG, as_json(generation_config(config)))
    sizes = {name: size(name) for group in files.values() for name in group}
    if len(files) > 1:
        _write(target / SAFETENSORS_INDEX, as_json(index_of(files, sizes)))
    _write(target / CONFIG, config_text(config, dtype, architecture))


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
