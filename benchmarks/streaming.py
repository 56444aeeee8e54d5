"""Streaming a model from disk: its speed against the disk's, and the memory that it takes.

    python benchmarks/streaming.py --size 13b --folder /big/disk/opt-13b
    python benchmarks/streaming.py --size 125m --prompts 100

Makes a stand-in of a published size (random weights, float16 shards, written tensor by tensor),
measures how fast its files are read from end to end, records one prompt through a streamed model in
a process of its own, and removes the files. Before each measurement the system is told to forget
the files (posix_fadvise), so all bytes come from the disk; what a host keeps beneath a virtual
machine is beyond its reach, which is why the disk's rate is measured in the same run.

Reported are the bytes of the blocks over the time of the recording, against the disk's rate; how
long the run waited for weights (if hardly at all, computing is what takes the time); the peak of the
process's resident memory, and of that plus what of the files was in the system's cache.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from process_memory import Watch, forget_peak, resident

MUST_RATE, MUST_BYTES = 0.7, 6 * 2**30
CHUNK = 8 * 2**20


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold weights."""
    return sorted(folder.glob("*.safetensors"))


def forget(files: list[Path]) -> None:
    """Have the system drop files from its cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential_rate(files: list[Path]) -> float:
    """Read files once, in large pieces, and return bytes per second."""
    forget(files)
    buffer, n_bytes, start = bytearray(CHUNK), 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := file.readinto(buffer):
                n_bytes += count
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
    return n_bytes / (time.perf_counter() - start)


def cached_bytes(files: list[Path]) -> int:
    """Return how many bytes of files are in the system's cache."""
    libc, total = ctypes.CDLL(None, use_errno=True), 0
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
            pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
            view = np.frombuffer(mapped, dtype=np.uint8)
            address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
            if libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data)):
                raise OSError(ctypes.get_errno(), "mincore")
            total += int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE
            del view
    return total


def record_once(folder: Path, tokens: int, prompts: int, dtype: str) -> dict[str, float]:
    """Record in this process; return seconds and bytes."""
    import torch

    import optlens
    from optlens.checkpoints import streaming

    files, waited = weight_files(folder), [0.0]
    wait = streaming._Reading.wait

    def timed_wait(reading: streaming._Reading) -> None:
        start = time.perf_counter()
        wait(reading)
        waited[0] += time.perf_counter() - start

    streaming._Reading.wait = timed_wait
    forget_peak()
    before = resident("VmRSS")
    start = time.perf_counter()
    model = optlens.load(folder, device="cpu", dtype=dtype, device_map="stream")
    loaded = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    size = (prompts, tokens)
    ids = torch.randint(4, model.config.vocab_size, size, generator=generator)
    forget(files)
    watch = Watch(lambda: resident("VmRSS") + cached_bytes(files), every=0.5)
    start_run, cpu = time.perf_counter(), time.process_time()
    rec = model.record(ids, what=("attention", "residual"))
    run_s, cpu_s = time.perf_counter() - start_run, time.process_time() - cpu
    start_lens = time.perf_counter()
    if prompts == 1:
        rec.logit_lens()
    lens_s = time.perf_counter() - start_lens
    stored = model.placement._stored
    return {
        "dtype": str(model.dtype),
        "load_s": loaded - start,
        "run_s": run_s,
        "run_cpu_s": cpu_s,
        "waited_s": waited[0],
        "lens_s": lens_s,
        "block_bytes": sum(stored.nbytes(names.values()) for names in model.placement._names),
        "before": before,
        "peak": resident("VmHWM"),
        "peak_with_cache": max(watch.largest(), resident("VmHWM")),
    }


def measure(folder: Path, tokens: int, prompts: int, dtype: str) -> dict[str, float]:
    """Run `record_once` in a fresh process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--tokens", str(tokens)]
    command += ["--prompts", str(prompts), "--dtype", dtype, "--once"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def report(name: str, found: dict[str, float], rate: float) -> None:
    """Print one measurement."""
    speed = found["block_bytes"] / found["run_s"]
    print(
        f"{name}: run {found['run_s']:.1f} s ({found['run_cpu_s']:.1f} s of processors), ", end=""
    )
    print(f"of which {found['waited_s']:.1f} s waiting for weights; lens {found['lens_s']:.1f} s")
    print(f"  {found['block_bytes'] / 1e9:.2f} GB of blocks at {speed / 1e6:.0f} MB/s: ", end="")
    print(f"{speed / rate:.2f} of the disk's rate (at least {MUST_RATE}, or computing is slower)")
    print(f"  peak memory {found['peak'] / 1e9:.2f} GB, with cached pages of the files ", end="")
    print(f"{found['peak_with_cache'] / 1e9:.2f} GB (at most {MUST_BYTES / 1e9:.2f}), ", end="")
    print(f"{found['before'] / 1e9:.2f} GB before loading; computed in {found['dtype']}")


def main() -> None:
    """Make the stand-in, measure, remove it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="125m", help="a published size (default 125m)")
    parser.add_argument("--folder", type=Path, default=Path("build/streaming"))
    parser.add_argument("--tokens", type=int, default=32, help="length of a prompt (default 32)")
    parser.add_argument("--prompts", type=int, default=1, help="also record so many in one pass")
    parser.add_argument("--dtype", default="auto", help="to compute in (default auto)")
    parser.add_argument("--keep", action="store_true", help="leave the stand-in there")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(record_once(args.folder, args.tokens, args.prompts, args.dtype)))
        return
    from make_checkpoint import stand_in

    with stand_in(args.folder, args.size, args.keep) as files:
        rate = sequential_rate(files)
        total = sum(path.stat().st_size for path in files)
        print(f"{args.size}, {total / 1e9:.2f} GB in {len(files)} files; the disk gives ", end="")
        print(f"{rate / 1e6:.0f} MB/s")
        one = measure(args.folder, args.tokens, 1, args.dtype)
        report("one prompt", one, rate)
        if args.prompts > 1:
            many = measure(args.folder, args.tokens, args.prompts, args.dtype)
            report(f"{args.prompts} prompts in one pass", many, rate)
            passes = args.prompts * one["run_s"] / many["run_s"]
            print(f"  {passes:.1f} times as fast as {args.prompts} passes of one prompt each")


if __name__ == "__main__":
    main()
