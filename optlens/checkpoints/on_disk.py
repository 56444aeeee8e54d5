"""Parameters whose values are on the disk: they have a shape and a dtype, and can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from optlens.checkpoints.errors import CheckpointError

# What may be asked of a tensor without values, beside its attributes.
_ANSWERED = {
    "size",
    "dim",
    "numel",
    "element_size",
    "stride",
    "is_floating_point",
    "is_complex",
    "__len__",
    "__hash__",
    "__repr__",
}
# Attributes that lead to tensors, of which PyTorch would make silent nothings.
_VALUES = {Tensor.data, Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.real}


class StreamError(CheckpointError):
    """Something that a model streamed from disk cannot do; the message says what can."""


class OnDisk(nn.Parameter):
    """Stands where a weight would be, while the weight is on the disk.

    Shape, dtype and size are the weight's. Computing with it raises, where a tensor on the meta
    device would give another one without values.
    """

    _name: str
    _read: Callable[[], Tensor]
    _sample: Callable[[], Tensor]

    @classmethod
    def make(
        cls,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        read: Callable[[], Tensor],
        sample: Callable[[], Tensor],
    ) -> OnDisk:
        """Make one.

        Args:
            name: What to call the weight in messages.
            shape: The weight's.
            dtype: The dtype in which the model computes with it.
            read: Gives the values.
            sample: Gives what `optlens.weight_sample` makes of them.
        """
        made = cls(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        made._name, made._read, made._sample = name, read, sample
        return made

    def read(self) -> Tensor:
        """Return the values, read from the disk."""
        return self._read()

    def sample(self) -> Tensor:
        """Return `optlens.weight_sample` of the values."""
        return self._sample()

    def __deepcopy__(self, memo: dict) -> OnDisk:
        raise self._refusal("copied")

    def __reduce_ex__(self, protocol: int) -> Any:
        raise self._refusal("pickled")

    def _refusal(self, verb: str) -> StreamError:
        return StreamError(
            f"{self._name} is on the disk and cannot be {verb}: this model is streamed, and its "
            "weights are in memory only while their block runs. optlens.weights.effective_weight("
            'module) reads one to look at; to change or copy weights, load without device_map="stream".'
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what shape and dtype can, and refuse the rest."""
        name = getattr(func, "__name__", str(func))
        owner = getattr(func, "__self__", None)
        is_attribute = name == "__get__" and owner not in _VALUES
        stays = name == "requires_grad_" and [*args[1:], *(kwargs or {}).values()] == [False]
        if is_attribute or stays or name in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        one = _first(cls, [*args, *(kwargs or {}).values()])
        if name in ("__get__", "__set__"):
            name = getattr(owner, "__name__", name)
        raise one._refusal(f"used (by {name})")


def _first(cls: type, values: Iterable[Any]) -> Any:
    """Return the first value of a class, also from lists in lists."""
    for value in values:
        found = _first(cls, value) if isinstance(value, list | tuple) else value
        if isinstance(found, cls):
            return found
    return None
