"""Checksums of `.bin` files, compared where their tensors are read anyway."""

from __future__ import annotations

import json
import threading
import warnings
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make
from conftest import tiny_config

from optlens.checkpoints import CheckpointError, load_model, read, readers
from optlens.checkpoints.checksums import Checksums
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.matching import HEAD
from optlens.checkpoints.read import Weights
from optlens.model import OPTForCausalLM


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


@pytest.fixture
def read_again(monkeypatch) -> list[str]:
    """The parts of tensors that are read to compare them."""
    names, is_intact = [], Checksums._is_intact

    def noted(checksums: Checksums, part) -> bool:
        if "/data/" in part.name:
            names.append(part.name)
        return is_intact(checksums, part)

    monkeypatch.setattr(Checksums, "_is_intact", noted)
    return names


@pytest.mark.parametrize("layout", ["bin", "sharded-bin"])
@pytest.mark.parametrize("part_bytes", [104, readers.PART_BYTES])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_converted_is_compared_on_the_way(
    tmp_path: Path, monkeypatch, read_again: list, layout: str, part_bytes: int, threads: int
):
    make(tmp_path, layout=layout, dtype=torch.float16)
    monkeypatch.setattr(readers, "PART_BYTES", part_bytes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    load_model(OPTForCausalLM, tmp_path, dtype=torch.float32)
    assert not read_again


def test_what_stays_mapped_is_compared_at_the_end(tmp_path: Path, read_again: list):
    weights = Weights(find_layout(make(tmp_path, layout="bin", dtype=torch.float16)))
    before = len(read_again)
    load_model(OPTForCausalLM, tmp_path, dtype=torch.float16)
    assert len(read_again) == 2 * before >= 2 * len(weights.specs)


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save a table of tensors; return its file, and the tensors mapped from there."""
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    return path, torch.load(path, mmap=True)


def test_a_note_of_other_values_is_no_damage(tmp_path: Path, read_again: list):
    """Only what is in the file counts: mapped tensors are private, and somebody may write there."""
    path, tensors = saved(tmp_path, {"a": torch.ones(300), "b": torch.zeros(200)})
    checksums = Checksums(path)
    assert checksums.damaged_structure() is None
    checksums.place(tensors)
    tensors["a"][17] = 5
    for tensor in tensors.values():
        checksums.note(tensor)
    assert checksums.damaged() == [] and len(read_again) == 1


@pytest.mark.parametrize("stretches", [[(0, 100)], [(0, 100), (150, 300)], [(100, 300)], []])
def test_what_nobody_has_noted_is_read(tmp_path: Path, read_again: list, stretches: list):
    path, tensors = saved(tmp_path, {"a": torch.ones(300)})
    content = bytearray(path.read_bytes())
    content[content.index(tensors["a"].numpy().tobytes()) + 4 * 120] ^= 1
    path.write_bytes(content)
    checksums = Checksums(path)
    assert checksums.damaged_structure() is None
    checksums.place(tensors)
    for start, stop in stretches:
        checksums.note(tensors["a"][start:stop])
    assert checksums.damaged() == ["a"] and len(read_again) == 1


def test_parts_that_cannot_be_told_apart_are_read(tmp_path: Path, read_again: list):
    """A file may hold more than the tensors that are asked for, of the same size."""
    path, tensors = saved(tmp_path, {"a": torch.ones(300), "b": torch.zeros(300)})
    checksums = Checksums(path)
    assert checksums.damaged_structure() is None
    checksums.place({"b": tensors["b"]})
    checksums.note(tensors["b"])
    assert checksums.damaged() == [] and len(read_again) == 2
    content = bytearray(path.read_bytes())
    content[content.index(tensors["a"].numpy().tobytes()) + 8] ^= 1
    path.write_bytes(content)
    assert checksums.damaged() == ["pytorch_model/data/0"]


def test_a_damaged_header_of_a_part(tmp_path: Path):
    path = make(tmp_path, layout="bin") / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("data/3"))
    content = bytearray(path.read_bytes())
    content[entry.header_offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the header of 'pytorch_model.*damaged"):
        Weights(find_layout(tmp_path))


def test_tensors_that_share_a_part_are_named_together(tmp_path: Path):
    values = torch.arange(300.0)
    path, tensors = saved(tmp_path, {"a": values, "b": values[100:], "c": torch.zeros(7)})
    content = bytearray(path.read_bytes())
    content[content.index(values.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    checksums = Checksums(path)
    assert checksums.damaged_structure() is None
    checksums.place(tensors)
    assert checksums.damaged() == ["a", "b"]


def test_a_part_that_lies_outside_of_the_file_is_damage(tmp_path: Path):
    path, _ = saved(tmp_path, {"a": torch.ones(300)})
    checksums = Checksums(path)
    assert checksums.damaged_structure() is None
    path.write_bytes(path.read_bytes()[:700])
    assert checksums.damaged() == ["pytorch_model/data/0"]


def test_a_file_that_is_gone_when_it_is_compared(tmp_path: Path):
    folder = make(tmp_path, layout="bin")
    weights = Weights(find_layout(folder), compare_later=True)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot be read.*No such file"):
        weights.finish_checks()


def test_an_interrupt_ends_the_comparison(tmp_path: Path, monkeypatch):
    weights = Weights(find_layout(make(tmp_path, layout="bin")), compare_later=True)
    compared = []

    def interrupted(checksums: Checksums, part) -> bool:
        compared.append(part.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checksums, "_is_intact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.finish_checks()
    assert not [t for t in threading.enumerate() if t.name.startswith("optlens-check")]


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


@pytest.mark.parametrize("later", [False, True])
def test_files_are_closed_before_the_next(tmp_path: Path, opened: list, later: bool):
    """A conversion holds one file at a time; so does a load that compares at its end."""
    weights = Weights(find_layout(make(tmp_path, layout="sharded-bin")), compare_later=later)
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
