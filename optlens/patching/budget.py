"""How much memory the runs of a sweep may take at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optlens import checks
from optlens.config import OPTConfig
from optlens.linear import SMALLEST_MATRIX, USE_ONEDNN
from optlens.memory import available_bytes, describe_bytes

# The rest is for gaps in the heap, and for the zeros that `rounded_up` adds.
PORTION_SHARE = 0.8
# oneDNN compiles a product for every number of tokens, and keeps it: 0.6 MB for each of three weight
# shapes. Under a budget some 15 numbers come up: `Wave` rounds them up to few (`rounded_up`), and the
# portions of path patching are alike.
COMPILED = 28 * 10**6
DEFAULT_BUDGET = 2**30  # bytes, where the system does not say what is free


def bytes_of(*runs: dict[str, list[Tensor]]) -> int:
    """Count the bytes of recorded values, those that share memory once."""
    tensors = [tensor for run in runs for layers in run.values() for tensor in layers]
    # not by address, which tensors without values do not have
    unique = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(unique.values())


def compiled_bytes(config: OPTConfig) -> int:
    """Return what compiled products take in a sweep under a budget.

    That is nothing where `optlens.linear` leaves products to PyTorch: on other processors, and in
    models of small matrices.
    """
    is_large = config.d_model * config.d_mlp >= SMALLEST_MATRIX
    return COMPILED if USE_ONEDNN and is_large else 0


def portion_budget(
    memory_budget: int | None,
    recorded: int,
    compiled: int,
    largest: int,
    devices: Iterable[torch.device],
    what: str,
) -> int:
    """Return the bytes that one portion of runs may take.

    Args:
        memory_budget: What the user allows beside the weights; half of what is free unless given.
        recorded: Bytes that the recorded runs take.
        compiled: Bytes that compiled products take (`compiled_bytes`).
        largest: Bytes of what cannot be divided, such as one patch of all prompts.
        devices: Where the runs take place; the one with least room counts.
        what: What that is, for the error.

    Raises:
        InputError: If the budget is no number.
        MemoryError: If the user allows less than is needed.
    """
    if memory_budget is None:
        known = [free for free in map(available_bytes, devices) if free is not None]
        return min(known) // 2 if known else DEFAULT_BUDGET
    if not isinstance(memory_budget, int | float) or isinstance(memory_budget, bool):
        raise checks.InputError(
            f"memory_budget={memory_budget!r}: give a number of bytes, such as 2 * 2**30 for two GiB."
        )
    left = memory_budget - recorded - compiled
    if left < largest:
        products = f", compiled matrix products {describe_bytes(compiled)}" if compiled else ""
        raise MemoryError(
            f"memory_budget={describe_bytes(memory_budget)} is too small: the recorded runs take "
            f"{describe_bytes(recorded)}{products} and one {what} {describe_bytes(largest)}. Give "
            "more, or take fewer prompts or shorter ones."
        )
    return share_of(left, largest)


def share_of(left: int, largest: int) -> int:
    """Return the bytes of one portion, where so many are left beside what is recorded."""
    return max(largest, int(left * PORTION_SHARE))
