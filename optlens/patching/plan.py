"""What a sweep will cost: runs, tokens, floating-point operations and memory, against the naive way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optlens.memory import describe_bytes
from optlens.patching.group import Row

if TYPE_CHECKING:
    from optlens.config import OPTConfig

# Beyond this many tokens in one matrix product nothing is won, and less stays in the CPU's caches.
MOST_TOKENS = 4096


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep computes. `print(plan)` reads well.

    Attributes:
        patches: Cells of the grid times prompts.
        runs: How many of them need computing; the others write what is already there, or cannot
            reach what the metric reads.
        block_tokens: Tokens that go through a block, summed over blocks and runs.
        naive_block_tokens: The same for one whole forward pass per patch.
        flops: Floating-point operations of the runs.
        naive_flops: The same for one whole forward pass per patch.
        chunks: Portions in which the runs are computed.
        bytes: Memory for the tensors of the recorded runs and of one portion.
        interventions: Interventions that every run has. What they compute themselves is in no
            count.
    """

    patches: int
    runs: int
    block_tokens: int
    naive_block_tokens: int
    flops: float
    naive_flops: float
    chunks: int
    bytes: int
    interventions: int = 0

    def __str__(self) -> str:
        """Describe the plan in four lines."""
        saved = self.naive_flops / max(self.flops, 1)
        besides = ", without what the interventions compute" if self.interventions else ""
        return (
            f"{self.patches:,} patches, of which {self.runs:,} need a run "
            f"({self.patches - self.runs:,} change nothing that is measured)\n"
            f"{self.block_tokens:,} tokens through a block, instead of {self.naive_block_tokens:,}\n"
            f"{self.flops / 1e9:,.1f} GFLOP, {saved:.1f} times less than one forward pass per patch"
            f"{besides}\n"
            f"{self.chunks} portion{'s'[: self.chunks != 1]}, {describe_bytes(self.bytes)}"
        )


def block_flops(config: OPTConfig, keys: int) -> tuple[float, float, float]:
    """Count the operations of one token in one block: keys and values, the rest of attention, MLP."""
    d_model = config.d_model
    return 4.0 * d_model**2, 4.0 * d_model**2 + 4.0 * keys * d_model, 4.0 * d_model * config.d_mlp


def row_cost(row: Row, config: OPTConfig, length: int, n_reads: int) -> tuple[int, float]:
    """Count the tokens that a run takes through blocks, and its operations.

    Args:
        row: The run.
        config: The model's config.
        length: Columns of the batch.
        n_reads: Columns that the metric reads.

    Returns:
        Tokens summed over blocks, and floating-point operations.
    """
    keys_values, attending, mlp = block_flops(config, length)
    width, last, site = length - row.first, config.n_layers - 1, row.cell.site
    in_last = min(width, n_reads)
    at_one = row.cell.pos is not None
    single = at_one and not site.spreads
    as_recorded = width - 1 if at_one else 0  # columns that keep their q, k, v in the first block
    here = 1 if single else (in_last if row.layer == last else width)
    tokens, flops = here, 0.0
    # in the first block only what follows the patched site is computed
    if site.name in ("embed", "resid_pre"):
        flops += (width - as_recorded) * keys_values + here * attending
        if row.layer < last:
            flops -= as_recorded * keys_values / 2  # queries, of which there are as many as keys
    elif site.name in ("q", "k", "v", "attn_scores", "pattern", "z"):
        flops += here * attending / 2
    if site.name in ("mlp_pre", "mlp_post"):
        flops += here * mlp / 2
    elif site.name not in ("mlp_out", "resid_post"):
        flops += here * mlp
    if row.layer < last:
        whole = last - row.layer - 1
        tokens += whole * width + in_last
        flops += whole * width * (keys_values + attending + mlp)
        flops += width * keys_values + in_last * (attending + mlp)
        if single:  # the next block is the first that reads the change
            flops -= as_recorded * keys_values * (1.5 if whole else 1)
    return tokens, flops


