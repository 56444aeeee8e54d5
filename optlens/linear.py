"""Linear layers that use a CPU's whole vector width.

PyTorch computes float32 matrix products on x86 with Intel's MKL, which takes its widest
(AVX-512) kernels only on Intel's own processors. oneDNN, which PyTorch ships too and uses for
bfloat16 and for compiled models, takes them on all: on an AMD EPYC of 2024 it multiplies the same
float32 matrices 2.1 to 3 times as fast, with errors of the same size (`benchmarks/forward.py`).
`Linear` is `torch.nn.Linear` with that product where it helps, and PyTorch's own elsewhere.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# The operator's own cost (some 10 us) is worth paying from so many multiplications on,
SMALLEST_PRODUCT = 2_000_000
# and for a matrix of so many numbers even with a single row: reading them takes longer than that.
SMALLEST_MATRIX = 250_000


def _is_faster_here() -> bool:
    """Tell whether this is a processor whose AVX-512 units MKL leaves alone."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    cpu_info = Path("/proc/cpuinfo")
    vendor = cpu_info.read_text()[:1000] if cpu_info.exists() else platform.processor()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in vendor


USE_ONEDNN = _is_faster_here()


class Linear(nn.Linear):
    """`torch.nn.Linear`, by the faster of PyTorch's matrix products.

    Parameters, names, initial values and gradients are those of `torch.nn.Linear`; results agree
    to rounding.

    Example:
        >>> Linear(768, 3072)(torch.zeros(2, 5, 768)).shape
        torch.Size([2, 5, 3072])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`, `[..., out_features]`, of `x` `[..., in_features]`."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x weight^T + bias`, as `torch.nn.functional.linear` does.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.
    """
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)
    return _multiply(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether oneDNN's operator can stand in: plain numbers of real work, nothing watching.

    The operator knows nothing of autocast, of function transforms and of forward-mode gradients;
    dispatch modes (fake tensors, flop counters) and the compiler should meet the usual operator.
    """
    return (
        USE_ONEDNN
        and type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor)  # a subclass may be quantised
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.device.type == weight.device.type == "cpu"
        and x.ndim > 1
        and x.shape[-1] == weight.shape[1]
        and (weight.numel() >= SMALLEST_MATRIX or x.numel() * weight.shape[0] >= SMALLEST_PRODUCT)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not is_in_torch_dispatch_mode()
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """The product and its gradients, which are such products again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if wanted_x else None,
            linear(rows.t(), x.flatten(0, -2).t()) if wanted_weight else None,
            rows.sum(0) if wanted_bias else None,
        )
