"""A sweep that fills in while it is looked at.

The picture asks for more, again and again; each answer carries out small portions for a tenth of a
second and brings the patches that the picture does not have yet. Nothing runs between two questions, so
that to cancel is not to ask, and the notebook's own cells come in between. The picture counts what it
has by the order in which patches were computed: an answer that is lost, or comes twice, costs nothing.
"""

import warnings
from typing import Any

import numpy as np
import torch

from optlens.metrics import normalized
from optlens.patching import PatchResult, SweepStream
from optlens.report.markup import visible
from optlens.widgets.branches import lock_of

SECONDS = 0.1  # for which one answer computes


class Filling:
    """Carry out a sweep bit by bit, and say what is new.

    Args:
        stream: the running sweep.

    Attributes:
        paused: whether questions are answered without computing: after a cancel or an error.
        trouble: what went wrong in the last portion, "" if nothing did.
    """

    def __init__(self, stream: SweepStream):
        self.stream, self.result = stream, stream.result
        self.paused, self.trouble = False, ""
        self._in_python = False
        self._turns: dict[str, int] = {}  # of each picture, the newest that was heard of
        self._known_at_first = int((~self.result.missing).sum())
        self.is_scaled = has_scale(self.result)

    @property
    def state(self) -> str:
        """What the sweep does: "running", "python", "paused", "failed" or "done"."""
        if self.stream.finished:
            return "done"
        if self._in_python:
            return "python"
        return ("failed" if self.trouble else "paused") if self.paused else "running"

    def go_on(self, by: str, turn: int) -> None:
        """Take back a cancel, if a picture says so that has not said it before.

        Args:
            by: which picture.
            turn: how often it was told to go on.
        """
        if turn > self._turns.get(by, 0):
            self._turns[by] = turn
            self.paused, self.trouble = False, ""

    def cancel(self, by: str, turn: int) -> None:
        """Compute no more, unless the picture was told to go on since: messages overtake another."""
        if turn >= self._turns.get(by, 0):
            self._turns[by] = turn
            self.stop()

    def step(self, seconds: float = SECONDS) -> None:
        """Compute for so long, unless paused; what goes wrong is kept and pauses it."""
        if self.paused:
            return
        try:
            with lock_of(self.stream.sweep.model):
                self.stream.advance(seconds)
        except Exception as error:  # an error of the model is for the user to see and to mend
            self.paused, self.trouble = True, visible(str(error) or type(error).__name__)

    def run(self) -> None:
        """Compute for half a second in Python; errors are the caller's.

        Raises:
            InputError: if the model was altered or is hooked.
        """
        self.paused, self.trouble, self._in_python = False, "", True
        try:
            with lock_of(self.stream.sweep.model):
                self.stream.advance(5 * SECONDS)
        except BaseException:
            self.stop()
            raise
        finally:
            self._in_python = False

    def stop(self) -> None:
        """Compute no more until told to go on."""
        self.paused = True

    def facts(self) -> dict[str, Any]:
        """Return how far it is."""
        return {
            "state": self.state,
            "to": len(self.stream.filled),
            "done": self._known_at_first + len(self.stream.filled),
            "all": self.result.per_prompt[..., 0].numel(),
            "share": round(self.stream.share, 6),
            "trouble": self.trouble,
        }

    def news(self, since: int) -> dict[str, Any]:
        """Return how far it is, and what was computed after the first `since` patches."""
        cells = np.array(self.stream.filled[since:], np.int32)
        values = self.result.per_prompt.flatten(0, -2)[torch.from_numpy(cells).long()].mean(-1)
        scaled = as_scaled(self.result, values) if self.is_scaled else None
        return self.facts() | {
            "since": since,
            "cells": cells,
            "values": values.numpy().astype(np.float32),
            "normalized": None if scaled is None else scaled.numpy().astype(np.float32),
        }


def as_scaled(result: PatchResult, values: torch.Tensor) -> torch.Tensor:
    """Return values as shares of the gap between the two runs; NaN where there is hardly any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is NaN, and shown as such
        return normalized(values, result.clean_per_prompt.mean(), result.corrupt_per_prompt.mean())


def has_scale(result: PatchResult) -> bool:
    """Tell whether a result's runs are far enough apart to be normalized."""
    ends = result.corrupt_per_prompt
    return not bool(ends.isnan().all()) and not bool(as_scaled(result, ends.mean()).isnan())
