"""What the benchmarks share: alternating pairs, intervals for ratios, one model of true shapes, a table.

Times on a busy machine wander by tens of per cent, so nothing here is a time alone. Two ways of doing
the same work run in turn, each pair gives one ratio, and the median of the ratios is reported with a
95 % interval from bootstrap resampling. Who goes first changes from pair to pair.
"""

from __future__ import annotations

import json
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import optlens

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 2000


@dataclass
class Row:
    """One line of a benchmark's table.

    Attributes:
        what: What was run.
        against: What it is compared with.
        ours: Median seconds.
        theirs: Median seconds.
        ratio: Median of the pairs' ratios, ours over theirs.
        low: Lower end of the ratio's 95 % interval.
        high: Upper end.
        limit: What the ratio must not exceed; None if it is only reported.
        faults: Median page faults of a run of ours.
        pairs: How many pairs.
    """

    what: str
    against: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    limit: float | None
    faults: int
    pairs: int

    @property
    def verdict(self) -> str:
        """Say whether the limit holds."""
        if self.limit is None:
            return "reported"
        return f"<= {self.limit:.2f} {'holds' if self.ratio <= self.limit else 'MISSED'}"


def clock(run: Callable[[], Any]) -> tuple[float, int]:
    """Return a run's seconds and page faults; what it returns is dropped after the clock stops."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del kept
    return seconds, faults


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(seed)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def alternate(
    what: str,
    against: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    limit: float | None = None,
    pairs: int = 15,
    warm_up: int = 3,
) -> Row:
    """Run two functions in turn, ours first in every other pair, and compare them."""
    for _ in range(warm_up):
        ours()
        theirs()
    samples: list[tuple[float, float, int]] = []
    for pair in range(pairs):
        if pair % 2:
            their_time, _ = clock(theirs)
            our_time, faults = clock(ours)
        else:
            our_time, faults = clock(ours)
            their_time, _ = clock(theirs)
        samples.append((our_time, their_time, faults))
    return summarise(what, against, samples, limit)


def summarise(
    what: str, against: str, samples: list[tuple[float, float, int]], limit: float | None
) -> Row:
    """Turn pairs of (our seconds, their seconds, our page faults) into a row."""
    ours, theirs, faults = (list(column) for column in zip(*samples, strict=True))
    ratios = [mine / other for mine, other, _ in samples]
    low, high = interval(ratios)
    return Row(
        what=what,
        against=against,
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        limit=limit,
        faults=int(statistics.median(faults)),
        pairs=len(samples),
    )


def machine() -> dict[str, Any]:
    """Describe where the figures come from; figures without this mean nothing."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "optlens": optlens.__version__,
        "device": "cpu",
        "dtype": "float32",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def publish(name: str, rows: list[Row], **facts: Any) -> None:
    """Print the table and write the same as JSON to `benchmarks/results/NAME.json`."""
    facts = machine() | facts
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(
        f"\n{'what':34} {'against':26} {'ours s':>8} {'theirs s':>8} "
        f"{'ratio':>6}  {'95 % interval':15} {'faults':>7}  must"
    )
    for row in rows:
        print(
            f"{row.what:34} {row.against:26} {row.ours:8.4f} {row.theirs:8.4f} {row.ratio:6.3f}  "
            f"[{row.low:.3f}, {row.high:.3f}]  {row.faults:7d}  {row.verdict}"
        )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"facts": facts, "rows": [asdict(r) for r in rows]}, indent=1))
    print(f"\nwritten to {path}")


def true_shape_model(name: str = "opt-125m", seed: int = 0) -> optlens.OPTForCausalLM:
    """Build an OPT of published shapes with random float32 weights, in eval mode.

    Speed depends on shapes, not on what the weights know.
    """
    torch.manual_seed(seed)
    return optlens.OPTForCausalLM(optlens.OPTConfig.from_name(name)).eval()


def transformers_twin(model: optlens.OPTForCausalLM, attention: str = "sdpa") -> torch.nn.Module:
    """Build transformers' model with the same config and weights."""
    import transformers

    config = transformers.OPTConfig(**model.config.to_dict())
    twin = transformers.OPTForCausalLM._from_config(config, attn_implementation=attention)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def random_tokens(batch: int, pos: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids, `[batch, pos]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 50265, (batch, pos), generator=generator)
