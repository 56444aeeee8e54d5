"""What a model will take before it is loaded: bytes, where they would lie, and whether they fit.

Everything follows from the config by arithmetic (`footprint`, `checkpoints.arrangement`), so it
answers at once for any size, and for machines that are only described.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from optlens.checkpoints.arrangement import (
    PROMPT_LENGTH,
    Arrangement,
    arrange,
    as_given,
    settle_dtype,
    streamed,
)
from optlens.checkpoints.placement import parse_dtype
from optlens.config import OPTConfig
from optlens.footprint import QUANTIZED, cache_bytes, forward_bytes
from optlens.plan_inputs import Stored, find_stored, memory_of
from optlens.plan_runs import Runs
from optlens.recording import WHAT

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM

RECORD_OPTIONS = ("what", "layers", "heads", "dtype", "device")
SWEEP_OPTIONS = ("site", "over", "memory_budget")


@dataclass(frozen=True)
class MemoryPlan:
    """What a model and runs on it will take. `print(plan)` reads well.

    Attributes:
        name: The model.
        dtype: Of weights and activations.
        quantize: "int8" or "nf4" if the blocks' matrices are quantised, else None.
        batch: Prompts.
        prompt_length: Tokens of each.
        weights: Bytes of the parameters.
        kv_cache: Bytes of all keys and values.
        activations: Most bytes that a forward pass holds beside weights and cache.
        recording: Bytes that a recording keeps; 0 if none is asked for.
        recording_run: Most bytes that its run holds beside weights and what is kept.
        sweep: Bytes that a patching sweep takes beside the weights; 0 if none is asked for.
        heap: Bytes of freed memory that the process keeps at the peak, where the CPU computes. Of a
            sweep it is an estimate: what its portions are bounded by.
        pinned: Bytes that a recording of a model on a GPU takes in main memory beyond its own, as
            PyTorch rounds buffers of pinned memory up to powers of two. Computed from PyTorch's
            source, not measured.
        memory: Device -> bytes that are free there, or stated; None where the system does not say.
        arrangement: Where the parts would go, and what each device would hold.
        advice: What to change if it does not fit, each of which would help; else nothing.
    """

    name: str
    dtype: torch.dtype
    quantize: str | None
    batch: int
    prompt_length: int
    weights: int
    kv_cache: int
    activations: int
    recording: int
    recording_run: int
    sweep: int
    heap: int
    pinned: int
    memory: dict[str, int | None]
    arrangement: Arrangement
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there is memory for all of it."""
        return self.arrangement.fits

    @property
    def per_device(self) -> dict[str, int]:
        """Bytes needed on each device, all together."""
        return self.arrangement.needed

    @property
    def total(self) -> int:
        """Bytes needed at the peak, on all devices together."""
        return sum(self.arrangement.needed.values())

    @property
    def placement(self) -> str:
        """How the model would be placed: "cuda:0", "cuda:0, cuda:1, cpu" or "stream on cpu"."""
        devices = ", ".join(self.arrangement.weights)
        return f"stream on {devices}" if self.arrangement.kind == "stream" else devices

    def load_options(self) -> dict[str, Any]:
        """Return what to give to `optlens.load` to get this.

        Example:
            >>> plan("opt-125m", device={"cpu": "4GB"}, dtype="float16").load_options()
            {'dtype': 'float16', 'device': 'cpu'}
        """
        options: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.quantize is not None:
            options["quantize"] = self.quantize
        if self.arrangement.kind == "several devices":
            options["device_map"] = self.arrangement.device_map
        else:
            options["device"] = next(iter(self.arrangement.weights))
        if self.arrangement.kind == "stream":
            options["device_map"] = "stream"
        return options

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON holds it."""
        names = ("name", "quantize", "batch", "prompt_length", "weights", "kv_cache", "activations")
        names += ("recording", "recording_run", "sweep", "heap", "pinned", "memory", "fits")
        names += ("placement",)
        facts = {name: getattr(self, name) for name in names}
        facts |= {"dtype": str(self.dtype).removeprefix("torch."), "total": self.total}
        facts |= {"per_device": self.per_device, "device_map": self.arrangement.device_map}
        return facts | {"advice": list(self.advice)}

    def __str__(self) -> str:
        """Show the plan as a table."""
        from optlens.plan_text import text_of_plan

        return text_of_plan(self)


def plan(
    model: OPTForCausalLM | OPTConfig | str | os.PathLike,
    device: Any = None,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    batch: int = 1,
    prompt_length: int = PROMPT_LENGTH,
    record: Any = None,
    sweep: Any = None,
    device_map: str | Mapping[str, str | int] | None = None,
) -> MemoryPlan:
    """Say what a model will take, where it would lie and whether it fits. Loads nothing.

    Args:
        model: A published size such as "opt-30b", a checkpoint folder, a config, or a model.
        device: Where it may go: a device; a table of memory, for machines that are elsewhere,
            such as `{"cuda:0": "24GiB", "cpu": "64GiB"}`; all that is here unless given.
        dtype: Of weights and activations; "auto" is what `optlens.load` would choose.
        quantize: "int8" or "nf4" for the matrices of the blocks.
        batch: Prompts.
        prompt_length: Tokens of each.
        record: What `model.record` would keep: True for its default, names, or a table of its
            options what, layers, heads, dtype and device.
        sweep: What `patch_sweep` would patch: a site, or a table of its options site, over and
            memory_budget. `batch` then counts pairs of prompts.
        device_map: A placement to judge instead of choosing one: "auto", "balanced", "stream", or
            a table as `optlens.load` takes it.

    Raises:
        ValueError: If an argument makes no sense.
        CheckpointError: If `model` is neither a published size nor a readable folder.

    Example:
        >>> needed = plan("opt-30b", device={"cuda:0": "24GiB", "cuda:1": "24GiB", "cpu": "64GiB"})
        >>> needed.placement, needed.fits
        ('cuda:0, cuda:1, cpu', True)
    """
    stored = find_stored(model)
    if quantize not in (None, *QUANTIZED):
        raise ValueError(f"quantize={quantize!r}: give {' or '.join(map(repr, QUANTIZED))}.")
    if not 1 <= prompt_length <= stored.config.n_ctx or batch < 1:
        raise ValueError(
            f"batch={batch} and prompt_length={prompt_length}: this model takes at least one prompt "
            f"of 1 to {stored.config.n_ctx} tokens."
        )
    memory = memory_of(device)
    runs = Runs(
        stored.config,
        torch.float32,
        quantize,
        batch,
        prompt_length,
        _record_options(record),
        _sweep_options(sweep),
    )
    runs = replace(runs, dtype=_choose_dtype(runs, dtype, stored, memory, device_map))
    found, demand = _arranged(runs, memory, device_map), runs.demand()
    return MemoryPlan(
        stored.name,
        runs.dtype,
        quantize,
        batch,
        prompt_length,
        sum(runs.modules().values()),
        cache_bytes(*runs.shape),
        forward_bytes(*runs.shape),
        runs.recording(),
        runs.recording_run(),
        runs.sweeping[0],
        demand.heap_on(found.weights),
        demand.pinned_from(found.weights),
        memory,
        found,
        () if found.fits else tuple(_advice(runs, memory, device_map, found)),
    )


def _arranged(
    runs: Runs, memory: dict[str, int | None], device_map: str | Mapping[str, str | int] | None
) -> Arrangement:
    demand = runs.demand()
    if isinstance(device_map, Mapping):
        return as_given(demand, device_map, memory)
    if device_map == "stream":
        if runs.quantize is not None:
            raise ValueError('device_map="stream" reads weights as they are: leave out quantize.')
        return streamed(demand, next(iter(memory)), memory)
    if device_map not in (None, "auto", "balanced"):
        raise ValueError(
            f'device_map={device_map!r}: give "auto", "balanced", "stream" or a table of modules.'
        )
    return arrange(demand, memory, runs.quantize is None, device_map or "auto")


def _choose_dtype(
    runs: Runs,
    dtype: str | torch.dtype,
    stored: Stored,
    memory: dict[str, int | None],
    device_map: str | Mapping[str, str | int] | None,
) -> torch.dtype:
    """Settle "auto", as `optlens.load` does."""
    parsed = parse_dtype(dtype)
    if parsed is not None:
        return parsed
    if stored.loaded:
        return stored.dtype
    return settle_dtype(
        stored.dtype,
        list(memory) != ["cpu"],
        lambda dtype: _arranged(replace(runs, dtype=dtype), memory, device_map),
    )


def _record_options(record: Any) -> dict[str, Any] | None:
    given = _table("record", record, "what", RECORD_OPTIONS)
    if given is None:
        return None
    options = dict.fromkeys(RECORD_OPTIONS) | {"what": WHAT, "device": "cpu"} | given
    if not isinstance(options["what"], str | Iterable):
        raise ValueError(f"record={record!r}: give True, names of what to record, or a table.")
    options["dtype"] = None if options["dtype"] is None else parse_dtype(options["dtype"])
    return options


def _sweep_options(sweep: Any) -> dict[str, Any] | None:
    return _table("sweep", sweep, "site", SWEEP_OPTIONS)


def _table(name: str, given: Any, first: str, options: Iterable[str]) -> dict[str, Any] | None:
    """Return an argument as a table of options: None for none, {} for True, a value as the first."""
    if given is None or given is False:
        return None
    given = {} if given is True else given
    table = dict(given) if isinstance(given, Mapping) else {first: given}
    unknown = sorted(set(table) - set(options))
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r} here; {', '.join(options)}.")
    return table


def _advice(
    runs: Runs,
    memory: dict[str, int | None],
    device_map: str | Mapping[str, str | int] | None,
    found: Arrangement,
) -> Iterable[str]:
    """Try one change after the other; yield those after which it fits."""
    half = next((d for d in (torch.bfloat16,) if runs.dtype.itemsize > 2), None)
    changes: list[tuple[str, dict[str, Any]]] = []
    if half is not None:
        changes.append(('dtype="bfloat16"', {"dtype": half}))
    changes += [
        (f'quantize="{kind}"', {"quantize": kind}) for kind in QUANTIZED if kind != runs.quantize
    ]
    if runs.batch > 1:
        changes.append(("batch=1", {"batch": 1}))
    if runs.pos > 64:
        changes.append((f"prompt_length={runs.pos // 4}", {"pos": runs.pos // 4}))
    if runs.record is not None:
        smaller = runs.record | {"dtype": torch.float16}
        changes.append(("recording in float16", {"record": smaller}))
        changes.append(("recording one layer", {"record": runs.record | {"layers": 0}}))
    on_disk = isinstance(device_map, Mapping) and "disk" in device_map.values()
    for text, change in changes:
        kind = None if device_map == "stream" and "quantize" in change else device_map
        if not on_disk or "quantize" not in change:
            if _arranged(replace(runs, **change), memory, kind).fits:
                yield text
    if device_map is not None and _arranged(runs, memory, None).fits:
        yield "device_map=None, which chooses a placement"
    lacking = ", ".join(
        f"{short / 1e9:.1f} GB on {device}" for device, short in found.short.items()
    )
    yield f"more memory: {lacking} are missing"
