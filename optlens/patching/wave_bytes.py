"""What a wave of patched runs holds at the moment when it holds most, from its rows alone.

`_Wave` goes through a block as `Wave._block` does and counts the numbers that are alive together.
Nearly always that is most at the end of attention: every run has keys and values of all columns
there, most of them copies of recorded ones, beside the stream and what queries, keys and values were
made of. Tests compare with what is really alive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from optlens.config import OPTConfig
from optlens.footprint import block_bytes
from optlens.patching.group import Row
from optlens.patching.plan import key_columns
from optlens.patching.sites import SITES

_INDEX_BYTES = 8
_AT_BLOCK = ("embed", "resid_pre")
_IN_ATTENTION = ("q", "k", "v", "attn_scores", "pattern")
# Copies that attention makes of one group's scores or pattern, beside those that it is given.
_SQUARE_COPIES = {"pattern": 1, "attn_scores": 2}
_HALF_COPIES = {"pattern": 1, "attn_scores": 5}  # the softmax's input and output are in float32


def portion_bytes(
    portions: Sequence[tuple[list[Row], int]],
    config: OPTConfig,
    length: int,
    itemsize: int,
    n_reads: int = 1,
    more: int = 0,
) -> int:
    """Return the most bytes that one of a sweep's portions holds.

    Args:
        portions: Runs and estimated bytes of each; the one that is estimated largest counts.
        config: The model's config.
        length: Columns of the batch.
        itemsize: Bytes of a number.
        n_reads: Columns that the metric reads.
        more: Numbers that interventions make of one token.
    """
    rows, _ = max(portions, key=lambda portion: portion[1], default=([], 0))
    tokens = sum(length - row.first for row in rows)
    return wave_bytes(rows, config, length, itemsize, n_reads) + tokens * more * itemsize


def unpatched_bytes(
    config: OPTConfig, batch: int, pos: int, itemsize: int, together: int | None = None
) -> int:
    """Return the most bytes that the recorded runs hold beside all that is kept of them.

    In its last block that is what any run holds there; the stream before and after it is recorded.
    Short runs are one, of which the half that is not patched is dropped in part.

    Args:
        config: The model's config.
        batch: Prompts.
        pos: Columns of the batch.
        itemsize: Bytes of a number.
        together: If they are one run: the bytes that are kept of the half that is patched, and not
            of the other.
    """
    batch = batch if together is None else 2 * batch
    beside = 2 * batch * pos * config.d_model * itemsize
    return (together or 0) + block_bytes(config, batch, pos, itemsize) - beside


def wave_bytes(
    rows: Sequence[Row], config: OPTConfig, length: int, itemsize: int, n_reads: int = 1
) -> int:
    """Return the most bytes that runs hold beside the weights and what was recorded for them.

    Args:
        rows: The runs of one portion.
        config: The model's config.
        length: Columns of the batch.
        itemsize: Bytes of a number.
        n_reads: Columns that the metric reads.
    """
    if not rows:
        return 0
    wave = _Wave(rows, config, length, n_reads, _HALF_COPIES if itemsize < 4 else _SQUARE_COPIES)
    for layer in range(min(row.layer for row in rows), config.n_layers):
        wave.block(layer)
    numbers = wave.peak + _explicit_attention(rows, config, length)
    return numbers * itemsize + wave.indices * _INDEX_BYTES


def _explicit_attention(rows: Sequence[Row], config: OPTConfig, length: int) -> int:
    """Count the scores of one group of runs that write scores or patterns of several blocks."""
    widths: Counter[int] = Counter()
    for row in rows:
        if len(row.cell.layers) > 1 and row.cell.site.name in _SQUARE_COPIES:
            widths[row.first] += length - row.first
    return 4 * config.n_heads * length * max(widths.values(), default=0)


class _Wave:
    """The runs of a portion on their way, of which only the sizes are known.

    Attributes:
        peak: Most numbers that were alive together.
        indices: Most columns of runs, which are whole numbers.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        config: OPTConfig,
        length: int,
        n_reads: int,
        square_copies: Mapping[str, int],
    ) -> None:
        self.square_copies = square_copies
        self.config, self.length, self.n_reads = config, length, n_reads
        self.last = config.n_layers - 1
        self.keys = key_columns(length)
        self.starting: dict[tuple[int, str], Counter[tuple[int, bool]]] = {}
        for row in rows:
            here = self.starting.setdefault((row.layer, row.cell.site.name), Counter())
            here[row.first, row.cell.pos is not None] += 1
        # first column, and whether it alone differs from the unpatched run's -> runs
        self.flow: Counter[tuple[int, bool]] = Counter()
        self.final = len(rows) * n_reads * config.d_model
        prompts = 1 + max(row.prompt for row in rows)
        padded = self.keys != length  # then a block's recorded keys and values are copied
        self.recorded = 2 * prompts * self.keys * config.d_model * padded
        self.peak = self.indices = 0

    def block(self, layer: int) -> None:
        """Take the runs through a block; those that started below have all their columns now."""
        before = self._columns()
        tokens = before + self._start(_AT_BLOCK, layer)
        alone = sum(runs * (self.length - f - 1) for (f, one), runs in self.flow.items() if one)
        self.indices = max(self.indices, tokens + before)
        merged: Counter[tuple[int, bool]] = Counter()
        for (first, _), runs in self.flow.items():  # from here on the change spreads
            merged[first, False] += runs
        self.flow = merged
        tokens = self._attend(layer, tokens, new=tokens - alone)
        self._mlp(layer, tokens)

    def _alive(self, numbers: int) -> None:
        self.peak = max(self.peak, numbers + self.final + self.recorded)

    def _columns(self, most: int | None = None) -> int:
        """Count the columns of all runs, from their first ones on."""
        most = self.length if most is None else most
        return sum(min(self.length - f, most) * runs for (f, _), runs in self.flow.items())

    def _start(self, names: Sequence[str], layer: int) -> int:
        """Start what is patched at some sites of a block; return how many tokens that are."""
        tokens = 0
        for name in names:
            for (first, at_one), runs in self.starting.get((layer, name), {}).items():
                single = at_one and not SITES[name].spreads
                self.flow[first, single or (at_one and name in _AT_BLOCK)] += runs
                width = 1 if single else self.length - first
                if layer == self.last and name not in _AT_BLOCK:
                    width = min(width, self.n_reads)
                tokens += width * runs
        return tokens

    def _attend(self, layer: int, tokens: int, new: int) -> int:
        """Count what attention holds.

        Args:
            layer: The block.
            tokens: Columns of all runs.
            new: Those that can differ from the unpatched run's.

        Returns:
            The tokens that go on, with those that start on the way.
        """
        width = self.config.d_model
        of_all = 2 * self.keys  # a run's keys and values of all columns
        made = new * (3 if self.config.do_layer_norm_before else 2)  # normalised, keys and values
        runs = sum(self.flow.values())
        queries = new
        if layer == self.last and self.n_reads < self.length:
            read = self._columns(self.n_reads)
            self._alive(width * (tokens + 2 * read + made + of_all * runs))
            tokens = queries = read  # of which the normalised stream is made anew
            made = 2 * new + (read if self.config.do_layer_norm_before else 0)
        squares, copies = self._squares(layer)
        tokens += self._start(_IN_ATTENTION, layer)
        runs = sum(self.flow.values())
        scaled = max((n * (self.length - f) for (f, _), n in self.flow.items()), default=0)
        last = max(width * min(scaled, tokens), copies)
        # the stream and z, what they were made of, and the queries of one group after the other
        self._alive(width * (2 * tokens + made + queries + of_all * runs) + squares + last)
        tokens += self._start(("z",), layer)
        self._alive(width * (4 * tokens + queries))
        return tokens + self._start(("attn_out",), layer)

    def _squares(self, layer: int) -> tuple[int, int]:
        """Count scores and patterns that are patched here, and what is made of one group's."""
        held = copies = 0
        for name, times in self.square_copies.items():
            for (first, at_one), runs in self.starting.get((layer, name), {}).items():
                width = 1 if at_one else self.length - first
                width = min(width, self.n_reads) if layer == self.last else width
                size = runs * width * self.config.n_heads * self.length
                held, copies = held + size, max(copies, times * size)
        return held, copies

    def _mlp(self, layer: int, tokens: int) -> None:
        """Count what the MLP holds; patched neurons are copied to those of runs that go through."""
        d_model, d_mlp = self.config.d_model, self.config.d_mlp
        tokens += self._start(("resid_mid",), layer)
        wide = tokens * d_mlp
        self._alive(2 * d_model * tokens + max(2 * d_model * tokens, wide))
        for name in ("mlp_pre", "mlp_post"):
            more = self._start((name,), layer)
            if more:
                self._alive(2 * d_model * (tokens + more) + 2 * wide + 2 * more * d_mlp)
                tokens, wide = tokens + more, wide + more * d_mlp
            if name == "mlp_pre" and self.config.activation_function != "relu":
                self._alive(d_model * tokens + 2 * wide)
        self._alive(2 * d_model * tokens + wide)
        self._start(("mlp_out", "resid_post"), layer)
