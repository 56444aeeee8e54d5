"""Scripts whose real runs need another machine: that they run at all, small and on the CPU."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path: Path):
    """Import a script by name, its results going to a folder of their own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    monkeypatch.setattr(importlib.import_module("paired"), "RESULTS", tmp_path)
    with torch.random.fork_rng(), torch.set_grad_enabled(True):
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_gpu_benchmark_runs_small_on_the_cpu(script, tmp_path: Path, capsys):
    arguments = ["--device", "cpu", "--small", "--skip-peer", "--dtypes", "float32", "bfloat16"]
    script("gpu").main(arguments)
    written = json.loads((tmp_path / "gpu-small.json").read_text())
    assert written["facts"]["device"] == "cpu"
    names = [row["what"] for row in written["rows"]]
    for work in ("forward 1 x 16", "record 1 x 16", "sweep resid_pre", "decode 8 x 4"):
        assert sum(name.startswith(work) for name in names) >= 2
    assert "planned MB of a forward 1 x 16, bfloat16" in capsys.readouterr().out


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak of a process"
)
@pytest.mark.parametrize(
    ("size", "dtype", "run", "tokens", "batch"),
    [
        ("125m", "float32", "forward", 256, 1),
        ("125m", "bfloat16", "forward", 64, 4),
        ("125m", "float32", "record", 128, 1),
        ("125m", "bfloat16", "record:residual", 128, 2),
        ("350m", "bfloat16", "record:attention", 128, 1),
    ],
)
def test_a_process_takes_what_was_planned(size, dtype, run: str, tokens: int, batch: int):
    """Within 5 %, of what the system says of a fresh process.

    Of one process in five or so it says a tenth more, for a reason not found: so the least of three
    counts.
    """
    case = [size, dtype, run, str(tokens), str(batch)]
    command = [sys.executable, str(BENCHMARKS / "planning.py"), "--once", *case]
    found = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        planned, measured, *_ = json.loads(done.stdout.splitlines()[-1])
        found.append(measured)
        if planned == pytest.approx(min(found), rel=0.05):
            return
    assert planned == pytest.approx(min(found), rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(script, capsys):
    with pytest.raises(SystemExit):
        script("gpu").main([])
    assert "--device cpu --small" in capsys.readouterr().err
