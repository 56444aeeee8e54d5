"""Where the parts of a model go, given how large they are and how much memory there is.

The first of these that fits: one GPU, several GPUs, GPUs and the CPU, the CPU, and blocks that are
read from the disk whenever a run reaches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from optlens.checkpoints.errors import listing
from optlens.checkpoints.placement import USABLE, device_name

# Tokens of the prompt that a model is placed for, if nobody says more.
PROMPT_LENGTH = 512
BLOCK = "model.decoder.layers."
# Parts whose outputs are added to each other, and which stay together.
FRONT = ("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in")
_EMBEDDING, _HEAD = FRONT[0], "lm_head"


@dataclass(frozen=True)
class Demand:
    """What a model and the runs on it need.

    Attributes:
        modules: Module name -> bytes, in the order of a forward pass.
        cache: Bytes of the KV cache, which lies with the blocks.
        working: Bytes that a run holds at its peak on each device that computes.
        kept: Bytes that stay on the CPU, as recordings do.
        tied: Whether the unembedding is the embedding, and so has its device.
        heap: Bytes of freed memory that the process keeps, if the CPU computes.
        pinned: Bytes that `kept` takes more if it comes from a GPU, by way of pinned memory.
    """

    modules: Mapping[str, int]
    cache: int
    working: int
    kept: int
    tied: bool
    heap: int = 0
    pinned: int = 0

    def working_on(self, device: str) -> int:
        """Return what a run holds on a device that computes."""
        return self.working + self.heap_on([device])

    def heap_on(self, devices: Iterable[str]) -> int:
        """Return what is kept of freed memory, if the CPU is among the devices that compute."""
        return self.heap if "cpu" in devices else 0

    def pinned_from(self, devices: Iterable[str]) -> int:
        """Return what pinned buffers take beyond `kept`, if the first of the devices is a GPU."""
        return self.pinned if next(iter(devices), "cpu").startswith("cuda") else 0

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return sum(name.startswith(BLOCK) for name in self.modules)


@dataclass(frozen=True)
class Arrangement:
    """A place for every part.

    Attributes:
        kind: "one device", "several devices" or "stream".
        device_map: Module name -> device; {"": device} for all on one.
        weights: Device -> bytes of weights there.
        needed: Device -> bytes needed there in all.
        short: Device -> bytes that are missing there; empty if it fits.
    """

    kind: str
    device_map: dict[str, str]
    weights: dict[str, int]
    needed: dict[str, int]
    short: dict[str, int] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether there is memory for all of it."""
        return not self.short


def arrange(
    demand: Demand, memory: Mapping[str, int | None], may_stream: bool, rule: str = "auto"
) -> Arrangement:
    """Choose the arrangement of a model.

    Args:
        demand: What it needs.
        memory: Device -> free bytes, GPUs before the CPU; None where that is not known, which
            counts as enough.
        may_stream: Whether blocks may stay on the disk.
        rule: "auto" takes as few GPUs as will do, "balanced" first tries all of them.

    Returns:
        The first that fits, or the one that lacks least, with what it lacks in `short`.
    """
    gpus = [device for device in memory if device != "cpu"]
    tried = [balanced(demand, gpus, memory)] if rule == "balanced" and gpus else []
    tried += [on_one(demand, device, memory) for device in gpus]
    for count in range(2, len(gpus) + 1):
        tried.append(balanced(demand, gpus[:count], memory))
    if gpus and "cpu" in memory:
        tried.append(filled(demand, list(memory), memory))
    if "cpu" in memory:
        tried.append(on_one(demand, "cpu", memory))
    if may_stream:
        tried += [streamed(demand, device, memory) for device in memory]
    fitting = next((each for each in tried if each.fits), None)
    return fitting or min(tried, key=lambda each: sum(each.short.values()))


def on_one(demand: Demand, device: str, memory: Mapping[str, int | None]) -> Arrangement:
    """Put everything on one device."""
    return _total(demand, "one device", {"": device}, dict.fromkeys(demand.modules, device), memory)


def balanced(demand: Demand, devices: list[str], memory: Mapping[str, int | None]) -> Arrangement:
    """Divide the parts evenly, in order, among devices."""
    share = sum(demand.modules.values()) / len(devices)
    placed: dict[str, str] = {}
    before = 0
    for name, size in demand.modules.items():
        # A part goes where its middle falls.
        number = min(int((before + size / 2) / share), len(devices) - 1) if share else 0
        placed[name] = devices[number]
        before += size
    return _over_several(demand, _front_together(placed), memory)


def filled(demand: Demand, devices: list[str], memory: Mapping[str, int | None]) -> Arrangement:
    """Fill one device after the other; the last takes what is left."""
    per_block = demand.cache // max(demand.n_blocks, 1)
    placed: dict[str, str] = {}
    left = list(devices)
    used = demand.working_on(left[0])
    for name, size in demand.modules.items():
        size += per_block if name.startswith(BLOCK) else 0
        while len(left) > 1 and not _enough(used + size, memory[left[0]]):
            left.pop(0)
            used = demand.working_on(left[0])
        placed[name] = left[0]
        used += size
    return _over_several(demand, _front_together(placed), memory)


