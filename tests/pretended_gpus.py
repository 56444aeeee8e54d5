"""Pretended GPUs that compute: tensors that say that they lie on `pretended:1`, and have their values.

Fake tensors know where they are and not what they hold, so runs in which values decide what is done
next (beams, texts that end, neurons that fire) cannot be rehearsed with them. Here the values are
computed on the CPU, behind tensors that claim another device and refuse to meet those of a third.

The device's name is registered with PyTorch for the whole process: use this in one of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

TYPE = "pretended"
REGISTER = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
aten = torch.ops.aten
# An index may lie on the CPU, as with a real GPU.
_TAKES_INDICES = (aten.index, aten.index_put, aten.index_put_)


class _Backend:
    """What PyTorch asks of a kind of device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 4

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


class Pretended(Tensor):
    """A tensor on a pretended device; `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: Any = None, requires_grad: bool = False) -> Tensor:
        """Wrap a CPU tensor; accelerate calls it as it calls `Parameter`, with one that is wrapped."""
        if isinstance(inner, Pretended):
            inner, device = inner.detach().inner, inner.device
        elif device is None:
            return torch.nn.Parameter(inner, requires_grad=requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Do by way of operators what Python does with memory or a driver."""
        own = {
            Tensor.__getitem__: _get,
            Tensor.__setitem__: _set,
            Tensor.tolist: lambda x: inner_of(x).tolist(),
            Tensor.data_ptr: lambda x: inner_of(x).data_ptr(),
            Tensor.untyped_storage: lambda x: inner_of(x).untyped_storage(),
            Tensor.is_pinned: lambda x: False,
            Tensor.__iter__: lambda x: iter(x.unbind(0)),
        }
        if func in own:
            return own[func](*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Compute on the CPU."""
        return _compute(func, args, kwargs or {})


class PretendedGpus(TorchDispatchMode):
    """Lets tensors be made on pretended devices, and moved there."""

    def __enter__(self) -> PretendedGpus:
        """Register the device, and have PyTorch's makers of tensors make them on it."""
        REGISTER(TYPE, backend_module=_Backend())
        tensor, as_tensor = torch.tensor, torch.as_tensor
        torch.tensor = lambda data, *args, device=None, **options: _placed(
            tensor(data, *args, **options), device
        )
        torch.as_tensor = lambda data, *args, device=None, **options: _placed(
            data if isinstance(data, Pretended) else as_tensor(data, *args, **options), device
        )
        torch.Generator = _HostGenerator
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Compute on the CPU whatever meets a pretended device."""
        kwargs = kwargs or {}
        met = any(isinstance(leaf, Pretended) for leaf in tree_leaves((args, kwargs)))
        if met or _is_pretended(kwargs.get("device")):
            return _compute(func, args, kwargs)
        return func(*args, **kwargs)


class _HostGenerator(torch.Generator):
    """Draws on the CPU, for whatever device."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        """Make one of the CPU."""
        return super().__new__(cls, "cpu")


def inner_of(value: Any) -> Any:
    """Return the CPU tensor behind a pretended one; anything else as it is."""
    return value.detach().inner if isinstance(value, Pretended) else value


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == TYPE


def _placed(value: Tensor, device: Any) -> Tensor:
    return value if device is None else value.to(device)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """Do an operation with the values, and wrap what comes out."""
    if func.overloadpacket is aten._to_copy:
        return _moved(func, args[0], dict(kwargs))
    if func.overloadpacket is aten.copy_:
        _inner(args[0]).copy_(_inner(args[1]))
        return args[0]
    strict = [args[0], *args[2:3]] if func.overloadpacket in _TAKES_INDICES else (args, kwargs)
    tensors = [leaf for leaf in tree_leaves(strict) if isinstance(leaf, Tensor)]
    places = {t.device for t in tensors if t.ndim or t.device.type != "cpu"}
    if len(places) > 1:
        names = ", ".join(sorted(map(str, places)))
        raise RuntimeError(f"{func} was given tensors on different devices: {names}")
    given = kwargs.get("device")
    place = torch.device(given) if given is not None else next(iter(places))
    options = kwargs if given is None else kwargs | {"device": "cpu"}
    out = func(*tree_map(_inner, args), **tree_map(_inner, options))
    before = {id(_inner(leaf)): leaf for leaf in tree_leaves((args, kwargs))}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or not _is_pretended(place):
            return value
        return before[id(value)] if id(value) in before else Pretended(value, place)

    return tree_map(wrap, out)


def _moved(func: Any, source: Tensor, options: dict) -> Tensor:
    given, _ = options.pop("device", None), options.pop("pin_memory", None)
    place = source.device if given is None else torch.device(given)
    if place.type == "meta":
        return torch.empty(source.shape, dtype=options.get("dtype") or source.dtype, device=place)
    out = func(_inner(source), **options)
    return Pretended(out, place) if _is_pretended(place) else out


# ------------------------------------------------------------------ indexing, which asks a driver


def _chosen(x: Tensor, index: Any) -> tuple[Tensor, list | None]:
    """Take numbers and slices of an index; return what is left of it, for its tensors."""
    index = list(index) if isinstance(index, tuple) else [index]
    index = [torch.tensor(i) if isinstance(i, list | range) else i for i in index]
    axes = [i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in index]
    used = sum(n for i, n in zip(index, axes, strict=True) if i is not None and i is not Ellipsis)
    view, axis, tensors = x, 0, {}
    for i, n in zip(index, axes, strict=True):
        if i is None:
            view, axis = view.unsqueeze(axis), axis + 1
        elif i is Ellipsis:
            axis += x.ndim - used
        elif isinstance(i, slice):
            view, axis = aten.slice.Tensor(view, axis, i.start, i.stop, i.step or 1), axis + 1
        elif isinstance(i, Tensor) and (i.ndim or i.dtype == torch.bool):
            tensors[axis], axis = i, axis + n
        else:
            view = aten.select.int(view, axis, int(i))
    if not tensors:
        return view, None
    filled: list = []
    for at in sorted(tensors):
        before = sum(i.ndim if i is not None and i.dtype == torch.bool else 1 for i in filled)
        filled += [None] * (at - before) + [tensors[at]]
    return view, filled


def _get(x: Tensor, index: Any) -> Tensor:
    view, tensors = _chosen(x, index)
    return aten.alias.default(view) if tensors is None else aten.index.Tensor(view, tensors)


def _set(x: Tensor, index: Any, value: Any) -> None:
    view, tensors = _chosen(x, index)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=x.dtype)
    if tensors is None:
        view.copy_(value)
    else:
        value = value.to(x.device) if value.ndim == 0 else value
        aten.index_put_.default(view, tensors, value)
