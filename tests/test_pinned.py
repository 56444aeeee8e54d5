"""Copies from a GPU through pinned memory: ordered from a fake GPU, and what they do on the CPU."""

import pytest
import torch
from conftest import tiny_config
from fake_gpus import FakeGpus, needs_cuda_build, on_fake_gpu

from optlens import pinned

GPU = torch.device("cuda:0")
TOKENS = torch.tensor([[2, 5, 6, 7, 8], [2, 9, 10, 11, 12]])


def test_memory_that_may_not_be_locked_is_ordinary(monkeypatch):
    assert not pinned.host_tensor((2, 3), torch.float16, torch.device("cpu")).is_pinned()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given, empty = [], torch.empty

    def refusing(*size, **options):
        given.append(options)
        if options.pop("pin_memory", False):
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    made = pinned.host_tensor((2, 3), torch.float16, GPU)
    assert made.shape == (2, 3) and made.dtype == torch.float16 and len(given) == 2


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5)])
def test_strided_rows_are_filled(shape: tuple):
    whole, value = torch.zeros(shape), torch.randn(shape[0], *shape[2:])
    pinned.copy_later(whole[:, 1], value)
    assert torch.equal(whole[:, 1], value) and not whole[:, [0, 2]].any()
    part = torch.zeros(shape)
    pinned.copy_later(part[:, 1, :, 2:], value[:, :, 2:])
    assert torch.equal(part[:, 1, :, 2:], value[:, :, 2:])


@pytest.mark.placement
@needs_cuda_build
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"pos": [1, -1], "heads": 2}])
def test_a_recording_orders_its_copies_and_waits_once(monkeypatch, options: dict):
    """What it asks of a GPU, whose memory here is ordinary and called pinned."""
    monkeypatch.setattr("optlens.recorder.available_bytes", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    events, copy_later = [], pinned.copy_later

    def ordered(target, value):
        assert target.device.type == "cpu" and value.device == GPU
        assert target.dtype == value.dtype  # converted there: a host that converts has to wait
        copy_later(target, value)
        events.append("copy")

    monkeypatch.setattr(pinned, "copy_later", ordered)
    monkeypatch.setattr(pinned, "wait_for", lambda devices: events.append(set(devices)))
    with FakeGpus(), torch.no_grad():
        model = on_fake_gpu(tiny_config())
        recording = model.record(TOKENS, what=("attention", "residual", "z"), **options)
    # two blocks: patterns, z, the stream thrice and the last one of all positions
    assert events == ["copy"] * 8 + [{GPU}]
    assert recording.attention.device.type == "cpu"


def test_a_recording_on_the_cpu_orders_nothing(monkeypatch, tiny_model):
    monkeypatch.setattr(pinned, "copy_later", None)
    waited = []
    monkeypatch.setattr(pinned, "wait_for", lambda devices: waited.append(set(devices)))
    tiny_model.record(TOKENS)
    assert waited == [set()]
