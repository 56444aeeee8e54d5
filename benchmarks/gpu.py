"""What a GPU makes of it: forward, recording, sweeps and decoding, against transformers and TransformerLens.

    python benchmarks/gpu.py                                  # 125m's shapes in float32, float16, bfloat16
    python benchmarks/gpu.py --size 6.7b --dtypes float16     # random weights of another size
    python benchmarks/gpu.py --device cpu --small             # tries the script where there is no GPU

The same random weights everywhere, every run timed to the end of its last kernel. TransformerLens
takes part in float32 only. Peak device memory is what PyTorch's allocator gave out at most, for our
weights and a run; a plan's figure stands beside it. TF32 is off, as torch leaves it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from paired import Row, alternate, publish, random_tokens, transformers_twin
from recording import peer

import optlens
from optlens import metrics

METRIC = metrics.logit_diff(1000, 2000)
FULL = {"pos": 512, "prompt": 15, "new": 64, "pairs": 15}
SMALL = {"pos": 16, "prompt": 6, "new": 4, "pairs": 2}
SHRUNK = {"num_hidden_layers": 2, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}


class Bench:
    """One model and its twins on one device in one dtype."""

    def __init__(self, config: optlens.OPTConfig, device: str, dtype: torch.dtype, size: dict):
        """Build the model and transformers' model of the same weights."""
        torch.manual_seed(0)
        self.device, self.dtype, self.size = torch.device(device), dtype, size
        on_host = optlens.OPTForCausalLM(config).eval().to(dtype)
        self.theirs = transformers_twin(on_host).to(dtype).to(self.device)
        self.model = on_host.to(self.device)
        self.rows: list[Row] = []
        self.memory: dict[str, str] = {}

    def timed(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return a run that ends when the device has done its work."""

        def whole() -> Any:
            result = run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return result

        return whole

    def compare(self, what: str, against: str, ours: Callable, theirs: Callable) -> None:
        """Add a line to the table, and what ours held on the device at most."""
        name = f"{what}, {str(self.dtype).removeprefix('torch.')}"
        if self.device.type == "cuda":
            self.memory[f"peak MB, {name}"] = self.peak(ours)
        runs = self.timed(ours), self.timed(theirs)
        self.rows.append(alternate(name, against, *runs, pairs=self.size["pairs"], warm_up=2))

    def peak(self, run: Callable[[], Any]) -> str:
        """Return the most that our weights and a run of ours hold; the twins lie beside them."""
        self.timed(run)()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.timed(run)()
        growth = torch.cuda.max_memory_allocated(self.device) - before
        return f"{(growth + sum(p.nbytes for p in self.model.parameters())) / 1e6:.0f}"

    def forward(self) -> None:
        """Compare logits of a prompt, and of a batch, with transformers."""
        for batch in (1, 8):
            tokens = random_tokens(batch, self.size["pos"]).to(self.device)
            self.compare(
                f"forward {batch} x {self.size['pos']}",
                "transformers, sdpa",
                lambda tokens=tokens: self.model(tokens, use_cache=False),
                lambda tokens=tokens: self.theirs(tokens, use_cache=False),
            )

    def recording(self, bridge: Any) -> None:
        """Compare recording with the forward pass, with blocking copies, and with the bridge."""
        tokens = random_tokens(1, self.size["pos"]).to(self.device)
        name = f"record 1 x {self.size['pos']}"

        def record() -> Any:
            return self.model.record(tokens, what=("attention", "residual", "z", "mlp_post"))

        def blocking() -> Any:
            with patch("optlens.pinned.host_tensor", _ordinary):
                return record()

        def blocks() -> Any:
            layers = self.model.config.n_layers
            return self.model(tokens, use_cache=False, stop_at_layer=layers)

        self.compare(f"{name}, to the host", "ordinary host memory", record, blocking)
        self.compare(f"{name}, to the host", "forward, no unembedding", record, blocks)
        if bridge is not None:
            self.compare(
                "all default hooks, kept there",
                "TransformerLens 4.3, same",
                lambda: self.model.run_with_cache(tokens),
                lambda: bridge.run_with_cache(tokens),
            )

    def sweep(self, bridge: Any) -> None:
        """Compare a sweep with a forward pass per patch: the bridge's, or ours where there is none."""
        clean = random_tokens(1, self.size["prompt"])
        corrupt = clean.clone()
        corrupt[:, 2] += 1
        layers, length = self.model.config.n_layers, clean.shape[1]

        def ours() -> Any:
            return optlens.patch_sweep(
                self.model, clean, corrupt, "resid_pre", ("layer", "pos"), METRIC, progress=False
            ).values

        if bridge is None:
            there = corrupt.to(self.device)

            def naive() -> None:
                for _ in range(layers * length):
                    self.model(there, use_cache=False, logits_to_keep=1)

            self.compare("sweep resid_pre", "a bare pass per patch", ours, naive)
            return
        from patching import peer_sweep

        there = clean.to(self.device), corrupt.to(self.device)
        self.compare(
            "sweep resid_pre",
            "TransformerLens 4.3, same",
            ours,
            lambda: peer_sweep(bridge, *there, "resid_pre"),
        )

    def decoding(self) -> None:
        """Compare greedy decoding with transformers' `generate`."""
        self.theirs.generation_config.eos_token_id = None
        for batch in (1, 8):
            prompt = random_tokens(batch, 16).to(self.device)
            mask = torch.ones_like(prompt)
            new = self.size["new"]
            self.compare(
                f"decode {batch} x {new}",
                "transformers' generate",
                lambda prompt=prompt, new=new: self.model.generate(prompt, new, stop_at_eos=False),
                lambda prompt=prompt, mask=mask, new=new: self.theirs.generate(
                    prompt, attention_mask=mask, max_new_tokens=new, do_sample=False
                ),
            )


def _ordinary(size: Any, dtype: torch.dtype, source: torch.device) -> torch.Tensor:
    """Set memory aside that a GPU cannot write by itself."""
    return torch.empty(*size, dtype=dtype)


def measure(config: optlens.OPTConfig, name: str, args: argparse.Namespace) -> Bench:
    """Run everything in one dtype."""
    size = SMALL if args.small else FULL
    bench = Bench(config, args.device, getattr(torch, name), size)
    bridge = None
    if name == "float32" and not args.skip_peer:
        # made on the host, from weights there, and moved
        bridge = peer(optlens.OPTForCausalLM(config).eval()).to(bench.device)
    bench.forward()
    bench.recording(bridge)
    bench.sweep(bridge)
    bench.decoding()
    where, pos = {args.device: "1TB"}, size["pos"]
    planned = optlens.plan(config, device=where, dtype=name, prompt_length=pos).total
    bench.memory[f"planned MB of a forward 1 x {pos}, {name}"] = f"{planned / 1e6:.0f}"
    del bench.model, bench.theirs
    return bench


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help='a GPU such as "cuda:1"; or "cpu"')
    parser.add_argument("--size", default="125m", help="a published size (default 125m)")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "float16", "bfloat16"], help="which dtypes"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--skip-peer", action="store_true", help="leave out TransformerLens")
    args = parser.parse_args(arguments)
    is_gpu = args.device.startswith("cuda")
    if is_gpu and not torch.cuda.is_available():
        parser.exit(2, "PyTorch sees no CUDA device here. --device cpu --small tries the script.\n")
    torch.set_grad_enabled(False)
    shrunk = SHRUNK | {"num_attention_heads": 4} if args.small else {}
    config = optlens.OPTConfig.from_name(args.size, **shrunk)
    done = [measure(config, name, args) for name in args.dtypes]
    facts = {"device": torch.cuda.get_device_name(args.device) if is_gpu else args.device}
    for bench in done:
        facts |= bench.memory
    rows = [row for bench in done for row in bench.rows]
    publish("gpu-small" if args.small else "gpu", rows, dtype="as named", **facts)


if __name__ == "__main__":
    main()
