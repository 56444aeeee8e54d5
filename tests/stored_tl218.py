"""The tiny OPT of `fixtures/tiny_opt.py` in optlens, and what TransformerLens 2.18 computed on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixtures import tiny_opt
from reference_opt import reference_forward

from optlens.config import OPTConfig
from optlens.model import OPTForCausalLM
from optlens.tokenizer import OPTTokenizer

STORED = np.load(Path(__file__).parent / "fixtures" / "tl218.npz")


def build_model() -> OPTForCausalLM:
    """Load the seeded weights, in float64, and give the model its tokenizer."""
    built = OPTForCausalLM(OPTConfig(**tiny_opt.CONFIG)).double()
    weights = {name: torch.from_numpy(array) for name, array in tiny_opt.weights().items()}
    problems = built.load_state_dict(weights, strict=False)
    assert set(problems.missing_keys) <= {"lm_head.weight"} and not problems.unexpected_keys
    built.tokenizer = OPTTokenizer.from_tokenizers(tiny_opt.tokenizer())
    return built.eval()


def reference(
    input_ids: Any, edits: dict | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run the NumPy oracle on the same weights."""
    return reference_forward(
        tiny_opt.weights(), tiny_opt.CONFIG, np.asarray(input_ids), edits=edits
    )


def equal(ours: Any, theirs: Any) -> None:
    """Equal to float64 rounding, measured against the largest value; -inf at the same places."""
    ours, theirs = torch.as_tensor(ours).detach(), torch.tensor(theirs)
    largest = theirs[theirs.isfinite()].abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * max(largest, 1e-3))
