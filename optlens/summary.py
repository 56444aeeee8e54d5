"""A model described in a page of text: parts, shapes, bytes, and what can be listened to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from optlens.memory import describe_bytes
from optlens.names import BLOCK, BLOCK_PREFIX, EMBEDDING, FINAL_NORM, HookSpec

if TYPE_CHECKING:
    from optlens.base import OPTBase


def describe(model: OPTBase) -> str:
    """Return a table of a model's parts and a table of its hooks.

    Example:
        >>> print(describe(optlens.load()))  # doctest: +SKIP
    """
    config = model.config
    norm = "pre-LN" if config.do_layer_norm_before else "post-LN"
    n_parameters = sum(_shape(parameter).numel() for parameter in model.parameters())
    lines = [
        f"{type(model).__name__}: {config.n_layers} layers, d_model {config.d_model}, "
        f"{config.n_heads} heads of {config.d_head}, {config.d_mlp} {config.act_fn} neurons, {norm}",
        f"{config.d_vocab} tokens, {config.n_ctx} positions, {n_parameters:,} "
        f"parameters, {model.dtype}, on {model.device}",
        f"tokenizer: {model.tokenizer or 'none (this checkpoint brought none)'}",
        *([] if model.placement is None else [f"weights: {model.placement}"]),
        "",
        *_parts(model),
        "",
        "Hooks (L is a layer's number; * only when listened to):",
        *_hooks(model),
    ]
    return "\n".join(lines)


def _parts(model: OPTBase) -> list[str]:
    """List every weight of the ends and of block 0, with the blocks' total."""
    rows = [("part", "shape", "size")]
    shown = [(n, p) for n, p in model.named_parameters() if ".layers." not in n]
    rows += [_row(name, parameter) for name, parameter in shown]
    rows += [
        _row(f"decoder.layers.L.{name}", parameter)
        for name, parameter in model.decoder.layers[0].named_parameters()
    ]
    blocks = sum(p.nbytes for p in model.decoder.layers.parameters())
    rows.append((f"all {len(model.decoder.layers)} layers", "", describe_bytes(blocks)))
    total = sum(p.nbytes for p in model.parameters())
    rows.append(("everything", "", describe_bytes(total)))
    return _columns(rows)


def _row(name: str, parameter: nn.Parameter) -> tuple[str, str, str]:
    return name, " x ".join(map(str, _shape(parameter))), describe_bytes(parameter.nbytes)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape; that of the matrix where two of its numbers share a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.shape if packed is None else torch.Size(packed.shape)


def _hooks(model: OPTBase) -> list[str]:
    prefix = BLOCK_PREFIX.format(layer="L")
    rows = [*_spec_rows("", EMBEDDING), *_spec_rows(prefix, BLOCK)]
    if model.config.has_final_layer_norm:
        rows += _spec_rows("", FINAL_NORM)
    return _columns(rows)


def _spec_rows(prefix: str, specs: Iterable[HookSpec]) -> list[tuple[str, str, str]]:
    return [
        (f"{prefix}{spec.name}{'*' * spec.optional}", f"[{spec.shape}]", spec.meaning)
        for spec in specs
    ]


def _columns(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
