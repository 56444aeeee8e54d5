"""Reading bitsandbytes' modules, also those that somebody else has made."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from optlens.quantized import dequantized_weight, is_quantized, quantized_sample
from optlens.weight_sample import weight_sample
from optlens.weights import effective_bias, effective_weight


def int8_module(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    rows, columns = weight.shape
    module = bnb.nn.Linear8bitLt(columns, rows, bias=bias is not None, has_fp16_weights=False)
    module.weight = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def nf4_module(weight: torch.Tensor, bias: torch.Tensor | None, nested: bool) -> nn.Module:
    rows, columns = weight.shape
    module = bnb.nn.Linear4bit(columns, rows, bias=bias is not None, quant_type="nf4")
    module.support_avx512bf16_for_cpu = False
    module.weight = bnb.nn.Params4bit(
        weight, quant_type="nf4", compress_statistics=nested, module=module
    ).to("cpu")
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


@pytest.fixture(params=["int8", "nf4", "nf4 nested"])
def make(request):
    def build(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
        if request.param == "int8":
            return int8_module(weight, bias)
        return nf4_module(weight, bias, request.param == "nf4 nested")

    return build


WEIGHT = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_values_are_those_that_the_module_multiplies_by(make):
    module = make(WEIGHT.clone(), torch.zeros(32))
    assert is_quantized(module)
    weight = dequantized_weight(module)
    assert weight.shape == WEIGHT.shape and weight.dtype == torch.float32
    assert (weight - WEIGHT).abs().max() < 0.2 * WEIGHT.abs().max()
    # one column at a time, so that the rounding of inputs to 8 bits loses nothing
    eye = torch.eye(128)
    torch.testing.assert_close(module(eye).T, weight, rtol=1e-3, atol=1e-3)
    assert torch.equal(dequantized_weight(module), weight)  # the run has moved the scales
    assert torch.equal(effective_weight(module), weight)
    assert torch.equal(effective_bias(module), torch.zeros(32))


def test_the_sample_is_that_of_the_values(make):
    module = make(WEIGHT.clone())
    torch.testing.assert_close(
        quantized_sample(module),
        weight_sample(dequantized_weight(module)).to(quantized_sample(module).dtype),
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_the_biass(make, dtype: torch.dtype):
    assert dequantized_weight(make(WEIGHT.to(dtype), torch.zeros(32, dtype=dtype))).dtype == dtype


def test_rearranged_codes_are_refused():
    module = nf4_module(WEIGHT.clone(), None, False)
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TypeError, match="support_avx512bf16_for_cpu = False"):
        effective_weight(module)


def test_other_modules_are_not_quantised():
    assert not is_quantized(nn.Linear(3, 4))
    assert not is_quantized(nn.Identity())
    assert not is_quantized(nn.LayerNorm(4, elementwise_affine=False))
