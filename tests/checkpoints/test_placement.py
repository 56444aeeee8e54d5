from pathlib import Path

import pytest
import torch
from checkpoint_folders import make

from optlens.checkpoints import CheckpointError, load_model, placement
from optlens.checkpoints.placement import choose_dtype, parse_device, parse_dtype
from optlens.model import OPTForCausalLM

CPU = torch.device("cpu")


def set_free(monkeypatch: pytest.MonkeyPatch, n_bytes: int | None) -> None:
    monkeypatch.setattr(placement, "available_bytes", lambda device: n_bytes)


def size_of(n_parameters: int):
    return lambda dtype: n_parameters * dtype.itemsize


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_is_float32_on_the_cpu(tmp_path: Path, stored: torch.dtype):
    assert (
        load_model(OPTForCausalLM, make(tmp_path, dtype=stored), device="cpu").dtype
        == torch.float32
    )


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_is_the_stored_dtype_on_a_gpu(monkeypatch: pytest.MonkeyPatch, stored: torch.dtype):
    set_free(monkeypatch, 10**9)
    assert choose_dtype(None, torch.device("cuda"), stored, size_of(1000), "x") == stored


def test_auto_keeps_the_stored_dtype_where_float32_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make(tmp_path, dtype=torch.float16)
    set_free(monkeypatch, 50_000)
    with pytest.warns(UserWarning, match=r"needs [\d.]+ kB in float32, but only .*torch.float16"):
        model = OPTForCausalLM.from_pretrained(folder, device="cpu")
    assert model.dtype == torch.float16


def test_weights_that_stay_mapped_need_no_free_memory(tmp_path: Path, monkeypatch):
    set_free(monkeypatch, 0)
    assert load_model(OPTForCausalLM, make(tmp_path), device="cpu").dtype == torch.float32


def test_what_does_not_fit_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch):
    set_free(monkeypatch, 20 * 10**9)
    with pytest.raises(CheckpointError, match=r'26\.8 GB.*20\.0 GB are free. Try dtype="float16"'):
        choose_dtype(torch.float32, CPU, torch.float16, size_of(6_700_000_000), "opt-6.7b")
    with pytest.raises(CheckpointError, match=r'20\.0 GB are free. Try device_map="stream"'):
        choose_dtype(  # quantised or merged, so that it cannot stay in its files
            torch.float32, CPU, torch.float32, size_of(6_700_000_000), "opt-6.7b", mapped=False
        )
    set_free(monkeypatch, 10**9)
    with pytest.raises(CheckpointError, match='on cuda.*Try device="cpu"'):
        choose_dtype(
            torch.float16, torch.device("cuda"), torch.float16, size_of(6_700_000_000), "opt-6.7b"
        )


def test_unknown_memory_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    set_free(monkeypatch, None)
    assert choose_dtype(None, CPU, torch.float16, size_of(10**12), "x") == torch.float32


@pytest.mark.parametrize("given", ["float16", "torch.float16", torch.float16])
def test_dtypes_by_name_and_object(tmp_path: Path, given: str | torch.dtype):
    model = load_model(OPTForCausalLM, make(tmp_path), device="cpu", dtype=given)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.config.dtype == torch.float16


@pytest.mark.parametrize("given", ["fp16", "int8", torch.int64, None, 16])
def test_what_is_no_dtype_is_refused(given: object):
    with pytest.raises(ValueError, match='give "auto", float32, float16, bfloat16, float64'):
        parse_dtype(given)


@pytest.mark.parametrize("given", ["gpu", "cuda:x", ""])
def test_what_is_no_device_is_refused(given: str):
    with pytest.raises(ValueError, match='is not a device; give "auto", "cpu"'):
        parse_device(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [("meta", "holds no values"), ("vulkan", "'vulkan' is not to be had here")],
)
def test_devices_that_nothing_can_be_loaded_to(given: str, message: str):
    with pytest.raises(ValueError, match=f'{message}.*use (device=)?"cpu"'):
        parse_device(given)


def test_devices(monkeypatch: pytest.MonkeyPatch):
    assert parse_device("cpu") == parse_device(CPU) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parse_device("auto") == CPU
    with pytest.raises(ValueError, match="PyTorch sees 0 CUDA devices"):
        parse_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match="device='cuda:1' was asked for"):
        parse_device("cuda:1")
