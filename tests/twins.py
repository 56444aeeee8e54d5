"""Transformers' OPT with the weights of one of ours, to compare with; and how close is close."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from hypothesis import settings

from optlens.base import OPTBase

# What the project promises, relative to the largest number compared. Rounding alone leaves 1e-15 and 1e-6.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}

# `HYPOTHESIS_PROFILE=explore pytest ...` draws new examples, and many more of them, than the fixed ones of every run.
EXPLORING = os.environ.get("HYPOTHESIS_PROFILE") == "explore"


def examples(number: int) -> settings:
    """Say how many examples hypothesis draws: always the same ones, unless somebody explores."""
    return settings(
        max_examples=number * 30 if EXPLORING else number,
        derandomize=not EXPLORING,
        database=None,
        deadline=None,
        print_blob=True,
    )


def twin_of(model: OPTBase, attention: str = "sdpa") -> Any:
    """Build transformers' model of the same class, config, weights, dtype and mode.

    The oracle is its "sdpa" path. The "eager" one gives patterns, but rounds float64 softmax to float32 and turns a query
    that sees nothing to NaN or to a uniform row.
    """
    config = transformers.OPTConfig(**model.config.to_dict())
    kind = getattr(transformers, type(model).__name__)
    twin = kind._from_config(config, attn_implementation=attention)
    twin.load_state_dict(model.state_dict())
    return twin.to(model.dtype).train(model.training)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float | None = None) -> None:
    """Assert equality up to a fraction of the largest number, by default that of the dtype of ours."""
    tolerance = RELATIVE[ours.dtype] if tolerance is None else tolerance
    largest = theirs.abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest)
