"""Checkpoint folders for the tests: made by the benchmark's maker, compared with transformers."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_config
from torch import Tensor

from optlens.checkpoints import load_model
from optlens.config import OPTConfig
from optlens.model import OPTForCausalLM

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[2, 5, 9, 33, 71, 100, 4], [2, 88, 7, 7, 12, 3, 60]])

_spec = importlib.util.spec_from_file_location(
    "make_checkpoint", ROOT / "benchmarks" / "make_checkpoint.py"
)
maker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(maker)


def make(folder: Path, config: OPTConfig | None = None, **options: Any) -> Path:
    """Make a tiny checkpoint in `folder`; options are those of `make_checkpoint`."""
    # 20 kB gives the tiny model about six shards
    options = {"max_shard_bytes": 20_000, **options}
    maker.make_checkpoint(folder, config or tiny_config(), **options)
    return folder


@torch.no_grad()
def our_logits(folder: Path, **options: Any) -> Tensor:
    """Return our logits `[batch, pos, d_vocab]` of a checkpoint folder."""
    return load_model(OPTForCausalLM, folder, device="cpu", **options)(IDS).logits


@torch.no_grad()
def their_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return transformers' logits `[batch, pos, d_vocab]` of a checkpoint folder."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.OPTForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()(IDS).logits


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` by its relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