def key_columns(length: int) -> int:
    """Round the columns that are keys up, so that a softmax takes whole vector registers."""
    return -(-length // 16) * 16


def rounded_up(tokens: int, sparing: bool = False) -> int:
    """Round a number of tokens up to one of 32 between two powers of two, 1 % more on average.

    Args:
        tokens: The number.
        sparing: Round to one of 4, 8 % more on average.
    """
    step = 1 << max(0, tokens.bit_length() - (3 if sparing else 6))
    return -(-tokens // step) * step


def row_bytes(row: Row, config: OPTConfig, length: int, itemsize: int, more: int = 0) -> int:
    """Estimate the memory that a run takes on its way, by what bounds it.

    Runs end in different blocks and columns, so that the heap has gaps: processes take 1.2 to 4
    times what tensors do (`wave_bytes`). This is between 2 and 3 times.

    Args:
        row: The run.
        config: The model's config.
        length: Columns of the batch.
        itemsize: Bytes of a number.
        more: Numbers that interventions make of one token.
    """
    width = length - row.first
    per_token = 8 * config.d_model + 2 * config.d_mlp + more
    if row.cell.site.name in ("attn_scores", "pattern"):
        per_token += 4 * config.n_heads * length
    return itemsize * (width * per_token + 4 * key_columns(length) * config.d_model)


def patches_of(
    rows: list[Row], config: OPTConfig, length: int, itemsize: int, more: int = 0
) -> list[tuple[list[Row], int]]:
    """Gather the runs of each patch, which stay together, and estimate their bytes.

    Args:
        rows: The runs.
        config: The model's config.
        length: Columns of the batch.
        itemsize: Bytes of a number.
        more: As for `row_bytes`.

    Returns:
        Runs and bytes of each patch; those that start in one block side by side.
    """
    patches: dict[int, list[Row]] = {}
    for row in rows:
        patches.setdefault(row.cell.index, []).append(row)
    ordered = sorted(patches.values(), key=lambda patch: min(row.layer for row in patch))
    return [
        (patch, sum(row_bytes(row, config, length, itemsize, more) for row in patch))
        for patch in ordered
    ]


def chunks_of(
    patches: list[tuple[list[Row], int]], length: int, budget: int
) -> Iterator[tuple[list[Row], int]]:
    """Divide patches into portions that fit a memory budget.

    Args:
        patches: Runs and bytes of each, as `patches_of` gives them.
        length: Columns of the batch.
        budget: Bytes for one portion.

    Yields:
        Runs and bytes of portions, each with at least one patch.
    """
    chunk: list[Row] = []
    tokens = used = 0
    for patch, more_bytes in patches:
        more = sum(length - row.first for row in patch)
        if chunk and (tokens + more > MOST_TOKENS or used + more_bytes > budget):
            yield chunk, used
            chunk, tokens, used = [], 0, 0
        chunk += patch
        tokens, used = tokens + more, used + more_bytes
    if chunk:
        yield chunk, used


def plan_of(
    rows: list[Row],
    chunks: int,
    patches: int,
    config: OPTConfig,
    length: int,
    n_reads: int,
    n_bytes: int,
    interventions: int = 0,
) -> SweepPlan:
    """Add up what a sweep costs.

    Args:
        rows: The runs.
        chunks: In how many portions they are computed.
        patches: Cells times prompts.
        config: The model's config.
        length: Columns of the batch.
        n_reads: Columns that the metric reads.
        n_bytes: Memory for the recorded runs and the largest portion.
        interventions: How many interventions every run has.
    """
    costs = [row_cost(row, config, length, n_reads) for row in rows]
    naive = patches * length * config.n_layers
    return SweepPlan(
        patches,
        len(rows),
        sum(tokens for tokens, _ in costs),
        naive,
        sum(flops for _, flops in costs),
        naive * sum(block_flops(config, length)),
        chunks,
        n_bytes,
        interventions,
    )
