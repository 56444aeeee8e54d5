"""Pages of a mapped file go when they were read, and come again with their values."""

import mmap
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make
from conftest import tiny_config

from optlens.checkpoints import mapped_pages
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.mapped_pages import hand_back
from optlens.checkpoints.read import Weights
from optlens.checkpoints.readers import read_tensors

MIB = 2**20


def resident() -> int:
    """Return the bytes of mapped files that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc, which Linux has"
)


@needs_proc
def test_pages_go_and_their_values_come_again(tmp_path: Path):
    path = tmp_path / "weights.bin"
    torch.save({"w": torch.arange(8 * MIB, dtype=torch.float32)}, path)
    mapped = torch.load(path, mmap=True)["w"]
    part, rest = mapped[1000 : 6 * MIB], mapped[6 * MIB :]
    before, total = resident(), mapped.sum()
    assert resident() - before > 30 * MIB
    hand_back([part])
    assert 0 <= resident() - before < 10 * MIB
    hand_back([mapped[5:6]])  # less than a page
    assert mapped.sum() == total and rest[0] == 6 * MIB


def test_neighbours_share_a_call_that_keeps_to_their_pages(monkeypatch):
    page, calls = mmap.PAGESIZE, []
    monkeypatch.setattr(mapped_pages, "_madvise", lambda: lambda *call: calls.append(call[:2]))
    memory = torch.zeros(40 * page, dtype=torch.uint8)
    begin = -memory.data_ptr() % page
    first = memory.data_ptr() + begin

    def part(start: int, stop: int) -> torch.Tensor:
        return memory[begin + start : begin + stop]

    hand_back(
        [part(9 * page, 12 * page + 5), part(5, 3 * page), part(3 * page + 100, 7 * page + 9)]
    )
    assert calls == [(first + page, 6 * page), (first + 9 * page, 3 * page)]
    calls.clear()
    hand_back([part(0, 8 * page), part(2 * page, 3 * page), part(9 * page + 1, 10 * page)])
    assert calls == [(first, 8 * page)]
    calls.clear()
    hand_back(
        [part(0, 100), part(page + 200, 2 * page), part(20 * page + 1, 21 * page), part(7, 8)]
    )
    hand_back([])
    assert not calls


@needs_proc
@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded-bin"])
@pytest.mark.parametrize("n_readers", [1, 2])
def test_a_load_leaves_no_pages_of_its_files(tmp_path: Path, layout: str, n_readers: int):
    wide = {"vocab_size": 50_000, "hidden_size": 128, "word_embed_proj_dim": 128}
    folder = make(tmp_path, tiny_config(**wide), layout=layout, dtype=torch.float16)
    weights = Weights(find_layout(folder))
    wanted = {name: ("cpu", torch.float32) for name in weights.specs}
    before, found = resident(), {}
    read_tensors(weights, wanted, found.__setitem__, n_readers)
    assert resident() - before < 4 * MIB < sum(map(weights.n_bytes, wanted))
    assert all(torch.equal(found[n], weights.tensor(n).float()) for n in wanted)


@pytest.mark.parametrize("legacy", [False, True])
def test_memory_that_is_no_file_is_left_alone(tmp_path: Path, legacy: bool):
    """An old pickle is read into memory; two tensors may share it."""
    folder = make(tmp_path, tiny_config(vocab_size=9_000), layout="bin", legacy=legacy)
    weights = Weights(find_layout(folder))
    assert [weights.is_mapped(name) for name in weights.specs] == [not legacy] * len(weights.specs)
    expected = {name: weights.tensor(name).double() for name in weights.specs}
    for _ in range(2):
        found = {}
        wanted = {name: ("cpu", torch.float64) for name in weights.specs}
        read_tensors(weights, wanted, found.__setitem__, 2)
        assert all(torch.equal(found[name], expected[name]) for name in wanted)
