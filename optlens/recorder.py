"""The tensors of a recording, filled by recorders at hook points, in one pass or in many.

Every kept value is copied at once into a tensor laid out for the user (`[layer, head, query, key]`
and so on), so a recording holds no more than was asked for, and its size is known beforehand. From
a GPU to the host copies go into pinned memory, and are waited for only at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import allocator, checks, pinned
from optlens.hooks import HookPoint
from optlens.interventions import provenance
from optlens.interventions.values import PerDevice
from optlens.memory import available_bytes, describe_bytes
from optlens.names import get_act_name, is_full_name, shape_of, spec_of
from optlens.recording import FINAL, WHAT, Recording, fingerprint
from optlens.selection import Selection, resolve_what, select

if TYPE_CHECKING:
    from optlens.config import OPTConfig
    from optlens.model import OPTForCausalLM

STORAGE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What attention says of keys that come later: nothing.
UNSEEN = {"pattern": 0.0, "attn_scores": -torch.inf}


@dataclass
class _Slot:
    """Where one hook's value goes: `target[:, row]`, after selecting heads and positions."""

    target: Tensor
    row: int
    axes: list[str]  # of the hook's value
    filled: bool = False


class Recorder:
    """Keeps what was asked for, of one text or a batch of texts.

    Attributes:
        points: The hook points to listen to; `keep` is what to attach there.
        first: The column of the text in which the pass that is under way begins.
        what: What is recorded.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        what: Any,
        layers: Selection,
        heads: Selection,
        shape: tuple[int, int],
        columns: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        in_parts: bool = False,
    ) -> None:
        """Set memory aside.

        Args:
            model: The model.
            what: As for `optlens.record`, like layers, heads, dtype and device.
            layers: Which blocks.
            heads: Which heads.
            shape: How many texts, and how many tokens each may have.
            columns: Which columns to keep, `[batch, n]`; None for all.
            dtype: What to store in; the model's unless given.
            device: Where to store.
            in_parts: Whether the columns come in several passes.

        Raises:
            InputError: If a selection does not fit the model.
            UnknownHookError: If `what` names no hook.
            MemoryError: If it would not fit.
        """
        config = model.config
        self.what = resolve_what(what, config)
        self.dtype, self.device = _storage_dtype(dtype, model), device
        self.layers = select(layers, config.n_layers, "layers")
        self.heads = select(heads, config.n_heads, "heads")
        plan = plan_of(self.what, config, self.layers, self.heads, shape, columns)
        if FINAL in plan:
            _check_final_norm(model)
        _check_fits(plan, self.dtype, device)
        if torch.device(device).type == "cpu":
            allocator.reserve(plan_bytes(plan, self.dtype))
        self.model, self.first, self._columns = model, 0, columns
        self._columns_on = None if columns is None else PerDevice(columns)
        self._tensors: dict[str, Tensor] = {}
        self._slots: dict[str, list[_Slot]] = {}
        for name, (size, hooks) in plan.items():
            self._tensors[name] = self._set_aside(size)
            kind = hooks[0].rpartition("hook_")[2]
            if in_parts and kind in UNSEEN:
                self._tensors[name].fill_(UNSEEN[kind])
            for row, hook in enumerate(hooks):
                slot = _Slot(self._tensors[name], row, spec_of(hook).shape.split())
                self._slots.setdefault(hook, []).append(slot)
        self.points = model.match_hooks(list(self._slots))
        all_heads = self.heads == list(range(config.n_heads))
        self._head_index = None if all_heads else PerDevice(torch.tensor(self.heads))
        self._ordered: set[torch.device] = set()  # where copies may still be on their way from
        self._infinite: dict[str, list[Tensor]] = {}  # as computed, and as stored

    def _set_aside(self, size: tuple[int, ...]) -> Tensor:
        if torch.device(self.device).type != "cpu":
            return torch.empty(size, dtype=self.dtype, device=self.device)
        return pinned.host_tensor(size, self.dtype, self.model.device)

    @property
    def listens_behind_blocks(self) -> bool:
        """Whether the final LayerNorm is recorded."""
        return any(name.startswith("ln_final") for name in self._slots)

    def keep(self, value: Tensor, hook: HookPoint) -> None:
        """Copy a hook's value to where it belongs; a recorder for `points`."""
        for slot in self._slots[hook.name]:
            part, target = value, slot.target.select(1, slot.row)
            for axis, name in enumerate(slot.axes):
                if name == "head" and self._head_index is not None:
                    part = part.index_select(axis, self._head_index.on(value.device))
                elif name in ("pos", "query") and self._columns is not None:
                    part = _take_positions(part, axis, self._columns_on.on(value.device))
                elif name in ("pos", "query", "key") and part.shape[axis] < target.shape[axis]:
                    start = 0 if name == "key" else self.first
                    target = target.narrow(axis, start, part.shape[axis])
            if len(part) < len(target):  # a prompt is run once, however many texts continue it
                part = part.repeat_interleave(len(target) // len(part), 0)
            narrows = torch.finfo(target.dtype).max < torch.finfo(part.dtype).max
            if part.device.type == "cuda" and slot.target.is_pinned():
                kept = part.to(target.dtype) if narrows else part  # the copy is not there yet
                pinned.copy_later(target, kept)
                self._ordered.add(part.device)
            else:
                kept = target.copy_(part)
            slot.filled = True
            if narrows:
                counts = torch.stack([part.isinf().sum().to(kept.device), kept.isinf().sum()])
                self._infinite.setdefault(hook.name, []).append(counts)

    def recording(
        self, tokens: Tensor, real: Tensor, positions: list[int], is_batch: bool
    ) -> Recording:
        """Wrap what was kept; hook functions that acted must still be attached.

        Args:
            tokens: What was run, `[batch, pos]`; may be less than memory was set aside for.
            real: True at real tokens, likewise.
            positions: What the recorded positions are to be called.
            is_batch: Whether the recording has a batch axis.

        Raises:
            RuntimeError: If a hook never fired.
            InputError: If a value does not fit the dtype.
        """
        pinned.wait_for(self._ordered)
        _check_kept(self._slots, self._infinite)
        facts = _metadata(self.model, tokens, real, self.what)
        columns = self._columns
        if columns is None:
            columns = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        tensors = {name: self._cut(name, tokens.shape[1]) for name in self._tensors}
        for name in tensors:
            if name == FINAL or is_full_name(name):
                tensors[name] = tensors[name][:, 0]  # one hook is one row
        tensors |= {"tokens": tokens.to(self.device), "mask": real.to(self.device)}
        facts |= {"layers": self.layers, "heads": self.heads, "positions": positions}
        facts |= {"columns": columns.tolist(), "is_batch": is_batch, "dtype": str(self.dtype)}
        return Recording(tensors, facts, self.model)

    def _cut(self, name: str, length: int) -> Tensor:
        """Return a tensor without the memory for tokens that did not come."""
        tensor = self._tensors[name]
        if self._columns is not None:
            return tensor
        slots = [slot for places in self._slots.values() for slot in places]
        axes = next(slot.axes for slot in slots if slot.target is tensor)
        cut = tensor
        for axis, kind in enumerate(axes):
            if kind in ("pos", "query", "key"):
                cut = cut.narrow(axis + (axis > 0), 0, length)  # behind the axis of rows
        return cut.contiguous()


# ------------------------------------------------------------------------------ what to keep

Plan = dict[str, tuple[tuple[int, ...], list[str]]]


def plan_of(
    wanted: list[str],
    config: OPTConfig,
    layers: list[int],
    heads: list[int],
    shape: tuple[int, ...],
    columns: Tensor | None,
) -> Plan:
    """Lay out the tensors to fill: name to shape and to the hooks that fill its rows.

    A name of the result is "attention", "residual", `FINAL`, a short or a full hook name.
    """
    batch, pos = shape
    rows: dict[str, list[str]] = {}
    if "attention" in wanted:
        rows["attention"] = [get_act_name("pattern", layer) for layer in layers]
    last = get_act_name("resid_post", config.n_layers - 1)
    if "residual" in wanted or "logit_lens" in wanted:
        after = [get_act_name("resid_post", layer) for layer in layers]
        rows["residual"] = [get_act_name("resid_pre", 0), *after]
        rows[FINAL] = [last]
    for name in wanted:
        if is_full_name(name):
            rows[name] = [name]
        elif name not in WHAT:
            rows[name] = [get_act_name(name, layer) for layer in layers]
    n_pos = pos if columns is None else columns.shape[1]
    sizes = {"pos": n_pos, "query": n_pos, "head": len(heads)}
    plan: Plan = {}
    for name, hooks in rows.items():
        full = shape_of(hooks[0], config, batch, pos)
        axes = spec_of(hooks[0]).shape.split()
        inner = [sizes.get(axis, n) for axis, n in zip(axes, full, strict=True)]
        plan[name] = ((inner[0], len(hooks), *inner[1:]), hooks)
    return plan


def plan_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Return how many bytes a plan takes in a dtype."""
    return sum(torch.Size(shape).numel() for shape, _ in plan.values()) * dtype.itemsize


def _check_fits(plan: Plan, dtype: torch.dtype, device: torch.device | str) -> None:
    needed, free = plan_bytes(plan, dtype), available_bytes(device)
    if free is not None and needed > free:
        allocator.release()  # what the process itself holds ready counts as free
        free = available_bytes(device)
    if free is not None and needed > free:
        largest = max(plan, key=lambda name: torch.Size(plan[name][0]).numel())
        smaller = " or dtype=torch.float16" if dtype.itemsize > 2 else ""
        raise MemoryError(
            f"This recording would take {describe_bytes(needed)}, but {device} has "
            f"{describe_bytes(free)} free. Most of it is {largest!r}: choose fewer layers=, heads= "
            f"or pos=,{smaller} or leave it out of what=."
        )


def _storage_dtype(dtype: torch.dtype | None, model: OPTForCausalLM) -> torch.dtype:
    if dtype is not None and dtype not in STORAGE:
        raise checks.InputError(
            f"dtype={dtype!r} cannot hold activations; store them in one of "
            f"{', '.join(map(str, STORAGE))}."
        )
    return model.dtype if dtype is None else dtype


def _check_final_norm(model: OPTForCausalLM) -> None:
    """Refuse interventions behind the residual stream, from which logits and lens are computed."""
    edited = [n for n, p in model.hook_dict.items() if n.startswith("ln_final") and p.editors]
    if edited:
        raise checks.InputError(
            f"A hook function is attached to {edited[0]!r}, but a recording's logits and lens are "
            "computed from its residual stream without it. Remove it; or leave 'residual' and "
            "'logit_lens' out of what=, and take the logits from model.run_with_hooks."
        )


# --------------------------------------------------------------------------- what was kept


def _check_kept(slots: dict[str, list[_Slot]], infinite: dict[str, list[Tensor]]) -> None:
    """Check that every slot was filled, and with what was computed."""
    silent = [name for name, places in slots.items() if not all(slot.filled for slot in places)]
    if silent:
        raise RuntimeError(
            f"Nothing was computed at {', '.join(map(repr, silent[:3]))}: was a layer of the model "
            "replaced by one without hooks? Leave it out with layers= or what=."
        )
    for name, counts in infinite.items():
        total = checks.on_host(sum(counts))
        computed, stored = (0, 0) if total is None else total.tolist()
        if computed != stored:
            dtype = slots[name][0].target.dtype
            raise checks.InputError(
                f"The values at {name!r} do not fit in {dtype}, whose largest is "
                f"{torch.finfo(dtype).max:.5g}; store them in dtype=torch.float32"
                + (" or torch.bfloat16." if dtype == torch.float16 else ".")
            )


def _take_positions(value: Tensor, axis: int, columns: Tensor) -> Tensor:
    """Select columns `[batch, n]` along an axis, each prompt its own."""
    index_shape = [columns.shape[0], *[1] * (value.ndim - 1)]
    index_shape[axis] = columns.shape[1]
    size = list(value.shape)
    size[axis] = columns.shape[1]
    return value.gather(axis, columns.view(index_shape).expand(size))


def _metadata(
    model: OPTForCausalLM, tokens: Tensor, real: Tensor, what: list[str]
) -> dict[str, Any]:
    """Say where a recording comes from."""
    tokenizer = model.tokenizer
    ids = tokens.tolist()
    unpadded = [row[keep].tolist() for row, keep in zip(tokens, real, strict=True)]
    if tokenizer is None:
        texts = [[f"⟨{token}⟩" for token in row] for row in ids]
        prompts = ["".join(f"⟨{token}⟩" for token in row) for row in unpadded]
        labels = {}
    else:
        texts = [tokenizer.to_str_tokens(row) for row in ids]
        prompts = [tokenizer.decode(row) for row in unpadded]
        labels = {str(token): tokenizer.display(token) for row in ids for token in row}
    return {
        "what": what,
        "prompts": prompts,
        "str_tokens": texts,
        "labels": labels,
        "config": model.config.to_dict(),
        "fingerprint": fingerprint(model),
        "model_dtype": str(model.dtype),
        "versions": {"optlens": _version(), "torch": torch.__version__},
        "seed": torch.initial_seed(),
        "edited_hooks": model.edited_hooks,
        "interventions": provenance(model),
    }


@cache  # a search through the installed packages
def _version() -> str:
    try:
        return version("optlens")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
