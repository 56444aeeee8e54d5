"""What `import optlens` adds to `import torch`: seconds of a notebook's first cell.

    python benchmarks/import_time.py

Every import runs in a fresh process, with the files already read once.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

LIMIT = 0.5
CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import optlens
end = time.perf_counter()
print(middle - start, end - middle)
"""


def import_once() -> tuple[float, float]:
    """Return the seconds that torch took, and optlens after it."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    torch_seconds, optlens_seconds = map(float, done.stdout.split())
    return torch_seconds, optlens_seconds


def main() -> None:
    """Import repeatedly and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=9, help="fresh processes (default 9)")
    args = parser.parse_args()
    import_once()  # the files are now in the system's cache, the byte code is written
    samples = [import_once() for _ in range(args.runs)]
    torch_median, optlens_median = (
        statistics.median(column) for column in zip(*samples, strict=True)
    )
    verdict = "holds" if optlens_median <= LIMIT else "MISSED"
    print(f"import torch    {torch_median:6.3f} s   median of {args.runs} fresh processes")
    print(
        f"import optlens  {optlens_median:6.3f} s   beyond torch; must be <= {LIMIT} s: {verdict}"
    )


if __name__ == "__main__":
    main()
