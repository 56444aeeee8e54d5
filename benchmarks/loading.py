"""Loading a checkpoint: time and memory against transformers and TransformerLens.

    python benchmarks/make_checkpoint.py /big/disk/opt-125m --size 125m
    python benchmarks/loading.py /big/disk/opt-125m

Every load runs in a process of its own, the libraries in turn. Imports are done before the clock
starts, and the files are read through once, as systems may drop what they keep of files within
seconds. A tokenizer in the folder is loaded too, by all. As
mapped weights are read only when they are used, the time to the logits of a first short prompt is
measured too. Memory is the growth of the process's peak resident set from just before loading, over
the bytes of the loaded weights; pages of the mapped file count. Processor time (load_cpu_s) is
steadier where other programs run beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from process_memory import forget_peak, resident

LIBRARIES = ("optlens", "transformers", "transformer_lens")
LIMITS = {"transformers": 1.0, "transformer_lens": 0.5}
MUST_PEAK = 1.1


def load_once(library: str, folder: str, dtype: str) -> dict[str, float]:
    """Load in this process and return times in seconds and memory over the weights' bytes."""
    import torch

    if library == "optlens":
        from optlens.checkpoints import load_model
        from optlens.model import OPTForCausalLM

        def load() -> torch.nn.Module:
            return load_model(OPTForCausalLM, folder, device="cpu", dtype=dtype)
    elif library == "transformer_lens":
        from transformer_lens.model_bridge import TransformerBridge

        def load() -> torch.nn.Module:
            return TransformerBridge.boot_transformers(
                folder, device="cpu", dtype=getattr(torch, dtype)
            )
    else:
        from transformers import AutoTokenizer, OPTForCausalLM

        def load() -> torch.nn.Module:
            if (Path(folder) / "vocab.json").exists():  # the others read it as well
                AutoTokenizer.from_pretrained(folder)
            return OPTForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    prompt = torch.arange(3, 11)[None]
    bring_into_cache(Path(folder))
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


def bring_into_cache(folder: Path) -> None:
    """Have the system hold all files of a folder in memory."""
    buffer = bytearray(2**20)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure(library: str, folder: str, dtype: str) -> dict[str, float]:
    """Run `load_once` in a fresh process."""
    command = [sys.executable, __file__, folder, "--dtype", dtype, "--once", library]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Alternate the libraries and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="a checkpoint folder")
    parser.add_argument("--dtype", default="float32", help="dtype to load in (default float32)")
    parser.add_argument("--pairs", type=int, default=7, help="loads of each (default 7)")
    parser.add_argument("--skip-transformer-lens", action="store_true")
    parser.add_argument("--once", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(load_once(args.once, args.folder, args.dtype)))
        return
    libraries = LIBRARIES[: 2 if args.skip_transformer_lens else 3]
    runs: dict[str, list[dict[str, float]]] = {library: [] for library in libraries}
    for _ in range(args.pairs):
        for library in libraries:
            runs[library].append(measure(library, args.folder, args.dtype))
    print(f"{args.folder} in {args.dtype}, medians of {args.pairs} loads each")
    print(f"{'':18}" + "".join(f"{library:>18}" for library in libraries))
    for name in runs["optlens"][0]:
        medians = [statistics.median(run[name] for run in runs[library]) for library in libraries]
        print(f"{name:18}" + "".join(f"{median:18.3f}" for median in medians))
    for peer in libraries[1:]:
        pairs = zip(runs["optlens"], runs[peer], strict=True)
        ratio = statistics.median(ours["load_s"] / theirs["load_s"] for ours, theirs in pairs)
        print(f"loading time over that of {peer}: {ratio:.2f} (at most {LIMITS[peer]})")
    peak = statistics.median(run["peak"] for run in runs["optlens"])
    print(f"peak memory over weights {peak:.2f} (at most {MUST_PEAK})")


if __name__ == "__main__":
    main()
