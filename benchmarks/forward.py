"""The plain forward pass, nobody listening, against transformers' fastest path (sdpa).

    python benchmarks/forward.py

Both compute all logits of a random float32 model of 125m's shapes, without gradients and without
keys and values kept. The logits are compared first: a fast wrong answer would not count.
"""

from __future__ import annotations

import argparse

import torch
from paired import alternate, publish, random_tokens, transformers_twin, true_shape_model

SHAPES = ((1, 128), (8, 64))
LIMIT = 1.02


def main() -> None:
    """Measure every shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=21, help="pairs per shape (default 21)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = true_shape_model()
    twin = transformers_twin(model)
    rows, worst = [], 0.0
    for batch, pos in SHAPES:
        tokens = random_tokens(batch, pos)
        ours, theirs = model(tokens, use_cache=False).logits, twin(tokens, use_cache=False).logits
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        rows.append(
            alternate(
                f"forward, {batch} x {pos} tokens",
                "transformers, sdpa",
                lambda tokens=tokens: model(tokens, use_cache=False),
                lambda tokens=tokens: twin(tokens, use_cache=False),
                limit=LIMIT,
                pairs=args.pairs,
            )
        )
    publish("forward", rows, largest_relative_difference=f"{worst:.1e}")


if __name__ == "__main__":
    main()
