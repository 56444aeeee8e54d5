"""Building a model without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from optlens.config import OPTConfig

Model = TypeVar("Model", bound=nn.Module)


class _SkipInit(TorchFunctionMode):
    """Leave out `torch.nn.init`: there is nothing to draw for weights that will be replaced.

    More than waste, drawing on the meta device makes PyTorch import its compiler, which takes
    longer than reading opt-125m.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the tensor that an initialiser was given; run everything else as it is."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(cls: type[Model], config: OPTConfig) -> Model:
    """Build a model on the meta device, where tensors have shapes but no memory."""
    with torch.device("meta"), _SkipInit():
        return cls(config)
