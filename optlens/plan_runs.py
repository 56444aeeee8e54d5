"""The runs that a memory plan is for, and what each of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from optlens.capture import estimate_bytes, estimate_pinned_bytes
from optlens.checkpoints.arrangement import Demand
from optlens.config import OPTConfig
from optlens.footprint import (
    cache_bytes,
    forward_bytes,
    forward_heap_bytes,
    kept_lens_bytes,
    lens_bytes,
    lens_heap_bytes,
    module_bytes,
    recording_run_bytes,
)
from optlens.lens.logit import CHUNK_BYTES, STORED_TOP_K
from optlens.patching.forecast import sweep_bytes
from optlens.selection import resolve_what, select


@dataclass(frozen=True)
class Runs:
    """What is to be run, and in what.

    Attributes:
        config: The model's config.
        dtype: Of weights and activations.
        quantize: As in `plan`.
        batch: Prompts.
        pos: Tokens of each.
        record: Options of `record`, or None.
        sweep: Options of `patch_sweep`, or None.
    """

    config: OPTConfig
    dtype: torch.dtype
    quantize: str | None
    batch: int
    pos: int
    record: dict[str, Any] | None
    sweep: dict[str, Any] | None

    @property
    def shape(self) -> tuple[OPTConfig, int, int, int]:
        """Config, prompts, tokens of each, and bytes of a number."""
        return self.config, self.batch, self.pos, self.dtype.itemsize

    def modules(self) -> dict[str, int]:
        """Count the weights of each part."""
        return module_bytes(self.config, self.dtype.itemsize, self.quantize)

    def recording(self) -> int:
        """Count what a recording keeps: values, tokens and mask, and the stored lens."""
        if self.record is None:
            return 0
        values = estimate_bytes(self.config, self.pos, self.batch, **self._kept)
        return values + self._lens[0] + 9 * self.batch * self.pos

    @property
    def _kept(self) -> dict[str, Any]:
        options = {key: self.record[key] for key in ("what", "layers", "heads", "dtype")}
        return options | {"dtype": options["dtype"] or self.dtype}

    def recording_run(self) -> int:
        """Count what a recording holds while it runs, beside what it keeps."""
        return 0 if self.record is None else max(self._recorded_run, self._lens[1])

    @cached_property
    def _recorded_run(self) -> int:
        wanted = resolve_what(self.record["what"], self.config)
        chosen = len(select(self.record["heads"], self.config.n_heads, "heads"))
        squares = ("attention", "pattern", "attn_scores")
        return recording_run_bytes(
            *self.shape,
            patterns=any(n in squares or n.endswith(("pattern", "attn_scores")) for n in wanted),
            heads=chosen if chosen < self.config.n_heads else 0,
            results=any(name.endswith("result") for name in wanted),
        )

    @cached_property
    def _lens(self) -> tuple[int, int, int]:
        """Count a stored logit lens: what is kept, what is held beside, and of that on the heap."""
        if "logit_lens" not in resolve_what(self.record["what"], self.config):
            return 0, 0, 0
        rows = 1 + len(select(self.record["layers"], self.config.n_layers, "layers"))
        kept = kept_lens_bytes(self.batch, self.pos, rows, min(STORED_TOP_K, self.config.d_vocab))
        heap = lens_heap_bytes(*self.shape, CHUNK_BYTES)
        return kept, lens_bytes(*self.shape, rows, CHUNK_BYTES), heap

    @cached_property
    def sweeping(self) -> tuple[int, int]:
        """Count what a sweep takes beside the weights: tensors, and gaps of the heap."""
        if self.sweep is None:
            return 0, 0
        itemsize = self.dtype.itemsize
        return sweep_bytes(self.config, self.pos, self.batch, itemsize, **self.sweep)

    def demand(self) -> Demand:
        """Add up what lies where, for the runs that were asked for, else for a forward pass."""
        modules, tied = self.modules(), self.config.tie_word_embeddings
        if self.record is None and self.sweep is None:
            working, heap = forward_bytes(*self.shape), forward_heap_bytes(*self.shape)
            return Demand(modules, cache_bytes(*self.shape), working, 0, tied, heap)
        working, kept, pinned = self.sweeping[0], 0, 0
        peak = sum(self.sweeping)
        if self.record is not None:
            kept = self.recording()
            working = max(working, self.recording_run())
            peak = max(peak, working, sum(self._lens[1:]))
            if torch.device(self.record["device"]).type != "cpu":
                working, peak, kept = working + kept, peak + kept, 0
            else:
                pinned = estimate_pinned_bytes(self.config, self.pos, self.batch, **self._kept)
        return Demand(modules, 0, working, kept, tied, peak - working, pinned)
