"""What narrower numbers cost: float16, bfloat16, int8 and nf4 against float32, layer by layer.

    python benchmarks/precision.py                          # the demo checkpoint
    python benchmarks/precision.py --sizes 125m 350m        # and random models of true shapes
    python benchmarks/precision.py --folder /big/opt-1.3b   # and a checkpoint

For each kind: KL(float32 || it) of the next-token distribution in nats, mean and largest over
positions; how often the likeliest token is the same; and the relative error |x - x32| / |x32| of
the residual stream after the embedding and after the blocks, as the hooks see it, with its largest
single sub-layer's. Random models have weights of one scale and no outliers, so they are easier to
quantise than trained ones of their size, and their distributions are wide: for KL and agreement
look at trained checkpoints.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from make_checkpoint import make_checkpoint
from torch import Tensor

import optlens
from optlens import demo, logit_math
from optlens.config import OPTConfig
from optlens.demo.corpus import documents

KINDS: dict[str, dict[str, str]] = {
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "nf4": {"dtype": "float32", "quantize": "nf4"},
    "nf4, bfloat16": {"dtype": "bfloat16", "quantize": "nf4"},
}
SITES = ("resid_post", "attn_out", "mlp_out")
TEXTS, LENGTH = 32, 48


def prompts_for(model: optlens.OPTForCausalLM, is_demo: bool) -> Tensor:
    """Return token ids `[text, pos]`: documents for the demo, else random ones."""
    if not is_demo or model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(4, model.config.vocab_size, (4, LENGTH), generator=generator)
    rows = [model.to_tokens(text)[0] for text in documents(seed=12345, count=40 * TEXTS)]
    return torch.stack([row[:LENGTH] for row in rows if len(row) >= LENGTH][:TEXTS])


def run(model: optlens.OPTForCausalLM, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and the values at hooks, in float32."""
    layers = range(model.config.n_layers)
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{layer}.hook_{site}" for layer in layers for site in SITES]
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter=names)
    return logits.float(), {name: cache[name].float() for name in names}


def compare(name: str, folder: Path, is_demo: bool) -> None:
    """Print the table of one model."""
    model = optlens.load(folder, device="cpu", dtype="float32")
    tokens, n_layers = prompts_for(model, is_demo), model.config.n_layers
    reference, expected = run(model, tokens)
    del model
    shown = sorted({0, n_layers // 2, n_layers - 1})
    print(f"\n{name}: {tokens.shape[0]} x {tokens.shape[1]} tokens, errors relative to float32")
    columns = ["KL", "largest", "top-1", "embed", *(f"block {layer}" for layer in shown), "worst"]
    print(f"{'':14}" + "".join(f"{column:>10}" for column in columns))
    for kind, options in KINDS.items():
        logits, found = run(optlens.load(folder, device="cpu", **options), tokens)
        kl = logit_math.kl_divergence(reference, logits)
        same = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
        error = {n: float((found[n] - x).norm() / x.norm()) for n, x in expected.items()}
        stream = [error["blocks.0.hook_resid_pre"]]
        stream += [error[f"blocks.{layer}.hook_resid_post"] for layer in shown]
        worst = max(error, key=error.__getitem__)
        cells = [f"{kl.mean():10.2e}", f"{kl.max():10.2e}", f"{same:10.4f}"]
        cells += [f"{value:10.1e}" for value in (*stream, error[worst])]
        print(f"{kind:14}" + "".join(cells) + f"  {worst.removeprefix('blocks.')}")


def main() -> None:
    """Compare the demo, random models of the sizes asked for, and checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--sizes", nargs="*", default=[], help="published sizes, with random weights"
    )
    parser.add_argument("--folder", nargs="*", type=Path, default=[], help="checkpoint folders")
    parser.add_argument("--where", type=Path, help="folder for the random models while they live")
    args = parser.parse_args()
    compare("the demo checkpoint", demo.path(), is_demo=True)
    for folder in args.folder:
        compare(str(folder), folder, is_demo=False)
    for size in args.sizes:
        folder = Path(tempfile.mkdtemp(prefix=f"opt-{size}-", dir=args.where))
        try:
            make_checkpoint(folder, OPTConfig.from_name(size), layout="sharded")
            compare(f"opt-{size}'s shapes, random weights", folder, is_demo=False)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
