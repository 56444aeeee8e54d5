"""A whole checkpoint in memory: time to load it and to record a prompt, and the memory that it takes.

    python benchmarks/full_size.py --size 6.7b --folder /big/disk/opt-6.7b --dtype float16

Makes a stand-in of a published size (random weights, float16 in two shards), loads it in a process of
its own with the files out of the system's cache, records one prompt, and removes the files. Mapped
weights are pages of the file, which the system may take back at any time; so two peaks are reported:
of memory that is the process's own, and of all that it has in memory, pages of the file included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from process_memory import Watch, forget_peak, resident
from streaming import forget, weight_files

MUST_BYTES = 15 * 2**30


def record_once(folder: Path, tokens: int, dtype: str) -> dict[str, float | str]:
    """Load and record in this process; return seconds and bytes."""
    import torch

    import optlens

    forget(weight_files(folder))
    forget_peak()
    watch, start = Watch(lambda: resident("RssAnon"), every=0.1), time.perf_counter()
    model = optlens.load(folder, device="cpu", dtype=dtype)
    loaded = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (1, tokens), generator=generator)
    rec = model.record(ids, what=("attention", "residual"))
    recorded = time.perf_counter()
    rec.logit_lens()
    lens = time.perf_counter()
    model.record(ids, what=("attention", "residual"))
    again = time.perf_counter()
    return {
        "dtype": str(model.dtype),
        "load_s": loaded - start,
        "record_s": recorded - loaded,
        "lens_s": lens - recorded,
        "record_again_s": again - lens,
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "own": watch.largest(),
        "all": resident("VmHWM"),
    }


def main() -> None:
    """Make the stand-in, measure, remove it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="125m", help="a published size (default 125m)")
    parser.add_argument("--folder", type=Path, default=Path("build/full-size"))
    parser.add_argument("--tokens", type=int, default=32, help="length of the prompt (default 32)")
    parser.add_argument("--dtype", default="float16", help="to load in (default float16)")
    parser.add_argument("--keep", action="store_true", help="leave the stand-in there")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(record_once(args.folder, args.tokens, args.dtype)))
        return
    from make_checkpoint import stand_in

    with stand_in(args.folder, args.size, args.keep):
        command = [sys.executable, __file__, "--folder", str(args.folder), "--once"]
        command += ["--tokens", str(args.tokens), "--dtype", args.dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{args.size} in {found['dtype']}: {found['weights'] / 1e9:.2f} GB of weights")
        print(
            f"load {found['load_s']:.2f} s, record {args.tokens} tokens {found['record_s']:.1f} s"
        )
        print(
            f"then the lens {found['lens_s']:.1f} s, record again {found['record_again_s']:.1f} s"
        )
        print(f"peak {found['own'] / 1e9:.2f} GB of the process's own memory, ", end="")
        print(f"{found['all'] / 1e9:.2f} GB with the file's pages (at most {MUST_BYTES / 1e9:.2f})")


if __name__ == "__main__":
    main()
