"""Checksums of `.bin` files, compared while their tensors are read already."""

from __future__ import annotations

import json
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make
from conftest import tiny_config

from optlens.checkpoints import CheckpointError, checksums, load, load_model, read
from optlens.checkpoints.checksums import check_pool
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.matching import HEAD
from optlens.checkpoints.read import Weights
from optlens.model import OPTForCausalLM

PATIENCE = 20  # seconds


def still_comparing() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("optlens-check")]


def damage_a_tensor(folder: Path, name: str | None = None) -> tuple[Path, str]:
    """Change some bytes of a tensor, the last unless named; return the file and its name there."""
    weights = Weights(find_layout(folder))
    name = name or weights.by_file(list(weights.specs))[-1]
    path, stored = weights.location(name)
    content = bytearray(path.read_bytes())
    at = content.index(weights.tensor(name).numpy().tobytes())
    content[at : at + 4] = bytes(255 - byte for byte in content[at : at + 4])
    del weights
    path.write_bytes(content)
    return path, stored


@pytest.mark.parametrize("layout", ["bin", "sharded-bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # mapped, and converted
def test_a_damaged_tensor_fails_the_load(tmp_path: Path, layout: str, dtype: torch.dtype):
    path, name = damage_a_tensor(make(tmp_path, layout=layout, dtype=torch.float16))
    with pytest.raises(CheckpointError, match="is corrupted") as caught:
        load_model(OPTForCausalLM, tmp_path, dtype=dtype)
    assert str(path) in str(caught.value) and repr(name) in str(caught.value)
    assert not still_comparing()


def test_tensors_are_read_while_files_are_compared(tmp_path: Path, monkeypatch):
    make(tmp_path, layout="bin")
    reading, fill, is_intact = threading.Event(), load._fill, checksums._is_intact
    seen: list[bool] = []

    def tell(*arguments) -> None:
        reading.set()
        fill(*arguments)

    def compare(whole, entry) -> bool:
        if checksums.is_of_a_tensor(entry.filename):
            seen.append(reading.is_set() or (not seen and reading.wait(PATIENCE)))
        return is_intact(whole, entry)

    monkeypatch.setattr(load, "_fill", tell)
    monkeypatch.setattr(checksums, "_is_intact", compare)
    load_model(OPTForCausalLM, tmp_path)
    assert all(seen) and len(seen) > 10


def test_a_load_that_fails_gives_up_the_comparisons(tmp_path: Path, monkeypatch):
    make(tmp_path, layout="bin")
    failed, compared = threading.Event(), []

    def fail(*arguments) -> None:
        failed.set()
        raise KeyboardInterrupt

    def compare(whole, entry) -> bool:
        if checksums.is_of_a_tensor(entry.filename):
            compared.append(entry.filename)
            failed.wait(PATIENCE)
            threading.Event().wait(0.2)  # others are given up meanwhile
        return True

    monkeypatch.setattr(load, "_fill", fail)
    monkeypatch.setattr(checksums, "_is_intact", compare)
    with pytest.raises(KeyboardInterrupt):
        load_model(OPTForCausalLM, tmp_path)
    assert len(compared) <= min(torch.get_num_threads(), 4) and not still_comparing()


def test_a_part_that_lies_outside_of_the_file_is_damage(tmp_path: Path, monkeypatch):
    make(tmp_path, layout="bin")
    is_intact = checksums._is_intact

    def compare(whole, entry) -> bool:
        if checksums.is_of_a_tensor(entry.filename):
            entry.header_offset = len(whole)
        return is_intact(whole, entry)

    monkeypatch.setattr(checksums, "_is_intact", compare)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_model(OPTForCausalLM, tmp_path)


@pytest.fixture
def opened(monkeypatch) -> list[weakref.ref[read.TorchFile]]:
    """Weak references to the `.bin` files that are opened."""
    found = []

    class Noted(read.TorchFile):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            found.append(weakref.ref(self))

    monkeypatch.setattr(read, "TorchFile", Noted)
    return found


@pytest.mark.parametrize("legacy", [False, True])
def test_only_files_with_checksums_stay_open_until_they_are_compared(
    tmp_path: Path, opened: list, legacy: bool
):
    """Those of before PyTorch 1.6 have none, and are in memory as long as they are open."""
    make(tmp_path, layout="sharded-bin", legacy=legacy)
    with check_pool() as pool:
        weights = Weights(find_layout(tmp_path), pool)
        assert len(opened) > 1
        assert (opened[0]() is None) is legacy
        weights.finish_checks()
        assert opened[0]() is None


def test_files_that_are_compared_at_once_are_closed_before_the_next(tmp_path: Path, opened: list):
    """A conversion holds one file at a time."""
    weights = Weights(find_layout(make(tmp_path, layout="sharded-bin")))
    assert len(opened) > 1 and all(file() is None for file in opened[:-1])
    assert opened[-1]() is not None and weights.specs


def test_a_damaged_head_is_not_taken_for_one_of_its_own(tmp_path: Path):
    """Nobody is told that it differs from the embedding when it is damaged."""
    make(tmp_path, tiny_config(tie_word_embeddings=False), layout="bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    damage_a_tensor(tmp_path, HEAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="is corrupted"):
            load_model(OPTForCausalLM, tmp_path)
