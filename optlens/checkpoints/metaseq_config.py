"""The config of a metaseq checkpoint, from the shapes of its tensors and its training settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from optlens.checkpoints.errors import CheckpointError
from optlens.checkpoints.matching import EMBEDDING, HEAD
from optlens.checkpoints.metaseq import POSITIONS, MetaseqFile
from optlens.config import SIZES, ConfigError, OPTConfig

# Rows of the position table that no token uses.
_UNUSED_POSITIONS = 2
_FIRST = "decoder.layers.0."


def infer_config(paths: Sequence[Path]) -> OPTConfig:
    """Return the config of a checkpoint that has no config.json.

    Shapes give all sizes but the number of heads, which comes from the training settings in the
    file, or from the published model of these sizes.

    Args:
        paths: The checkpoint's files, in the order of the ranks.

    Raises:
        CheckpointError: If the files cannot be read or are no OPT's, or the number of heads is
            not to be found out.
    """
    file = MetaseqFile(paths, verify=False)
    shapes = {name: file.spec(name).shape for name in file.names()}
    lacking = [n for n in (EMBEDDING, POSITIONS, f"{_FIRST}fc1.weight") if n not in shapes]
    if lacking:
        raise CheckpointError(
            f"{paths[0]} is no OPT of metaseq: it has no {lacking[0]}. Flattened shards of its "
            "training must first be merged with metaseq's scripts/reshard_fsdp.py."
        )
    settings = model_settings(file.settings)
    _refuse_variants(paths[0], settings)
    values = _sizes(shapes) | _switches(shapes, settings)
    values["num_attention_heads"] = _heads(paths[0], values, settings)
    dtype = file.spec(EMBEDDING).dtype or torch.float16
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    try:
        return OPTConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{paths[0].parent}: {error}") from error


def model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the model alone, of which newer files keep a table of its own."""
    inner = settings.get("model")
    return inner if isinstance(inner, dict) else settings


def _sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    numbers = {int(n.split(".")[2]) for n in shapes if n.startswith("decoder.layers.")}
    return {
        "vocab_size": shapes[EMBEDDING][0],
        "word_embed_proj_dim": shapes[EMBEDDING][1],
        "hidden_size": shapes[POSITIONS][1],
        "max_position_embeddings": shapes[POSITIONS][0] - _UNUSED_POSITIONS,
        "num_hidden_layers": max(numbers) + 1,
        "ffn_dim": shapes[f"{_FIRST}fc1.weight"][0],
    }


def _switches(shapes: dict[str, tuple[int, ...]], settings: dict[str, Any]) -> dict[str, Any]:
    final_norm = "decoder.final_layer_norm.weight" in shapes
    affine = f"{_FIRST}final_layer_norm.weight" in shapes
    # A norm without weights leaves no trace; 350m alone has norms with weights and no final one.
    pre_ln = bool(settings.get("decoder_normalize_before", final_norm or not affine))
    shared = settings.get("share_decoder_input_output_embed", True)
    return {
        "do_layer_norm_before": pre_ln,
        "_remove_final_layer_norm": pre_ln and affine and not final_norm,
        "enable_bias": f"{_FIRST}fc1.bias" in shapes,
        "layer_norm_elementwise_affine": affine,
        "activation_function": settings.get("activation_fn", "relu"),
        "tie_word_embeddings": bool(shared) or HEAD not in shapes,
    }


def _heads(path: Path, values: dict[str, Any], settings: dict[str, Any]) -> int:
    stated = settings.get("decoder_attention_heads")
    if isinstance(stated, int) and stated > 0:
        return stated
    for layers, d_model, heads, *_ in SIZES.values():
        if (layers, d_model) == (values["num_hidden_layers"], values["hidden_size"]):
            return heads
    raise CheckpointError(
        f"{path} does not say how many attention heads the model has, and no published OPT has "
        f"{values['num_hidden_layers']} layers of width {values['hidden_size']}. Put a config.json "
        'beside it: OPTConfig(...).to_dict() with "num_attention_heads" as the model was trained.'
    )


def _refuse_variants(path: Path, settings: dict[str, Any]) -> None:
    """Raise on what metaseq can train and OPT does not have, where it would change the numbers."""
    scaled = not settings.get("no_scale_embedding", True)
    other = {
        "embeddings scaled by the root of their width (no_scale_embedding is false)": scaled,
        "fixed position embeddings (decoder_learned_pos is false)": not settings.get(
            "decoder_learned_pos", True
        ),
        "a LayerNorm after the embedding": bool(settings.get("layernorm_embedding", False)),
        "ALiBi positions": bool(settings.get("alibi", False)),
    }
    found = next((what for what, is_so in other.items() if is_so), None)
    if found is not None:
        raise CheckpointError(
            f"{path} was trained with {found}, which no OPT has, so optlens cannot run it. If the "
            "settings in the file are wrong, put a config.json beside it."
        )
