"""Reading linear modules whose weights are kept in 8 or 4 bits by bitsandbytes.

Such a module is called like any other. Its `.weight` holds codes: what they stand for is computed
here. The package bitsandbytes is needed only to make such modules, and to decode 4 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optlens.weight_sample import weight_sample

INT8_LEVELS = 127  # a row's largest magnitude is this code


def is_int8(weight: Tensor | None) -> bool:
    """Tell whether a weight is one that bitsandbytes holds in 8 bits."""
    return isinstance(weight, Tensor) and weight.dtype == torch.int8 and hasattr(weight, "SCB")


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a module is one of bitsandbytes' that hold their weight as codes.

    Example:
        >>> is_quantized(nn.Linear(2, 3))
        False
    """
    if hasattr(module, "base_layer"):  # an adapter around one, which shows its weight as its own
        return False
    weight = getattr(module, "weight", None)
    return is_int8(weight) or getattr(weight, "quant_state", None) is not None


def dequantized_weight(module: nn.Module) -> Tensor:
    """Return the matrix by which a quantised module multiplies, `[out, in]`.

    Its dtype is the bias's, where there is one, else the one that the weight had.

    Raises:
        TypeError: If its codes are in an order that only a kernel for one processor reads.
    """
    if is_int8(module.weight):
        scales = _scales(module).unsqueeze(1) / INT8_LEVELS
        return (_codes(module).to(scales.dtype) * scales).to(_dtype(module))
    from bitsandbytes.functional import dequantize_4bit

    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise TypeError(
            "Cannot read the weight of a Linear4bit whose codes bitsandbytes has rearranged for the "
            "CPU; set support_avx512bf16_for_cpu = False on it before it runs, as "
            'optlens.load(quantize="nf4") does.'
        )
    return dequantize_4bit(module.weight.data, state).view(state.shape).to(_dtype(module))


def quantized_sample(module: nn.Module) -> Tensor:
    """Return `weight_sample` of the dequantised weight, of 8 bits without decoding all of it."""
    if not is_int8(module.weight):
        return weight_sample(dequantized_weight(module))
    codes, scales = _codes(module), _scales(module)
    rows = torch.arange(len(codes), device=codes.device).unsqueeze(1).expand(codes.shape)
    return weight_sample(codes) * (scales / INT8_LEVELS)[weight_sample(rows)]


def _codes(module: nn.Module) -> Tensor:
    return module.weight.data


def _scales(module: nn.Module) -> Tensor:
    """Return each row's largest magnitude, which moves to the module when it first runs."""
    own = module.weight.SCB
    return module.state.SCB if own is None else own


def _dtype(module: nn.Module) -> torch.dtype:
    if module.bias is not None:
        return module.bias.dtype
    if getattr(module.weight, "quant_state", None) is not None:
        return module.weight.quant_state.dtype
    return getattr(module, "dtype_before", torch.float16)
