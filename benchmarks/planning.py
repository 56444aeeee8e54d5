"""What a plan says against what a process then takes.

    python benchmarks/planning.py --sizes 125m 350m 1.3b

Models of true shapes with random weights, in float32 on the CPU, each in a process of its own. The
first pass of everything makes what is made once (compiled products, threads), so it is not counted;
memory is the weights and the growth of the peak resident set over what is held before the second.
Plans count tensors. Processes also hold what kernels allocate inside and gaps in the heap: some tens
of MB, which matter less the larger the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys

from process_memory import forget_peak, resident


def measure(size: str, tokens: int) -> dict[str, tuple[int, int]]:
    """Return planned and measured bytes of each run in this process."""
    import torch

    import optlens
    from optlens import allocator

    ids = torch.arange(3, 3 + tokens)[None]
    optlens.load().record("The cat sat")  # imports
    before = resident("VmRSS")
    model = optlens.OPTForCausalLM(optlens.OPTConfig.from_name(size)).eval()
    weights = resident("VmRSS") - before
    options = {"device": {"cpu": "1TB"}, "prompt_length": tokens}
    plain = optlens.plan(model, **options)
    recorded = optlens.plan(model, record=True, **options)

    def growth(run) -> int:
        run()
        gc.collect()
        allocator.release()
        forget_peak()
        held = resident("VmRSS")
        run()
        return resident("VmHWM") - held

    with torch.no_grad():
        forward = growth(lambda: model(ids))
        record = growth(lambda: model.record(ids))
    return {
        "weights": (plain.weights, weights),
        "forward": (plain.total, weights + forward),
        "record": (recorded.total, weights + record),
    }


def main() -> None:
    """Measure each size in a fresh process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["125m", "350m"], help="125m, 350m, ...")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure(args.once, args.tokens)))
        return
    print(f"1 prompt of {args.tokens} tokens, float32, bytes in MB")
    print(f"{'size':8} {'':10} {'planned':>10} {'measured':>10} {'ratio':>6}")
    for size in args.sizes:
        command = [sys.executable, __file__, "--once", size, "--tokens", str(args.tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        for run, (planned, measured) in json.loads(done.stdout.splitlines()[-1]).items():
            ratio = planned / measured
            print(f"{size:8} {run:10} {planned / 1e6:10.1f} {measured / 1e6:10.1f} {ratio:6.3f}")


if __name__ == "__main__":
    main()
