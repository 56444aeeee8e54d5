"""How many bytes a portion of runs may take."""

import pytest
import torch
from conftest import tiny_config

from optlens.config import OPTConfig
from optlens.patching.budget import DEFAULT_BUDGET, bytes_of, compiled_bytes, portion_budget


def test_values_that_share_memory_are_counted_once():
    values = torch.zeros(10, 4)
    run = {"resid_post": [values, torch.zeros(3)], "resid_pre": [values.view(4, 10), values[2:]]}
    assert bytes_of(run) == 4 * (40 + 3)
    assert bytes_of(run, run) == 4 * (40 + 3)


@pytest.mark.parametrize(("free", "expected"), [(1000, 500), (None, DEFAULT_BUDGET)])
def test_half_of_what_is_free_is_taken_unless_told(free, expected, monkeypatch):
    monkeypatch.setattr("optlens.patching.budget.available_bytes", lambda device: free)
    assert portion_budget(None, 10, 7, 5000, [torch.device("cpu")], "patch") == expected


def test_of_several_devices_the_one_with_least_room_counts(monkeypatch):
    free = {torch.device("cuda:0"): 1000, torch.device("cuda:1"): 600, torch.device("meta"): None}
    monkeypatch.setattr("optlens.patching.budget.available_bytes", free.__getitem__)
    assert portion_budget(None, 10, 7, 5000, list(free), "patch") == 300


def test_what_is_allowed_includes_the_recorded_runs():
    assert portion_budget(100, 60, 0, 40, [torch.device("cpu")], "patch") == 40
    with pytest.raises(MemoryError, match="recorded runs take 60.*one patch 41"):
        portion_budget(100, 60, 0, 41, [torch.device("cpu")], "patch")


def test_compiled_products_are_counted(monkeypatch):
    cpu, config = [torch.device("cpu")], OPTConfig.from_name("opt-125m")
    monkeypatch.setattr("optlens.patching.budget.USE_ONEDNN", False)
    assert compiled_bytes(config) == 0
    monkeypatch.setattr("optlens.patching.budget.USE_ONEDNN", True)
    compiled = compiled_bytes(config)
    assert compiled > 0 == compiled_bytes(tiny_config())
    free = portion_budget(10**9, 10**8, 0, 10, cpu, "patch")
    assert free > portion_budget(10**9, 10**8, compiled, 10, cpu, "patch") > free * 0.9
    with pytest.raises(MemoryError, match="compiled matrix products 28"):
        portion_budget(compiled + 100, 60, compiled, 50, cpu, "patch")
    assert portion_budget(compiled + 110, 60, compiled, 50, cpu, "patch") == 50