def streamed(demand: Demand, device: str, memory: Mapping[str, int | None]) -> Arrangement:
    """Leave the blocks on the disk; two of them are in memory at a time."""
    blocks = [size for name, size in demand.modules.items() if name.startswith(BLOCK)]
    weights = {device: sum(demand.modules.values()) - sum(blocks) + sum(blocks[:2])}
    needed = {device: weights[device] + demand.cache + demand.working_on(device)}
    needed["cpu"] = needed.get("cpu", 0) + demand.kept + demand.pinned_from(weights)
    return _judged("stream", {"": device, BLOCK.rstrip("."): "disk"}, weights, needed, memory)


def as_given(
    demand: Demand, device_map: Mapping[str, Any], memory: Mapping[str, int | None]
) -> Arrangement:
    """Follow a map from module names to devices, as `spell_out` reads it.

    Raises:
        ValueError: If a part is on no device, or a device is not among those of `memory`.
    """
    placed = spell_out(device_map, demand.modules)
    for name, device in placed.items():
        if device not in (*memory, "disk"):
            raise ValueError(
                f"device_map puts {name!r} on {device!r}; known devices are {', '.join(memory)} "
                "and disk."
            )
    return _over_several(demand, placed, memory)


def spell_out(device_map: Mapping[str, Any], parts: Iterable[str]) -> dict[str, str]:
    """Return the device of every part, from a user's table of module name prefixes.

    The longest prefix counts; names may be the model's ("model.decoder.layers.3") or the
    checkpoint's ("decoder.layers.3"); a number is a GPU's.

    Args:
        device_map: Prefix -> device.
        parts: Names of the parts that are placed whole.

    Raises:
        ValueError: If a name is no part of the model, or a part has no device, or two.

    Example:
        >>> spell_out({"": "cpu", "decoder.layers": 0}, ["decoder.layers.0", "lm_head"])
        {'decoder.layers.0': 'cuda:0', 'lm_head': 'cpu'}
    """
    short = {part: part.removeprefix("model.") for part in parts}
    wanted: dict[str, str] = {}
    for name, device in device_map.items():
        prefix = "" if name == "model" else str(name).removeprefix("model.")
        if prefix and not any(_is_in(part, prefix) for part in short.values()):
            raise ValueError(
                f"device_map places {name!r}, which is no part that is placed whole. Parts are "
                f"{listing(list(short), limit=4)}; prefixes of these stand for all that they begin."
            )
        place = "disk" if device == "disk" else device_name(device)
        if wanted.setdefault(prefix, place) != place:
            raise ValueError(
                f"device_map places {name!r} on {place}, and on {wanted[prefix]} by another "
                'spelling ("model." in front, or not); leave one of them out.'
            )
    found = {}
    for part, name in short.items():
        fitting = [prefix for prefix in wanted if _is_in(name, prefix)]
        if not fitting:
            raise ValueError(
                f'device_map says nothing of {part!r}; add it, or {{"": "cpu"}} for all the rest.'
            )
        found[part] = wanted[max(fitting, key=len)]
    return found


def _is_in(part: str, prefix: str) -> bool:
    return not prefix or f"{part}.".startswith(f"{prefix}.")


def settle_dtype(
    stored: torch.dtype, on_gpu: bool, arranged: Callable[[torch.dtype], Arrangement]
) -> torch.dtype:
    """Choose a dtype: the stored one on a GPU; on the CPU float32 where that fits, else the stored.

    Float32 that fits only by streaming gives way to the stored dtype in memory.

    Args:
        stored: The dtype in the files.
        on_gpu: Whether any part is on a GPU.
        arranged: Returns the arrangement of the model in a dtype.
    """
    if on_gpu:
        return stored
    wide = arranged(torch.float32)
    streams_anyhow = wide.kind != "stream" or arranged(stored).kind == "stream"
    return torch.float32 if wide.fits and streams_anyhow else stored


def _front_together(placed: dict[str, str]) -> dict[str, str]:
    return placed | {name: placed[_EMBEDDING] for name in FRONT if name in placed}


def _over_several(
    demand: Demand, placed: dict[str, str], memory: Mapping[str, int | None]
) -> Arrangement:
    if demand.tied:
        placed[_HEAD] = placed[_EMBEDDING]
    if len(set(placed.values())) == 1:
        return on_one(demand, placed[_EMBEDDING], memory)
    return _total(demand, "several devices", placed, placed, memory)


def _total(
    demand: Demand,
    kind: str,
    device_map: dict[str, str],
    placed: Mapping[str, str],
    memory: Mapping[str, int | None],
) -> Arrangement:
    """Add up what each device holds."""
    weights: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for name, device in placed.items():
        weights[device] = weights.get(device, 0) + demand.modules[name]
        blocks[device] = blocks.get(device, 0) + name.startswith(BLOCK)
    weights.pop("disk", None)
    needed = {
        device: size
        + demand.working_on(device)
        + demand.cache * blocks[device] // max(demand.n_blocks, 1)
        for device, size in weights.items()
    }
    if demand.kept:
        needed["cpu"] = needed.get("cpu", 0) + demand.kept + demand.pinned_from(weights)
    return _judged(kind, device_map, weights, needed, memory)


def _judged(
    kind: str,
    device_map: dict[str, str],
    weights: dict[str, int],
    needed: dict[str, int],
    memory: Mapping[str, int | None],
) -> Arrangement:
    needed = {device: size for device, size in needed.items() if size}
    short = {
        device: size - int((memory.get(device) or 0) * USABLE)
        for device, size in needed.items()
        if device in memory and not _enough(size, memory[device])
    }
    return Arrangement(kind, device_map, weights, needed, short)


def _enough(needed: int, free: int | None) -> bool:
    return free is None or needed <= free * USABLE
