"""A file is replaced whole or not at all: by a full disk, a folder without permission, an interrupt."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from optlens.files import read_fields, read_tensors, replacing, write_fields, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int16)}
FACTS = {"kind": "Test", "layers": [0, 1], "text": "·é↵"}


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond some bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:  # at once: pytest's own output may go to a file that is larger
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def limits_restored() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def folder_without_permission() -> Iterator[Path]:
    """A folder that this process may read and not write, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "old.safetensors").write_bytes(b"old")
        os.chmod(folder, 0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield Path(folder)
        if is_root:
            os.seteuid(0)
        os.chmod(folder, 0o755)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- replacing -------------------------------------------------------------------------------------------------------


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            assert temporary.parent == tmp_path and temporary != path
            temporary.write_text(text)
        assert path.read_text() == text
    with replacing(str(path)) as temporary:
        temporary.write_text("third")
    assert path.read_text() == "third" and names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_write_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    for target in (path, tmp_path / "new.txt"):
        with pytest.raises(error, match="stop"), replacing(target) as temporary:
            temporary.write_text("half of")
            raise error("stop")
        assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("half of")
        assert path.read_text() == "old"
        temporary.write_text("all of it")
    assert path.read_text() == "all of it"


def test_a_full_disk_leaves_the_old_file(tmp_path, limits_restored):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with (
        pytest.raises(OSError, match=r"Cannot write .*file.bin: .*Nothing was changed"),
        disk_with_room_for(1000),
        replacing(path) as temporary,
    ):
        temporary.write_bytes(bytes(2000))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]


def test_a_folder_without_permission_says_so(folder_without_permission):
    path = folder_without_permission / "new.txt"
    with pytest.raises(PermissionError, match="Cannot write .*new.txt: Permission denied"):
        with replacing(path) as temporary:
            temporary.write_text("text")
    assert names(folder_without_permission) == ["old.safetensors"]


def test_targets_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder; name a file in it"):
        with replacing(tmp_path):
            pytest.fail("ran")
    with pytest.raises(FileNotFoundError, match="there is no folder .*missing; create it first"):
        with replacing(tmp_path / "missing" / "file.txt"):
            pytest.fail("ran")
    with pytest.raises(FileNotFoundError, match="Nothing was changed"):
        with replacing(tmp_path / "file.txt"):
            pass  # and nothing was written
    assert names(tmp_path) == []


def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there/file.txt", "there/new.txt"):
        link = tmp_path / "link.txt"
        link.symlink_to(name)
        for text in ("first", "second"):
            with replacing(link) as temporary:
                temporary.write_text(text)
            assert link.is_symlink() and (tmp_path / name).read_text() == text
        link.unlink()
    assert names(tmp_path / "there") == ["file.txt", "new.txt"]


