"""Loading a checkpoint: time and memory against transformers.

    python benchmarks/make_checkpoint.py /big/disk/opt-125m --size 125m
    python benchmarks/loading.py /big/disk/opt-125m

Every load runs in a process of its own, the two libraries in turn, with the files in the system's
cache. Imports are done before the clock starts. As mapped weights are read only when they are used,
the time to the logits of a first short prompt is measured too. Memory is the growth of the
process's peak resident set from just before loading, over the bytes of the loaded weights; pages of
the mapped file count. Processor time (load_cpu_s) is steadier where other programs run beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from process_memory import forget_peak, resident

LIBRARIES = ("optlens", "transformers")
LIMITS = {"load_s": 1.2, "peak": 1.1}


def load_once(library: str, folder: str, dtype: str) -> dict[str, float]:
    """Load in this process and return times in seconds and memory over the weights' bytes."""
    import torch

    if library == "optlens":
        from optlens.checkpoints import load_model
        from optlens.model import OPTForCausalLM

        def load() -> torch.nn.Module:
            return load_model(OPTForCausalLM, folder, device="cpu", dtype=dtype)
    else:
        from transformers import OPTForCausalLM

        def load() -> torch.nn.Module:
            return OPTForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    prompt = torch.arange(3, 11)[None]
    forget_peak()  # that of the imports
    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    model = load()
    loaded, loaded_cpu = time.perf_counter(), time.process_time()
    peak_of_load = resident("VmHWM")
    with torch.no_grad():
        model(prompt)
    finished = time.perf_counter()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "load_s": loaded - start,
        "load_cpu_s": loaded_cpu - cpu,
        "first_logits_s": finished - start,
        "peak": (peak_of_load - before) / weights,
        "peak_first_logits": (resident("VmHWM") - before) / weights,
    }


def measure(library: str, folder: str, dtype: str) -> dict[str, float]:
    """Run `load_once` in a fresh process."""
    command = [sys.executable, __file__, folder, "--dtype", dtype, "--once", library]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Alternate the two libraries and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="a checkpoint folder")
    parser.add_argument("--dtype", default="float32", help="dtype to load in (default float32)")
    parser.add_argument("--pairs", type=int, default=7, help="loads of each (default 7)")
    parser.add_argument("--once", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(load_once(args.once, args.folder, args.dtype)))
        return
    runs: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for library in LIBRARIES:
        measure(library, args.folder, args.dtype)  # brings the files into the system's cache
    for _ in range(args.pairs):
        for library in LIBRARIES:
            runs[library].append(measure(library, args.folder, args.dtype))
    print(f"{args.folder} in {args.dtype}, medians of {args.pairs} loads each")
    print(f"{'':18} {'optlens':>9} {'transformers':>13} {'ratio':>6}")
    for name in runs["optlens"][0]:
        ours, theirs = (statistics.median(r[name] for r in runs[lib]) for lib in LIBRARIES)
        print(f"{name:18} {ours:9.3f} {theirs:13.3f} {ours / theirs:6.2f}")
    ratio = statistics.median(
        ours["load_s"] / theirs["load_s"]
        for ours, theirs in zip(*(runs[lib] for lib in LIBRARIES), strict=True)
    )
    peak = statistics.median(r["peak"] for r in runs["optlens"])
    print(f"loading time over transformers' {ratio:.2f} (at most {LIMITS['load_s']}), ", end="")
    print(f"peak memory over weights {peak:.2f} (at most {LIMITS['peak']})")


if __name__ == "__main__":
    main()
