"""The finished windows of a perplexity run, kept in a file so that the run can go on later."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from optlens.files import check_target, replacing

KIND = "optlens perplexity"


class Window(NamedTuple):
    """One window: the tokens `start` to `end` (excluded), of which the last `scored` are scored."""

    start: int
    end: int
    scored: int


class WindowLog:
    """The sums of nats of the windows that are finished; in a file too, where asked for.

    Attributes:
        nats: One sum for each finished window, in the order of the plan.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        settings: dict[str, Any],
        n_windows: int,
        save_every: float,
    ) -> None:
        """Start with what the file holds.

        Raises:
            ValueError: If the file is of another run, or is no such file.
            OSError: If it could not be written in the end, as its folder is missing.
        """
        self.path, self.settings, self.save_every = path, settings, save_every
        self.nats: list[float] = []
        if path is not None:
            check_target(path)
        if path is not None and os.path.exists(path):
            self.nats = _read_checkpoint(Path(path), settings, n_windows)
        self._saved, self._at = len(self.nats), time.monotonic()

    def add(self, nats: list[float]) -> None:
        """Note finished windows, and write the file if it is time."""
        self.nats += nats
        if time.monotonic() - self._at >= self.save_every:
            self.save()

    def save(self) -> None:
        """Write the file, if there is anything new."""
        if self.path is not None and self._saved < len(self.nats):
            kept = {"kind": KIND, "settings": self.settings, "nats": self.nats}
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(kept), encoding="utf-8")
            self._saved = len(self.nats)
        self._at = time.monotonic()

    def so_far(self, plan: list[Window]) -> float:
        """Return the perplexity over what is finished."""
        scored = sum(each.scored for each in plan[: len(self.nats)])
        return math.exp(math.fsum(self.nats) / scored) if scored else math.nan

    def describe(self, plan: list[Window]) -> str:
        """Say how far an interrupted run has come."""
        text = (
            f"Interrupted after {len(self.nats)} of {len(plan)} windows (perplexity "
            f"{self.so_far(plan):.4f} so far)."
        )
        if self.path is not None:
            return f"{text} They are in {self.path}; the same call goes on from there."
        return f"{text} With checkpoint= the same call would go on from there."


def _read_checkpoint(path: Path, settings: dict[str, Any], n_windows: int) -> list[float]:
    """Return the finished windows in a file, after checking that they are of this run."""
    remedy = "Name another file, or remove this one to start again."
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no checkpoint ({error}). {remedy}") from error
    if not isinstance(kept, dict) or kept.get("kind") != KIND:
        raise ValueError(f"{path} is no checkpoint of a perplexity. {remedy}")
    theirs, nats = kept.get("settings"), kept.get("nats")
    if not isinstance(theirs, dict) or not isinstance(nats, list):
        raise ValueError(f"{path} is damaged: it lacks settings or nats. {remedy}")
    wanted = json.loads(json.dumps(settings))
    other = [name for name in wanted if wanted[name] != theirs.get(name)]
    if other:
        said = ", ".join(
            f"{name} ({theirs.get(name)!r:.40}, not {wanted[name]!r:.40})" for name in other
        )
        raise ValueError(f"{path} belongs to another run: it differs in {said}. {remedy}")
    if len(nats) > n_windows:
        raise ValueError(f"{path} holds more windows than there are. {remedy}")
    return nats
