"""Fake GPUs beside a real CPU: for rehearsing runs on a machine without a GPU.

`FakeTensorMode` by itself makes every tensor a fake, those on the CPU too. On a real machine what
the host holds has values that Python may look at, and only what a GPU holds is out of sight. So
here operations on CPU tensors are done, and only those that meet a CUDA device are faked: tokens,
masks and tables are real until they are moved, and what is copied back from a GPU has no values.
Code that lets a GPU's values decide what to do next fails, as does a tensor on the wrong device.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from optlens import OPTForCausalLM
from optlens.config import OPTConfig

# Fake tensors on a GPU can be indexed, and copied from one to another, only by a build with CUDA.
needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a CUDA build of PyTorch, though no GPU"
)


class FakeGpus(FakeTensorMode):
    """Fakes tensors on CUDA devices and what is computed from them, and nothing else."""

    def __init__(self) -> None:
        """Let real CPU tensors, such as an index, meet fake ones."""
        super().__init__(allow_non_fake_inputs=True)
        self._inside = False  # of an operation that is faked by way of others

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Fake an operation if a fake tensor or a CUDA device is among its arguments."""
        given = tree_leaves((args, kwargs or {}))
        if not self._inside and not any(isinstance(x, FakeTensor) or _is_cuda(x) for x in given):
            return func(*args, **(kwargs or {}))
        before, self._inside = self._inside, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = before


def _is_cuda(given: Any) -> bool:
    return isinstance(given, torch.device) and given.type == "cuda"


def on_fake_gpu(config: OPTConfig, dtype: torch.dtype = torch.float32) -> OPTForCausalLM:
    """Return a model whose weights lie on a fake `cuda:0`; call it among fakes."""
    with torch.device("meta"):
        model = OPTForCausalLM(config).eval()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            fake = torch.empty(weight.shape, dtype=dtype, device="cuda:0")
            setattr(module, name, nn.Parameter(fake, requires_grad=False))
    model.tie_weights()
    return model
