"""A sweep that is carried out bit by bit, by whoever asks for the next portion.

What a sweep computes does not depend on when: between two portions anything may happen, a view may
be drawn, an hour may pass. Only the model must stay as it is, since patched runs go on from what the
unpatched run has recorded, so that is looked at before every portion.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from optlens import allocator, checks
from optlens.patching.pairs import undisturbed
from optlens.patching.plan import chunks_of, row_cost
from optlens.patching.result import PatchResult, note_undefined, warn_of_undefined
from optlens.patching.standing import StandingWave
from optlens.patching.wave import Wave
from optlens.progress import progress_bar
from optlens.recording import fingerprint

if TYPE_CHECKING:
    from optlens.patching.group import Row
    from optlens.patching.sweep import Sweep


class SweepStream(Iterator[PatchResult]):
    """A running sweep, as sweeps with `stream=True` return it.

    `next` carries out a portion, as large as memory allows, and gives the result; a `for` loop does
    so to the end. `advance` carries out small portions for a while.

    Attributes:
        result: What was found, always the same object, filled further and further.
        sweep: What is swept.
        filled: The patches that were computed, in this order: indices into the flattened result.

    Example:
        >>> import optlens
        >>> metric = optlens.metrics.logit_diff(" Paris", " Rome")
        >>> prompts = "The capital of France is", "The capital of Italy is"
        >>> stream = optlens.patch_sweep(optlens.load(), *prompts, metric=metric, stream=True)
        >>> stream.advance(seconds=0.05)
        >>> 0 < stream.share <= 1, stream.result.complete == stream.finished
        (True, True)
    """

    def __init__(
        self,
        sweep: Sweep,
        resume: PatchResult | None = None,
        shown: Callable[[PatchResult], PatchResult] | None = None,
    ) -> None:
        """Make the result, in which the patches that need no run are already answered.

        Args:
            sweep: What to carry out.
            resume: A result of the same sweep that was cut short.
            shown: Turns what the sweep finds into what its user gets, if that is not the same.
        """
        self.sweep, self._shown = sweep, shown
        self._found = sweep.empty_result(resume)
        self.result = self._found if shown is None else shown(self._found)
        self.filled: list[int] = []
        is_open = checks.on_host(self._found.missing.flatten())  # None in a rehearsal: all are
        self._todo = [patch for patch in sweep.patches if is_open is None or is_open[_cell(patch)]]
        self._counts = np.cumsum([0, *(len(rows) for rows, _ in self._todo)])
        self._at = 0  # the first of `_todo` that was not computed
        self._began, self._wave = False, None
        self._goal = 0.0  # operations of the next small portion
        self._versions = _versions(sweep.model)

    @property
    def finished(self) -> bool:
        """Whether every patch was computed."""
        return self._at == len(self._todo)

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1, by floating-point operations."""
        whole = float(self._costs[-1])
        return float(self._costs[self._at]) / whole if whole else 1.0

    @property
    def runs_done(self) -> int:
        """How many runs, one for each patch and prompt that needs one, were made or not needed."""
        left = int(self._counts[-1] - self._counts[self._at])
        return len(self.sweep.rows) - left

    @cached_property
    def _costs(self) -> np.ndarray:
        """The operations of all patches before each of those to do, and of all of them."""
        sweep = self.sweep
        about = sweep.model.config, sweep.base.tokens.shape[1], sweep.measure.reads.shape[1]
        each = (sum(row_cost(row, *about)[1] for row in rows) for rows, _ in self._todo)
        return np.cumsum([0.0, *each])

    def __next__(self) -> PatchResult:
        """Carry out a portion as large as memory allows; once even if there is none to do.

        Raises:
            InputError: If the model was altered since the sweep began, or hooks edit it.
        """
        if self.finished and self._began:
            raise StopIteration
        self._began = True
        if not self.finished:
            self._check_model()
            self.compute_portion()
        if self.finished:
            warn_of_undefined(self.result, callers_level())
        return self.result

    def compute_portion(self) -> None:
        """Carry out a portion as large as memory allows, of a model that is as it was."""
        self._compute(self._portion())

    def advance(self, seconds: float = 0.1) -> None:
        """Carry out small portions for about so long, at least one patch.

        Portions have other sizes than those of a sweep that is run at once, so that numbers may
        differ in their last digits (in float32 by some 1e-6 of the largest).

        Args:
            seconds: How long.

        Raises:
            InputError: If the model was altered since the sweep began, or hooks edit it. What was
                computed before stays.
        """
        self._began = True
        start = time.perf_counter()
        while not self.finished:
            self._check_model()
            portion = self._portion(self._goal)
            before, cost = time.perf_counter(), self._cost(portion)
            self._compute(portion)
            now = time.perf_counter()
            self._goal = _next_goal(cost, now - before, seconds)
            if self.finished:
                warn_of_undefined(self.result, callers_level())
            if now - start > seconds / 2:
                return

    def _portion(self, most: float | None = None) -> list[list[Row]]:
        """Return the next patches that fit the sweep's memory and a number of operations."""
        end = len(self._todo)
        if most is not None:
            within = np.searchsorted(self._costs, self._costs[self._at] + most, side="right") - 1
            end = min(end, max(int(within), self._at + 1))
        length = self.sweep.base.tokens.shape[1]
        patches = islice(self._todo, self._at, end)
        rows, _ = next(chunks_of(patches, length, self.sweep.budget))
        end = int(np.searchsorted(self._counts, self._counts[self._at] + len(rows)))
        return [patch for patch, _ in self._todo[self._at : end]]

    def _cost(self, portion: list[list[Row]]) -> float:
        return float(self._costs[self._at + len(portion)] - self._costs[self._at])

    def _compute(self, portion: list[list[Row]]) -> None:
        """Run patches and put what was measured in its place; on an error they remain to be done."""
        sweep, rows = self.sweep, [row for patch in portion for row in patch]
        if self._wave is None:
            self._wave = self._make_wave()
        cells, prompts = [row.cell.index for row in rows], [row.prompt for row in rows]
        with undisturbed(sweep.model):
            sweep.measure.fill(self._values, cells, prompts, self._wave.run(rows))
        note_undefined(self._found, cells)
        if sweep.is_bounded:  # portions of other shapes leave gaps in the heap
            allocator.release()
        if self._shown is not None:
            self.result.per_prompt.copy_(self._shown(self._found).per_prompt)
        self._at += len(portion)
        self.filled += [patch[0].cell.index for patch in portion]

    def _make_wave(self) -> Wave:
        sweep = self.sweep
        if sweep.base.final.device.type == "cpu":
            allocator.reserve(sweep.room)  # without it, page faults take a tenth of the time
        shared = (sweep.model, sweep.base, sweep.sources, sweep.grid.columns)
        shared += (sweep.measure.metric.columns, sweep.grid.cuts, sweep.is_bounded)
        return Wave(*shared) if sweep.standing is None else StandingWave(sweep.standing, *shared)

    @property
    def _values(self):
        """The result's numbers by cell, `[cell, prompts]`."""
        per_prompt = self._found.per_prompt
        return per_prompt.view(-1, per_prompt.shape[-1])

    def _check_model(self) -> None:
        """Refuse to go on with other weights than those that the recorded runs were made with."""
        model = self.sweep.model
        same = _versions(model) == self._versions
        if not same or fingerprint(model) != self.result.metadata["model"]:
            raise checks.InputError(
                "The model's weights were altered since this sweep began, and the runs that it "
                "goes on from were made before. Start the sweep anew; what was found so far "
                "belongs to the model as it was."
            )