@pytest.fixture
def pipe(tmp_path) -> Iterator[Path]:
    """A named pipe that is being read; as for a device, a file in its place would end its use."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield path
    os.close(reader)
    assert path.is_fifo() and names(tmp_path) == ["pipe"]


def test_a_pipe_is_written_into(pipe):
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe) as temporary:
        temporary.write_text("through")
    assert os.read(reader, 100) == b"through"
    write_tensors(pipe, TENSORS, FACTS)  # safetensors' own writer renames, too
    assert load(os.read(reader, 10_000)).keys() == TENSORS.keys()
    os.close(reader)


def test_a_pipe_gets_all_or_nothing(pipe):
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ValueError, match="stop"), replacing(pipe) as temporary:
        temporary.write_text("half of")
        raise ValueError("stop")
    with pytest.raises(OSError, match="Cannot write .*pipe: No space left on device.$"):
        with replacing(pipe):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_names_up_to_the_longest_that_there_are(tmp_path):
    longest = "x" * 251 + ".txt"
    with replacing(tmp_path / longest) as temporary:
        temporary.write_text("text")
    assert names(tmp_path) == [longest]
    with pytest.raises(OSError, match="Cannot write .*: File name too long. Nothing was changed"):
        with replacing(tmp_path / f"x{longest}") as temporary:
            temporary.write_text("text")
    assert names(tmp_path) == [longest]


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_permissions_are_those_of_any_new_file_or_of_the_replaced_one(tmp_path, umask):
    path = tmp_path / "file.safetensors"
    for expected in (0o666 & ~umask, 0o604):
        write_tensors(path, TENSORS, FACTS)
        assert path.stat().st_mode & 0o777 == expected
        path.chmod(0o604)
    assert names(tmp_path) == ["file.safetensors"]


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_tensors_and_facts_come_back(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, FACTS)
    tensors, facts = read_tensors(path, "Test")
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
    with safe_open(path, framework="pt") as file:  # as anyone can read it
        assert set(file.keys()) == {"a", "b"}


def test_views_and_shared_memory_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    given = {
        "transposed": base.T,
        "row": base[1],
        "again": base[1],
        "expanded": base[:, :1].expand(3, 5),
        "leaf": torch.ones(2, requires_grad=True),
    }
    write_tensors(tmp_path / "file.safetensors", given, FACTS)
    tensors, _ = read_tensors(tmp_path / "file.safetensors", "Test")
    for name, tensor in given.items():
        torch.testing.assert_close(tensors[name], tensor.detach(), rtol=0, atol=0)


def test_only_what_must_be_copied_is_copied(tmp_path, monkeypatch):
    given = {"whole": torch.ones(3), "rows": torch.ones(4, 2)[1:3]}
    given |= {"again": given["whole"], "strided": torch.ones(4, 2).T}
    clone, copied = torch.Tensor.clone, []
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda self, **k: copied.append(self.shape) or clone(self, **k)
    )
    write_tensors(tmp_path / "file.safetensors", given, FACTS)
    assert copied == [given["again"].shape, given["strided"].shape]
    tensors, _ = read_tensors(tmp_path / "file.safetensors", "Test")
    for name, tensor in given.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


def test_a_full_disk_leaves_the_old_tensors(tmp_path, limits_restored):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, FACTS)
    before = path.read_bytes()
    with (
        pytest.raises(OSError, match=r"Cannot write .*file.safetensors: .*Nothing was changed"),
        disk_with_room_for(4096),
    ):
        write_tensors(path, {"large": torch.zeros(10_000)}, FACTS)
    assert path.read_bytes() == before and names(tmp_path) == ["file.safetensors"]


def test_tensors_in_a_folder_without_permission(folder_without_permission):
    path = folder_without_permission / "old.safetensors"
    with pytest.raises(OSError, match="Cannot write .*old.safetensors: .*[Pp]ermission denied"):
        write_tensors(path, TENSORS, FACTS)
    assert path.read_bytes() == b"old"
    assert names(folder_without_permission) == ["old.safetensors"]


def test_facts_that_are_no_json_leave_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "file.safetensors", TENSORS, {"kind": object()})
    assert names(tmp_path) == []


def damaged(path: Path) -> Iterator[bytes]:
    """Ways in which a file of tensors is not one."""
    whole = path.read_bytes()
    yield b""
    yield whole[:5]
    yield whole[:-3]
    yield b"\x00" * 40
    yield b"PK\x03\x04" + whole
    yield whole.replace(b"{", b"[", 1)


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, FACTS)
    for content in list(damaged(path)):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="file.safetensors is damaged or not a safetensors file"
        ):
            read_tensors(path, "Test")


def test_other_kinds_and_missing_files_are_refused_by_name(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, FACTS)
    with pytest.raises(ValueError, match="holds Test, not a Recording"):
        read_tensors(path, "Recording")
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            read_tensors(missing, "Test")


@dataclass
class Result:
    values: torch.Tensor
    extra: torch.Tensor | None
    layers: list[int]


def test_the_fields_of_a_dataclass_come_back(tmp_path):
    path = tmp_path / "file.safetensors"
    for extra in (None, torch.tensor([True, False])):
        result = Result(torch.arange(6.0).view(2, 3).T, extra, [0, 3])
        write_fields(path, result, "Result")
        found = Result(**read_fields(path, "Result"))
        for field in fields(Result):
            torch.testing.assert_close(getattr(found, field.name), getattr(result, field.name))
    with pytest.raises(ValueError, match="holds Result, not a Recording"):
        read_fields(path, "Recording")
