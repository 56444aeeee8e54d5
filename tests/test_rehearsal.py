"""A rehearsal of the GPU: the forward pass on fake CUDA tensors, which have a device but no data.

Fake tensors raise when two devices meet and when code asks for values, so a mask or an index left
on the CPU, or a check that would wait for the device, is caught on a machine without a GPU.
"""

import pytest
import torch
from conftest import VARIANTS, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode

from optlens import OPTForCausalLM, checks


def on_fake_gpu(variant: dict, dtype: torch.dtype = torch.float32) -> OPTForCausalLM:
    """Return a tiny model whose weights lie on a fake `cuda:0`; call it in a FakeTensorMode."""
    with torch.device("meta"):
        model = OPTForCausalLM(tiny_config(**variant)).eval()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            fake = torch.empty(weight.shape, dtype=dtype, device="cuda:0")
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
    model.tie_weights()
    return model


@pytest.fixture
def fake_gpu_model(variant):
    """A tiny model on a fake GPU, in the mode that it needs."""
    with FakeTensorMode(), torch.no_grad():
        yield on_fake_gpu(variant)


def test_forward_and_everything_recorded_stay_on_the_device(fake_gpu_model):
    model = fake_gpu_model
    tokens = torch.ones(2, 7, dtype=torch.long, device="cuda:0")
    mask = torch.ones(2, 7, dtype=torch.long, device="cuda:0")
    for attention_mask in (None, mask):
        out = model(tokens, attention_mask=attention_mask)
        assert out.logits.device == torch.device("cuda:0")
        assert out.logits.shape == (2, 7, 101)
        logits, cache = model.run_with_cache(tokens, attention_mask=attention_mask)
        assert {value.device for value in cache.values()} == {torch.device("cuda:0")}
    assert model.config.device == torch.device("cuda:0")


def test_a_misplaced_weight_is_caught(fake_gpu_model):
    model = fake_gpu_model
    layer = model.decoder.layers[1]
    layer.fc1.weight = torch.nn.Parameter(torch.empty(layer.fc1.weight.shape, device="cpu"))
    with pytest.raises(RuntimeError, match=r"two different devices|cuda:0"):
        model(torch.ones(1, 5, dtype=torch.long, device="cuda:0"))


def test_half_precision_keeps_its_dtype():
    with FakeTensorMode(), torch.no_grad():
        model = on_fake_gpu(VARIANTS["pre_ln"], torch.float16)
        tokens = torch.ones(1, 5, dtype=torch.long, device="cuda:0")
        logits, cache = model.run_with_cache(tokens)
    assert (
        logits.dtype == cache["pattern", 0].dtype == cache["resid_post", 1].dtype == torch.float16
    )
    assert cache["scale", 0, "ln1"].dtype == cache["normalized", 0, "ln1"].dtype == torch.float32


def test_checks_of_values_leave_fake_tensors_alone():
    with FakeTensorMode(), torch.no_grad():
        assert checks.on_host(torch.ones(3)) is None
    assert checks.on_host(torch.ones(3, device="meta")) is None
    assert checks.on_host(torch.ones(3)).tolist() == [1, 1, 1]
