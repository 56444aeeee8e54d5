"""Checkpoints as metaseq writes them, made from a model by the inverse of the published rules.

The rules are those of metaseq's `scripts/reshard_mp.py` and `distributed/stitch_fsdp_ckpt.py`, written
down here once more from the side of the writer, so that a mistake in the reader shows.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optlens.model import OPTForCausalLM

RENAMED = {
    "decoder.final_layer_norm.": "decoder.layer_norm.",
    "decoder.project_in.": "decoder.project_in_dim.",
    "decoder.project_out.": "decoder.project_out_dim.",
}
BY_ROWS = ("embed_tokens.weight", "fc1.weight", "fc1.bias")
BY_COLUMNS = ("fc2.weight", "out_proj.weight")


def settings_of(model: OPTForCausalLM) -> Namespace:
    """Return training settings as metaseq keeps them."""
    config = model.config
    return Namespace(
        arch="transformer_lm_megatron",
        decoder_attention_heads=config.n_heads,
        decoder_normalize_before=config.do_layer_norm_before,
        activation_fn=config.activation_function,
        share_decoder_input_output_embed=config.tie_word_embeddings,
        no_scale_embedding=True,
        decoder_learned_pos=True,
    )


def part_of(model: OPTForCausalLM, rank: int, ranks: int, fused: bool = True) -> dict[str, Tensor]:
    """Return the tensors of one rank of tensor parallelism."""
    state = {name.removeprefix("model."): p.detach() for name, p in model.named_parameters()}
    part = {"decoder.version": torch.tensor([3.0])}
    for name, value in state.items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        if name == "lm_head.weight":
            part["decoder.output_projection.weight"] = value.chunk(ranks, 0)[rank].clone()
        elif any(f".{letter}_proj." in name for letter in "qkv"):
            share = value.chunk(ranks, 0)[rank]
            if not fused:
                part[name] = share.clone()
            elif ".k_proj." in name:  # once for the three
                v, q = (state[name.replace(".k_proj.", f".{x}_proj.")] for x in "vq")
                shares = [share, v.chunk(ranks, 0)[rank], q.chunk(ranks, 0)[rank]]
                part[name.replace(".k_proj.", ".qkv_proj.")] = torch.cat(shares)
        elif name.endswith(BY_ROWS):
            part[name] = value.chunk(ranks, 0)[rank].clone()
        elif name.endswith(BY_COLUMNS):
            part[name] = value.chunk(ranks, 1)[rank].clone()
        else:
            part[name] = value.clone()
    return part


def write_metaseq(
    folder: Path,
    model: OPTForCausalLM,
    ranks: int = 1,
    settings: Any = "namespace",
    fused: bool = True,
    name: str = "reshard-model_part-{}.pt",
    legacy: bool = False,
) -> list[Path]:
    """Write a checkpoint of `ranks` parts and return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"args": settings_of(model)} if isinstance(settings, str) else settings
    paths = []
    for rank in range(ranks):
        values = {
            **settings,
            "model": part_of(model, rank, ranks, fused),
            "extra_state": {"train_iterator": {"epoch": 1}},
            "optimizer_history": [{"criterion_name": "cross_entropy", "num_updates": 7}],
        }
        paths.append(folder / name.format(rank))
        torch.save(values, paths[-1], _use_new_zipfile_serialization=not legacy)
    return paths
