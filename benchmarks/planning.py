"""What a plan says against what a process then takes.

    python benchmarks/planning.py --sizes 125m 350m 1.3b
    python benchmarks/planning.py --sizes 1.3b --dtypes bfloat16 --runs record sweep:z --tokens 64

Runs are `forward`; `generate`, the last 64 of the tokens; `record`, or of some names
`record:attention+residual`; `sweep` of `resid_pre`, or `sweep:z` of another site; each with `@stream`
behind it for a model whose blocks stay on the disk. Models of true shapes on the CPU, each run in a
process of its own. The first pass of everything makes what is made once (compiled products,
threads), so it is not counted; memory is the weights and the growth of the peak resident set over
what is held before the second. Plans count tensors and the memory that is known to stay on the heap;
gaps come on top, most of all in sweeps.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from process_memory import forget_peak, resident

FILLED = 2**20  # so many random numbers, over and over, are the weights
NEW_TOKENS = 64


def make_model(size: str, dtype: Any, **changes: Any) -> Any:
    """Return a model of a published size with numbers of a sensible scale in its matrices."""
    import torch

    import optlens
    from optlens.checkpoints.empty import empty_model

    model = empty_model(optlens.OPTForCausalLM, optlens.OPTConfig.from_name(size, **changes))
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.tie_weights()
    numbers = 0.02 * torch.randn(FILLED, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.zero_()
            continue
        for part in parameter.data.view(-1).split(FILLED):
            part.copy_(numbers[: len(part)])
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm) and module.weight is not None:
            module.weight.data.fill_(1)
    return model


def work(run: str, model: Any, tokens: int, batch: int) -> tuple[dict[str, Any], Callable]:
    """Return what to ask of a plan, and the run that it is for."""
    import torch

    import optlens

    ids = torch.arange(3, 3 + tokens).repeat(batch, 1)
    if run == "forward":
        return {}, lambda: model(ids)
    if run == "generate":
        short = ids[:, : tokens - NEW_TOKENS]
        return {}, lambda: model.generate(short, NEW_TOKENS, eos_token_id=None)
    kind, _, what = run.partition(":")
    if kind == "record":
        options = {"what": tuple(what.split("+"))} if what else {}
        return {"record": options}, lambda: model.record(ids, **options)
    clean, corrupt = ids, ids.clone()
    corrupt[:, 1:] += 1
    options = {"site": what or "resid_pre"}
    if what in ("z", "pattern"):
        options["over"] = ("layer", "head")
    metric = optlens.metrics.logit_diff(100, 200)

    def sweep() -> Any:
        return optlens.patch_sweep(model, clean, corrupt, metric=metric, progress=False, **options)

    return {"sweep": options}, sweep


def measure(size: str, dtype: str, run: str, tokens: int, batch: int) -> tuple[int, int, int, int]:
    """Return planned bytes, measured bytes and the weights of each, of a run in this process."""
    import torch

    import optlens
    from optlens import allocator

    optlens.load().record("The cat sat")  # imports
    make_model(size, torch.float16, num_hidden_layers=1, vocab_size=9)
    kind, _, streamed = run.partition("@")
    before = resident("VmRSS")
    if streamed:
        from make_checkpoint import make_checkpoint

        config = optlens.OPTConfig.from_name(size)
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder), config, dtype=getattr(torch, dtype))
            allocator.release()
            before = resident("VmRSS")
            model = optlens.load(folder, device="cpu", dtype=dtype, device_map="stream")
            return _compare(model, kind, tokens, batch, before, {"device_map": "stream"})
    model = make_model(size, getattr(torch, dtype))
    return _compare(model, kind, tokens, batch, before, {})


def _compare(
    model: Any, run: str, tokens: int, batch: int, before: int, placed: dict[str, Any]
) -> tuple[int, int, int, int]:
    import torch

    import optlens
    from optlens import allocator

    asked, go = work(run, model, tokens, batch)
    source = model.config if placed else model
    plan = optlens.plan(
        source,
        device={"cpu": "1TB"},
        dtype=model.dtype,
        prompt_length=tokens,
        batch=batch,
        **asked,
        **placed,
    )
    weights = resident("VmRSS") - before
    with torch.no_grad():
        go()
        gc.collect()
        allocator.release()
        if placed:  # the buffers of two blocks
            weights = resident("VmRSS") - before
        forget_peak()
        held = resident("VmRSS")
        go()
        grown = resident("VmHWM") - held
    return plan.total, weights + grown, plan.arrangement.weights["cpu"], weights


def main() -> None:
    """Measure each run in a fresh process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["125m", "350m"], help="125m, 350m, ...")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="float32, bfloat16, ...")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512], help="of each prompt")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="prompts")
    parser.add_argument(
        "--runs", nargs="+", default=["forward", "record"], help="see the file's text"
    )
    parser.add_argument("--once", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        size, dtype, run, tokens, batch = args.once
        print(json.dumps(measure(size, dtype, run, int(tokens), int(batch))))
        return
    cases = [
        [size, dtype, run, str(tokens), str(batch)]
        for size in args.sizes
        for dtype in args.dtypes
        for tokens in args.tokens
        for batch in args.batch
        for run in args.runs
    ]
    print("bytes in MB; 'beside' is without the weights")
    print(
        f"{'size':5} {'dtype':9} {'run':20} {'prompts':>9} {'planned':>9} {'measured':>9} {'ratio':>6}"
    )
    for case in cases:
        done = subprocess.run(
            [sys.executable, __file__, "--once", *case], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        planned, measured, weights, held = json.loads(done.stdout.splitlines()[-1])
        size, dtype, run, tokens, batch = case
        print(
            f"{size:5} {dtype:9} {run:20} {batch + ' x ' + tokens:>9} {planned / 1e6:9.1f} "
            f"{measured / 1e6:9.1f} {planned / measured:6.3f}  beside "
            f"{(planned - weights) / 1e6:.1f} {(measured - held) / 1e6:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
