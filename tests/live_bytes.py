"""Counting the bytes of tensors that are alive while code runs: exact, and the same in every run.

What a kernel allocates and frees inside is not seen, nor are the system's gaps; `benchmarks/planning.py`
compares with what the process really takes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that were made inside the block and are still held.

    Attributes:
        peak: Most bytes alive after any operation.
        now: Bytes alive after the last operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()

    @property
    def now(self) -> int:
        self._alive = {k: (ref, n) for k, (ref, n) in self._alive.items() if not ref.expired()}
        return sum(n for _, n in self._alive.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        before = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._key(tensor) not in before:
                storage = tensor.untyped_storage()
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.now)
        return out

    def _key(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata
