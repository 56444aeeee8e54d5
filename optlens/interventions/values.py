"""What an intervention writes: a given tensor, a mean, or activations of another run.

Each class here answers `at(hook name, part)`: the numbers for the addressed part of a hook's value,
shaped to broadcast against it. `bind` prepares that for the pass that begins.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from optlens import checks
from optlens.config import OPTConfig
from optlens.interventions.address import SITES, Address
from optlens.interventions.held import HeldRun
from optlens.interventions.passes import Chosen, Pass
from optlens.names import shape_of
from optlens.selection import show

PLACES = ("pos", "query", "key")


class Source(Protocol):
    """Where an intervention's numbers come from."""

    def bind(self, run: Pass, chosen: dict[str, Chosen]) -> dict[str, Tensor]:
        """Prepare for a pass.

        Args:
            run: The pass.
            chosen: For each position axis which columns are addressed.

        Returns:
            For some of these axes, the columns that there are numbers for, `[batch, column]`.
        """

    def at(self, hook: str, part: Tensor) -> Tensor:
        """Return the numbers for a hook's value, in its dtype and on its device."""


class PerDevice:
    """A small tensor made on the CPU, and its copies where they were asked for."""

    def __init__(self, tensor: Tensor) -> None:
        """Keep the tensor."""
        self._copies = {tensor.device: tensor}

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor on a device."""
        if device not in self._copies:
            self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]


def take_columns(value: Tensor, axis: int, columns: Tensor) -> Tensor:
    """Select along an axis of `value [batch, ...]`, each row its own `columns [batch, n]`."""
    shape = [columns.shape[0], *[1] * (value.ndim - 1)]
    shape[axis] = columns.shape[1]
    size = [columns.shape[0], *value.shape[1:]]
    size[axis] = columns.shape[1]
    value = value.expand(columns.shape[0], *value.shape[1:])
    return value.gather(axis, columns.view(shape).expand(size))


class Given:
    """Numbers that the user gave, laid out as NumPy does on assignment.

    They broadcast to `[layer, batch, ...]` and the axes of the site, without those axes that are
    addressed by a single number.
    """

    def __init__(self, numbers: Tensor | float, what: str, address: Address, config: OPTConfig):
        """Check what can be checked before there is a prompt.

        Args:
            numbers: A tensor or a number.
            what: What to call them in errors.
            address: Where they go.
            config: Of the model.

        Raises:
            InputError: If the last axis does not fit.
        """
        if not isinstance(numbers, Tensor):
            numbers = torch.tensor(numbers, dtype=torch.float64)  # exact in every dtype
        self.numbers, self.what, self.address = numbers, what, address
        self.axes = ["layer", "batch", *SITES[address.site]]
        self.rows = {hook: row for row, hook in enumerate(address.hooks(config))}
        narrowed = address.chosen(config)
        self.sizes = {"layer": len(self.rows), "head": config.n_heads, "neuron": config.d_mlp}
        self.sizes |= {"d_model": config.d_model, "d_head": config.d_head}
        self.singles = {"layer"} if address.site == "embed" else set()
        for axis in ("layer", "head", "neuron"):
            if isinstance(getattr(address, axis), int):
                self.singles.add(axis)
            elif narrowed is not None and getattr(address, axis) is not None and axis != "layer":
                self.sizes[axis] = len(narrowed[1])
        last = self.axes[-1]
        if self.numbers.ndim and last not in PLACES and last not in self.singles:
            self._require(self.numbers.shape[-1] in (1, self.sizes[last]), {})

    def _require(self, fits: bool, singles: dict[str, bool]) -> None:
        if not fits:
            kept = [
                axis for axis in self.axes if axis not in self.singles and not singles.get(axis)
            ]
            sizes = ", ".join(str(self.sizes.get(axis, axis)) for axis in kept)
            raise checks.InputError(
                f"{self.what} has shape {list(self.numbers.shape)}; at {self.address.site!r} it "
                f"must broadcast to [{', '.join(kept)}] = [{sizes}] (axes that are addressed by a "
                "single number are left out)."
            )

    def bind(self, run: Pass, chosen: dict[str, Chosen]) -> dict[str, Tensor]:
        """Lay the numbers out for a pass; see `Source`.

        Raises:
            InputError: If they do not broadcast to what is addressed.
        """
        singles = {axis: run.is_single(getattr(self.address, axis)) for axis in chosen}
        if run.is_first:
            self.sizes |= {"batch": run.batch, **{axis: c.count for axis, c in chosen.items()}}
        kept = [axis for axis in self.axes if axis not in self.singles and not singles.get(axis)]
        shape = self.numbers.shape
        self._require(len(shape) <= len(kept), singles)
        for axis, size in zip(kept[len(kept) - len(shape) :], shape, strict=True):
            settled = run.is_first or axis not in ("batch", *PLACES)
            self._require(size == 1 or not settled or size == self.sizes[axis], singles)
        full = self.numbers.reshape([1] * (len(kept) - len(shape)) + list(shape))
        for place, axis in enumerate(self.axes):
            full = full if axis in kept else full.unsqueeze(place)
        if full.shape[1] > 1:
            full = full.index_select(1, run.for_batch(torch.arange(full.shape[1])).to(full.device))
        self.full, self.slots, limits = full, {}, {}
        for axis, choice in chosen.items():
            size = full.shape[self.axes.index(axis)]
            if size > 1:  # tokens that came later have no numbers
                limits[axis] = choice.slots < size
                self.slots[axis] = PerDevice(choice.slots.clamp(0, size - 1))
        return limits

    def at(self, hook: str, part: Tensor) -> Tensor:
        """Return the numbers for a hook's value; see `Source`."""
        row = self.rows[hook] if self.full.shape[0] > 1 else 0
        numbers = self.full[row].to(part.device, part.dtype)
        for axis, slots in self.slots.items():
            numbers = take_columns(numbers, self.axes.index(axis) - 1, slots.on(part.device))
        return numbers


class Average:
    """One value per hook for all prompts and positions."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        """Keep the values, each shaped to broadcast against the hook's."""
        self.values = values

    def bind(self, run: Pass, chosen: dict[str, Chosen]) -> dict[str, Tensor]:
        """Need no preparation; see `Source`."""
        return {}

    def at(self, hook: str, part: Tensor) -> Tensor:
        """Return the value; see `Source`."""
        return self.values[hook].to(part.device, part.dtype)


class Borrowed:
    """Activations of other runs, each position taken from the same position there."""

    def __init__(
        self, run: HeldRun, what: str, address: Address, config: OPTConfig, partial: bool
    ) -> None:
        """Check and narrow the runs to what is addressed.

        Args:
            run: The other runs.
            what: What to call them in errors.
            address: Where they go.
            config: Of the model.
            partial: Whether positions that they do not have are left alone; else that raises.

        Raises:
            InputError: If they hold too few blocks, or come from a model of another shape.
        """
        self.what, self.address, self.partial = what, address, partial
        self.real, self.values = run.real, {}
        narrowed = address.chosen(config)
        for hook in address.hooks(config):
            if hook not in run.values:
                raise checks.InputError(
                    f"{what} holds {', '.join(list(run.values)[:4])} but not {hook!r}, which layer="
                    f"{show(address.layer)} asks for."
                )
            value = run.values[hook]
            self.width = value.shape[-1 if "key" in SITES[address.site] else 1]
            expected = shape_of(hook, config, value.shape[0], self.width)
            if (
                tuple(value.shape) != expected
                or value.shape[0] != next(iter(self.values.values()), value).shape[0]
            ):
                raise checks.InputError(
                    f"{what} has shape {tuple(value.shape)} at {hook!r}; this model has {expected}."
                )
            if narrowed is not None:
                axis, indices = narrowed
                value = value.index_select(axis, torch.tensor(indices, device=value.device))
            self.values[hook] = value
        self.n_runs = value.shape[0]

    def rows_for(self, prompt: Pass) -> Tensor:
        """Say which run each prompt borrows from, `[prompt]`.

        Raises:
            InputError: If there is not one run for all, or one for each, of as many tokens.
        """
        if self.n_runs not in (1, prompt.batch):
            raise checks.InputError(
                f"{self.what} has {self.n_runs} prompts, but {prompt.batch} are run; give one for "
                "all, or one for each."
            )
        rows = torch.arange(self.n_runs).expand(prompt.batch)
        if self.real is None:
            if prompt.n_key != self.width:
                raise checks.InputError(self._unequal(0, self.width, prompt.n_key))
        else:
            lengths = self.real.sum(-1)[rows]
            for row in (lengths != prompt.lengths).nonzero().flatten().tolist()[:1]:
                raise checks.InputError(
                    self._unequal(row, int(lengths[row]), int(prompt.lengths[row]))
                )
        return rows

    def _unequal(self, row: int, theirs: int, ours: int) -> str:
        return (
            f"{self.what} has {theirs} tokens, but prompt {row} has {ours}. Position by position "
            "there must be as many; for single positions, Patch takes a value."
        )

    def bind(self, run: Pass, chosen: dict[str, Chosen]) -> dict[str, Tensor]:
        """Find where each position of the pass stands in the other run; see `Source`.

        Raises:
            InputError: If runs and prompts do not belong together, or an addressed position has
                no counterpart.
        """
        prompt = run.started(self.what)
        prompt_rows = self.rows_for(prompt)
        real = prompt.real if self.real is None else self.real[prompt_rows]
        self.rows, real = PerDevice(run.for_batch(prompt_rows)), run.for_batch(real)
        lengths = real.sum(-1, keepdim=True)
        # a stable sort by "is padding" brings the columns of real tokens to the front, in order
        columns = real.logical_not().long().argsort(dim=-1, stable=True)
        self.columns, limits = {}, {}
        for axis, choice in chosen.items():
            positions = run.positions[:, -choice.slots.shape[1] :]
            limits[axis] = (positions >= 0) & (positions < lengths)
            lacking = (choice.slots >= 0) & ~limits[axis]
            if bool(lacking.any()) and not self.partial:
                raise checks.InputError(
                    f"{self.what} has {int(lengths.max())} tokens, so nothing to write at position "
                    f"{int(positions[lacking][0])}. Choose positions that it has, or mode='mean'."
                )
            reachable = positions.clamp(0, columns.shape[1] - 1)
            self.columns[axis] = PerDevice(columns.gather(1, reachable))
        return limits

    def at(self, hook: str, part: Tensor) -> Tensor:
        """Return the other runs' values; see `Source`."""
        value = self.values[hook]
        if value.shape[0] > 1:
            value = value.index_select(0, self.rows.on(value.device))
        for axis, columns in self.columns.items():
            place = 1 + SITES[self.address.site].index(axis)
            value = take_columns(value, place, columns.on(value.device))
        return value.to(part.device, part.dtype)


class Means(Borrowed):
    """The mean of each position over runs of one length; every prompt borrows from it."""

    def rows_for(self, prompt: Pass) -> Tensor:
        """Take the one run there is; prompts may be shorter."""
        return torch.zeros(prompt.batch, dtype=torch.long)


class Resampled(Borrowed):
    """Activations of reference prompts, drawn for each prompt among those of its length."""

    def __init__(
        self, run: HeldRun, tokens: Tensor, seed: int, address: Address, config: OPTConfig
    ) -> None:
        """Keep the reference runs and their tokens `[reference, pos]`."""
        super().__init__(run, "The reference of a resample ablation", address, config, False)
        self.tokens, self.seed = tokens.cpu(), seed

    def rows_for(self, prompt: Pass) -> Tensor:
        """Draw a reference prompt for each prompt, never one of the same tokens.

        Raises:
            InputError: If there is none of equal length and other tokens.
        """
        generator = torch.Generator().manual_seed(self.seed)
        lengths = self.real.sum(-1)
        rows = []
        for row, length in enumerate(prompt.lengths.tolist()):
            others = (lengths == length).nonzero().flatten().tolist()
            if prompt.tokens is not None:
                own = prompt.tokens[row].cpu()[prompt.real[row]]
                others = [i for i in others if not self.tokens[i][self.real[i]].equal(own)]
            if not others:
                raise checks.InputError(
                    f"Prompt {row} has {length} tokens, and no other reference prompt has as many "
                    f"(they have {sorted(set(lengths.tolist()))}); add some."
                )
            rows.append(others[int(torch.randint(len(others), (), generator=generator))])
        return torch.tensor(rows)