def run_to_end(stream: SweepStream, progress: bool = True) -> PatchResult:
    """Carry out what is left; interrupted from the keyboard, return what was done by then.

    Args:
        stream: The running sweep.
        progress: Show a progress bar.
    """
    result, total = stream.result, len(stream.sweep.rows)
    with progress_bar(total, progress, unit="patch", leave=False) as bar:
        try:
            bar.update(stream.runs_done)
            while not stream.finished:
                stream.compute_portion()
                bar.update(stream.runs_done - bar.n)
        except KeyboardInterrupt:
            missing = result.missing
            warnings.warn(
                f"Interrupted: {int(missing.sum())} of {missing.numel()} patches are missing (NaN). "
                "Pass this result as resume= to the same sweep to go on.",
                stacklevel=callers_level(),
            )
    warn_of_undefined(result, callers_level())
    return result


def callers_level() -> int:
    """Return the `stacklevel` with which a warning points at the line that called the package.

    Sweeps come here by ways of different lengths.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def _next_goal(cost: float, took: float, seconds: float) -> float:
    """Return how many operations a portion shall have that is to last for some seconds.

    A portion has costs that do not grow with it (all weights are read once), so that the time of a
    small one says little of a larger one: sizes are doubled until they last long enough.

    Args:
        cost: Operations of the last portion.
        took: Seconds that it took.
        seconds: How long one is to last.
    """
    if took < 0.75 * seconds:
        return 2 * cost
    return cost if took < 1.5 * seconds else cost * seconds / took


def _cell(patch: tuple[list[Row], int]) -> int:
    return patch[0][0].cell.index


def _versions(model) -> list[int]:
    """Count how often each weight in memory was written to, as torch does for autograd."""
    in_memory = (weight for weight in model.parameters() if not hasattr(weight, "sample"))
    return [0 if weight.is_inference() else weight._version for weight in in_memory]
