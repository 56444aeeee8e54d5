"""What the tests of hooks share: small models, edits, and a look at what is attached."""

from __future__ import annotations

from typing import Any

import torch
from conftest import VARIANTS, random_model, tiny_config

from optlens.hooks import HookPoint
from optlens.model import OPTForCausalLM

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
Z, RESID = "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"


def build(
    variant: str = "pre_ln", dtype: torch.dtype = torch.float32, **more: Any
) -> OPTForCausalLM:
    return random_model(tiny_config(**VARIANTS[variant], **more), dtype)


def zero_in_place(value: torch.Tensor, hook: HookPoint) -> None:
    value.zero_()


def double(value: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return 2 * value


def exactly(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def listeners(model: OPTForCausalLM) -> dict[str, tuple]:
    """Everything that is attached anywhere."""
    attached = {}
    for name, point in model.hook_dict.items():
        lists = (point.editors, point.recorders, point.gradient_hooks)
        if any(lists) or point.listening or point.edited:
            attached[name] = tuple(tuple(entries) for entries in lists)
    return attached
