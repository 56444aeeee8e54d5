"""Checkpoint folders for the tests: made by the benchmark's maker, compared with transformers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
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


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures memory by /proc"
)
_MEASURE_PEAK = """
import sys
from pathlib import Path
from optlens.checkpoints import load_model
from optlens.model import OPTForCausalLM

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

load_model(OPTForCausalLM, sys.argv[1], device="cpu")  # imports what loading imports
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = load_model(OPTForCausalLM, sys.argv[2], device="cpu", dtype=sys.argv[3])
largest = max(parameter.nbytes for parameter in model.parameters())
weights = sum(parameter.nbytes for parameter in model.parameters())
print((resident("VmHWM") - before - largest) / weights)
"""


def peak_over_weights(small: Path, big: Path, dtype: str) -> float:
    """Return the peak of loading `big` but its largest tensor, over its weights.

    Args:
        small: A checkpoint to load first, for the imports.
        big: The checkpoint to measure.
        dtype: What to load it in.
    """
    command = [sys.executable, "-c", _MEASURE_PEAK, str(small), str(big), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


@contextmanager
def file_system(folder: Path, size: str) -> Iterator[None]:
    """Put a file system of a size such as "1m" at a folder, or skip the test."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
