"""Dividing a model's blocks among devices, by the package accelerate.

Accelerate puts hooks of its own on the modules: what a block is given goes to the block's device
first, and weights that are kept elsewhere ("cpu" beside GPUs, "disk") are fetched for as long as a
module runs. So the residual stream walks from device to device, and every hook function and
recorder gets its tensor where the block is.

A block is never divided, and the embeddings stay together: inside, tensors are added to each other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from optlens.checkpoints.arrangement import (
    FRONT,
    PROMPT_LENGTH,
    Arrangement,
    Demand,
    arrange,
    as_given,
    settle_dtype,
    spell_out,
)
from optlens.checkpoints.errors import CheckpointError
from optlens.checkpoints.layout import canonical
from optlens.checkpoints.matching import EMBEDDING, Places
from optlens.checkpoints.placement import free_memory, parse_device, weight_bytes
from optlens.checkpoints.read import Weights
from optlens.config import OPTConfig
from optlens.footprint import cache_bytes, forward_bytes, forward_heap_bytes
from optlens.memory import describe_bytes

RULES = ("auto", "balanced", "stream")
DeviceMap = str | Mapping[str, Any] | None
_UNIT = re.compile(r"decoder\.layers\.\d+|decoder\.\w+|\w+")
_FRONT = tuple(name.removeprefix("model.") for name in FRONT)


class Placement:
    """Which device each part of a model is on.

    Attributes:
        devices: Part ("decoder.layers.3", "lm_head") to device, as text; also "disk".
        no_saving: Why the model cannot be saved, None if it can.
        no_attribution: Why attribution, circuits and path patching do not run, None if they do.
    """

    def __init__(self, devices: dict[str, str], note: object = None) -> None:
        """Describe a finished placement, and how weights are kept, if not plainly."""
        self.devices, self.note = devices, note
        self.main = devices[_FRONT[0]]
        # what is on the CPU beside a GPU is lent to the GPU while it runs
        lends = "disk" in devices.values() or (self.main != "cpu" and "cpu" in devices.values())
        self.no_saving = getattr(note, "no_saving", None)
        if lends:
            self.no_saving = (
                "This model has parts that are on the disk or lent to a GPU, and is not saved from "
                "there. Copy the checkpoint that it was loaded from, or load without device_map=."
            )
        # what is on the disk, or on the CPU beside a GPU, is computed on the main device
        lent = ("cpu", "disk") if lends else ()
        several = len({self.main if d in lent else d for d in devices.values()}) > 1
        self.no_attribution = (
            "Attribution, circuits and path patching need all blocks on one device, but this model "
            f'is divided: {self}. Load it on one device, or with device_map="stream"; here '
            "patch_sweep, ablate_sweep, knockout_sweep, causal_trace, record and intervene work."
            if several
            else None
        )

    def __str__(self) -> str:
        """Say what is where, for `model.summary()`."""
        blocks: dict[str, list[int]] = {}
        for part, device in self.devices.items():
            if ".layers." in part:
                blocks.setdefault(device, []).append(int(part.rpartition(".")[2]))
        runs = [f"blocks {_ranges(numbers)} on {device}" for device, numbers in blocks.items()]
        kept = "" if self.note is None else f"; {self.note}"
        return f"embeddings on {self.main}, {', '.join(runs)}{kept}"


def check_device_map(device_map: DeviceMap, device: str | torch.device) -> None:
    """Check the option before anything is downloaded or read.

    Raises:
        ValueError: If it is none, or contradicts `device`.
        CheckpointError: If accelerate is needed and not installed.
    """
    if device_map is None or device_map == "stream":
        return
    if not isinstance(device_map, Mapping) and device_map not in RULES:
        raise ValueError(
            f"device_map={device_map!r} is none of {', '.join(map(repr, RULES))}, nor a dict from "
            'module names to devices, such as {"": "cuda:0", "decoder.layers.11": "cpu"}.'
        )
    if device != "auto":
        raise ValueError(
            f"device={device!r} asks for one device and device_map={device_map!r} for several; "
            'give one of the two. (With device_map="stream", device= says where blocks run.)'
        )
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"device_map={device_map!r} needs the package accelerate, which cannot be imported: "
            f"{error}. Install it with `pip install 'optlens[multi-gpu]'`; device_map=\"stream\" "
            "and a single device= work without it."
        ) from error


def units_of(places: Places) -> dict[str, list[str]]:
    """Return the parts that are placed whole, each with its canonical parameter names."""
    units: dict[str, list[str]] = {}
    for name, at in places.items():
        units.setdefault(_UNIT.match(name)[0], []).append(name)
        if len(at) > 1:
            units.setdefault("lm_head", [])  # tied: it has no weight of its own
    return units


def check_together(devices: Mapping[str, str], tied: bool) -> None:
    """Refuse a placement in which tensors that are added together would be apart.

    Raises:
        ValueError: Naming the parts.
    """
    front = {unit: devices[unit] for unit in _FRONT if unit in devices}
    if len(set(front.values())) > 1:
        raise ValueError(
            f"device_map divides the embeddings: {front}. They are added to each other; place "
            f"{', '.join(front)} on one device."
        )
    main = devices[_FRONT[0]]
    if main == "disk":
        raise ValueError(
            'device_map puts the embeddings on "disk", but they say where runs begin; place them '
            'on a GPU or "cpu", or give device_map="stream".'
        )
    if tied and devices["lm_head"] != main:
        raise ValueError(
            f"lm_head is the embedding itself in this model, so it cannot be on "
            f"{devices['lm_head']} while decoder.embed_tokens is on {main}; place both alike."
        )


class Resolved(NamedTuple):
    """Where a model goes.

    Attributes:
        devices: Part -> device; None if its blocks are streamed.
        device: Where it is streamed to, or where its embeddings are.
        dtype: In which dtype.
    """

    devices: dict[str, str] | None
    device: torch.device
    dtype: torch.dtype


def resolve(
    device_map: DeviceMap,
    places: Places,
    stored: Mapping[str, str],
    weights: Weights,
    config: OPTConfig,
    dtype: torch.dtype | None,
    quantize: str | None = None,
) -> Resolved:
    """Settle where the parts of a model go, and in which dtype, as `optlens.plan` foretells it.

    Args:
        device_map: "auto", "balanced" or a table.
        places: The model's parameters by canonical name.
        stored: Canonical parameter name to that of the stored tensor.
        weights: The checkpoint.
        config: Its config.
        dtype: What was asked for, None for "auto".
        quantize: How the blocks' matrices are kept.

    Raises:
        CheckpointError: If a part is to be read from the disk and cannot be, or nothing fits.
        ValueError: If a table does not suit the model.
    """
    units = units_of(places)
    tied = "lm_head" in units and not units["lm_head"]
    memory, given = free_memory(), None
    if isinstance(device_map, Mapping):
        given = spell_out(device_map, units)
        check_together(given, tied)
        used = [str(parse_device(name)) for name in {*given.values()} - {"disk"}]
        memory = {name: memory.get(name) for name in used}

    def arranged(dtype: torch.dtype) -> Arrangement:
        demand = _demand(units, places, config, dtype, quantize, tied)
        if given is not None:
            return as_given(demand, given, memory)
        return arrange(demand, memory, quantize is None, device_map)

    kept_as = weights.specs[stored[EMBEDDING]].dtype
    chosen = dtype or settle_dtype(kept_as, set(memory) != {"cpu"}, arranged)
    found = arranged(chosen)
    if given is None and not found.fits:
        raise CheckpointError(_too_large(found, chosen))
    if found.kind == "stream":
        return Resolved(None, torch.device(next(iter(found.weights))), chosen)
    devices = spell_out(found.device_map, units)
    if "disk" in devices.values() and weights.layout.format != "safetensors":
        raise CheckpointError(
            'device_map leaves parts on the "disk", from where only safetensors are read, but '
            f"{weights.layout.folder} holds {weights.layout.files[0].name}. Write it anew with "
            "`optlens convert`, or place all parts elsewhere."
        )
    return Resolved(devices, torch.device(devices[_FRONT[0]]), chosen)


def _demand(
    units: Mapping[str, list[str]],
    places: Places,
    config: OPTConfig,
    dtype: torch.dtype,
    quantize: str | None,
    tied: bool,
) -> Demand:
    """Count the parts of a model, and a run of a prompt on it."""
    shape = config, 1, min(PROMPT_LENGTH, config.n_ctx), dtype.itemsize
    modules = {
        f"model.{unit}" if unit.startswith("decoder.") else unit: weight_bytes(
            {name: places[name] for name in names}, dtype, quantize
        )
        for unit, names in units.items()
    }
    working, heap = forward_bytes(*shape), forward_heap_bytes(*shape)
    return Demand(modules, cache_bytes(*shape), working, 0, tied, heap)


def _too_large(found: Arrangement, dtype: torch.dtype) -> str:
    lacking = ", ".join(
        f"{describe_bytes(short)} more on {device}" for device, short in found.short.items()
    )
    return (
        f"The model in {dtype} and a run of {PROMPT_LENGTH} tokens fit nowhere: they need {lacking}. "
        'Try a smaller dtype or quantize="nf4"; optlens.plan says what each would take.'
    )


def dispatch(
    model: nn.Module,
    devices: Mapping[str, str],
    places: Places,
    stored: Mapping[str, str],
    weights: Weights,
    dtype: torch.dtype,
    note: object = None,
) -> Placement:
    """Have accelerate connect the parts of a model whose weights are in place.

    Args:
        model: The model; parts on the "disk" are still on the meta device.
        devices: Part to device.
        places: The model's parameters by canonical name.
        stored: Canonical parameter name to that of the stored tensor.
        weights: The checkpoint, for parts on the "disk".
        dtype: In which to read these.
        note: How weights are kept, if not plainly; its `no_saving` counts.
    """
    from accelerate import dispatch_model

    names = {canonical(name): name for name, _ in model.named_modules()}
    index = {}
    spelt = {canonical(name): name for name, _ in model.named_parameters()}
    for parameter in places:
        if devices[_UNIT.match(parameter)[0]] == "disk":
            path, key = weights.location(stored[parameter])
            kind = str(dtype).removeprefix("torch.")
            for module, attribute in places[parameter]:  # accelerate casts to what stands there
                stand_in = getattr(module, attribute).detach().to(dtype)
                setattr(module, attribute, nn.Parameter(stand_in, requires_grad=False))
            index[spelt[parameter]] = {
                "safetensors_file": str(path),
                "weight_name": key,
                "dtype": kind,
            }
    placement = Placement(dict(devices), note)
    if len(set(devices.values())) > 1:
        logging.getLogger("accelerate.big_modeling").addFilter(_is_news)
        dispatch_model(
            model,
            {names[unit]: device for unit, device in devices.items()},
            main_device=placement.main,
            offload_index=index or None,
        )
        model._hf_hook.io_same_device = False  # logits are where the unembedding is, as ever
    return placement


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out that offloaded weights are on the meta device: it was asked for."""
    return "on the meta device" not in record.getMessage()


def _ranges(numbers: list[int]) -> str:
    """Write numbers that mostly follow each other: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
