"""How much memory there is: read from the system, limited by a container, unknown elsewhere."""

import os

import pytest

from optlens import memory
from optlens.memory import available_bytes, describe_bytes


def test_bytes_are_described_in_decimal_units():
    described = [describe_bytes(n) for n in (0, 999, 1000, 1_500_000, 66_000_000_000)]
    assert described == ["0 bytes", "999 bytes", "1.0 kB", "1.5 MB", "66.0 GB"]


def test_available_memory_of_this_machine():
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10_000_000 < available_bytes("cpu") <= machine
    assert available_bytes("meta") is None


def test_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    without = available_bytes("cpu")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    assert available_bytes("cpu") == pytest.approx(without, rel=0.5)
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_bytes("cpu") == 400


def test_a_container_without_limit_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    # what else there is need not be read, which takes longer than all the rest
    assert 10_000_000 < available_bytes("cpu") < 2**50
