"""Generation, against transformers' `generate`, the memory's bandwidth, and itself with a recorder.

    python benchmarks/generation.py

One random float32 model of 125m's shapes, the same weights everywhere; greedy decoding of 64 tokens
from a prompt of 16, keys and values cached. Decoding one text reads every weight once for a token,
so the time of reading them as fast as memory gives them is a bound, which the last lines report.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from paired import (
    Row,
    alternate,
    clock,
    publish,
    random_tokens,
    transformers_twin,
    true_shape_model,
)

import optlens

PROMPT, NEW = 16, 64
LIMIT_ONE, LIMIT_EIGHT, LIMIT_RECORDER = 1 / 1.3, 1 / 1.2, 1.05
BLOCK = 512 * 2**20  # bytes that no cache holds


def ours(model: optlens.OPTForCausalLM, batch: int, **options: Any) -> Callable[[], Any]:
    """Return a run of 64 tokens."""
    prompt = random_tokens(batch, PROMPT)
    return lambda: model.generate(prompt, NEW, stop_at_eos=False, **options)


def theirs(twin: torch.nn.Module, batch: int, **options: Any) -> Callable[[], Any]:
    """Return the same by transformers."""
    prompt = random_tokens(batch, PROMPT)
    mask = torch.ones_like(prompt)
    twin.generation_config.eos_token_id = None
    return lambda: twin.generate(
        prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options
    )


def without_onednn(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a run with PyTorch's ordinary products of matrices and vectors."""

    def plain() -> Any:
        with patch("optlens.linear.USE_ONEDNN", False):
            return run()

    return plain


def rows(pairs: int) -> list[Row]:
    """Compare with transformers, and with recording."""
    model = true_shape_model()
    twin = transformers_twin(model)
    peer, plain = "transformers' generate", "without a recorder"
    one, eight = ours(model, 1), ours(model, 8)
    recording = ours(model, 1, record="residual")
    return [
        alternate(f"greedy, 1 x {NEW}", peer, one, theirs(twin, 1), LIMIT_ONE, pairs, 1),
        alternate(f"greedy, 8 x {NEW}", peer, eight, theirs(twin, 8), LIMIT_EIGHT, pairs, 1),
        alternate(f"residual, 1 x {NEW}", plain, recording, one, LIMIT_RECORDER, pairs, 1),
        alternate(
            f"4 beams, 1 x {NEW}",
            peer,
            ours(model, 1, num_beams=4),
            theirs(twin, 1, num_beams=4),
            None,
            pairs // 2,
            1,
        ),
        alternate(
            f"greedy, 1 x {NEW}", "ours, without oneDNN", one, without_onednn(one), None, pairs, 1
        ),
    ]


def bound(model: optlens.OPTForCausalLM, tries: int = 9) -> dict[str, float]:
    """Compare a decoding step with reading the weights; both in turn, medians.

    Reading is adding up the numbers: of the weights as they lie in memory, and of one large block,
    which the processor fetches ahead more easily.
    """
    prompt = random_tokens(1, PROMPT)
    weights = [p for name, p in model.named_parameters() if "embed_positions" not in name]
    n_bytes = sum(p.nbytes for p in weights)
    block = torch.ones(BLOCK // 4)

    def seconds(new: int) -> float:
        return clock(lambda: model.generate(prompt, new, stop_at_eos=False))[0]

    seconds(8)
    steps, reads, blocks = [], [], []
    for _ in range(tries):
        steps.append((seconds(40) - seconds(8)) / 32)
        reads.append(clock(lambda: [p.sum() for p in weights])[0])
        blocks.append(clock(block.sum)[0] * n_bytes / BLOCK)
    step, read, ideal = map(statistics.median, (steps, reads, blocks))
    return {
        "weight MB": round(n_bytes / 1e6),
        "step ms": round(step * 1e3, 2),
        "reading the weights ms": round(read * 1e3, 2),
        "reading a block of that size ms": round(ideal * 1e3, 2),
        "fraction of bound, weights": round(read / step, 2),
        "fraction of bound, block": round(ideal / step, 2),
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="pairs per line (default 7)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    table = rows(args.pairs)
    publish("generation", table, **bound(true_shape_model()))


if __name__ == "__main__":
    main()
