"""Where the attention view gets queries and keys: from the recording, or from one more run.

A recording rarely holds them, since they are as large as the residual stream. Where its model is at
hand and the run was a plain one, running the prompt again gives what was there; whether it did is
checked against the recorded weights. Knows no Jupyter library.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from optlens.capture import estimate_bytes
from optlens.circuits import ScoreDetail, score_detail
from optlens.lens.source import one_prompt_of
from optlens.recording import NotRecordedError, Recording
from optlens.report.one_prompt import OnePrompt, as_numpy
from optlens.widgets.branches import lock_of
from optlens.widgets.part import QuestionError

WHAT = ("q", "k")
# Queries and keys of all layers are kept after a run if they fit into this, else those of one layer.
BYTES_KEPT = 2**26


class QueryKeys:
    """Give the parts of an attention score for a recording.

    Args:
        recording: one that holds "attention".
        prompts: its prompts without padding.
    """

    def __init__(self, recording: Recording, prompts: list[OnePrompt]):
        self.recording = recording
        self.prompts = prompts
        self._runs: dict[tuple[int, tuple[int, ...]], Recording] = {}  # by prompt and layers

    @property
    def obstacle(self) -> str | None:
        """Why no layer's scores can be taken apart, and what to record instead; None if one can."""
        if any(self._held(layer) for layer in self.recording.layers):
            return None
        return self._no_run()

    def detail(self, prompt: int, layer: int, head: int, position: int) -> ScoreDetail:
        """Return query, keys, products and scores of one query.

        Args:
            prompt: which prompt of the recording.
            layer: the block's number.
            head: the head's.
            position: the query's, counted over the prompt's real tokens.

        Raises:
            QuestionError: if there is nothing to compute it from, saying what to record.
        """
        if self._held(layer):
            return score_detail(None, one_prompt_of(self.recording, prompt), layer, head, position)
        if (why := self._no_run()) is not None:
            raise QuestionError(why)
        found = score_detail(None, self._run(prompt, layer), layer, head, position)
        if not self.agrees(found.pattern, prompt, layer, head, position):
            self._runs.clear()
            raise QuestionError(
                "The model now gives other weights than this recording holds, so its queries and "
                "keys would not be those of the recorded run; record the prompt again."
            )
        return found

    def _held(self, layer: int) -> bool:
        """Say whether the recording holds a layer's queries and keys at every position."""
        if len(self.recording.positions) < self.recording.tokens.shape[-1]:
            return False
        try:
            for name in WHAT:
                _ = self.recording[name, layer]
        except NotRecordedError:
            return False
        return True

    def _no_run(self) -> str | None:
        """Return why the prompt cannot be run again for what is missing; None if it can."""
        recording = self.recording
        kept = [name for name in recording.what if name not in WHAT]
        call = f"model.record(prompt, what={(*kept, *WHAT)!r}"
        if recording.metadata["edited_hooks"]:
            return (
                "This run was made under interventions or hooks and lacks its queries and keys. "
                f"Record them with it: {call}, interventions=[...]), or show a recording with "
                "these before intervening."
            )
        if recording._model is None:
            return (
                "This recording lacks queries and keys, and was loaded without its model: show "
                f"rec.attach(model), or record it with {call})."
            )
        return None

    def _run(self, prompt: int, layer: int) -> Recording:
        """Run one prompt again for its queries and keys; a run is kept, and so is its check."""
        model, ids = self.recording.model, self.prompts[prompt].ids
        every = tuple(self.recording.layers)
        size = estimate_bytes(model.config, len(ids), what=WHAT, layers=list(every))
        layers = every if size <= BYTES_KEPT else (layer,)
        with lock_of(model):  # a question that comes meanwhile waits, and finds the run made
            if (prompt, layers) not in self._runs:
                made = model.record(torch.tensor(ids), what=WHAT, layers=list(layers))
                if made.metadata["edited_hooks"]:
                    raise QuestionError(
                        "This recording lacks queries and keys, and hooks are attached to the "
                        "model now, with which another run would differ: remove them "
                        "(model.reset_hooks()) and ask again."
                    )
                self._runs.clear()  # one prompt's at a time: memory stays within the bound
                self._runs[prompt, layers] = made
            return self._runs[prompt, layers]

    def agrees(self, pattern: Tensor, prompt: int, layer: int, head: int, position: int) -> bool:
        """Say whether a query's weights are the recorded ones, up to what rounding explains.

        Args:
            pattern: its weights, `[key]`, with or without those of the prompt's padding.
            prompt: which prompt.
            layer: the block's number.
            head: the head's.
            position: the query's, counted over the prompt's real tokens.
        """
        one, recording = self.prompts[prompt], self.recording
        row, column = recording.layers.index(layer), recording.heads.index(head)
        query = int(one.columns[one.positions.index(position)])
        recorded = as_numpy(one.pick(recording.attention)[row, column, query])[one.real]
        found = as_numpy(pattern)
        found = found[one.real] if len(found) == len(one.real) else found
        exact = {"torch.float32", "torch.float64"}.issuperset(
            recording.metadata[name] for name in ("dtype", "model_dtype")
        )
        # Two runs of one model in float32 differ by 1e-6; in half precision scores are rounded too.
        return bool(np.abs(found - recorded).max() < (1e-3 if exact else 0.05))
