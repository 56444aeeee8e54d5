"""Path patching: what one component tells another along the residual stream, and nothing else.

The protocol of Wang et al. 2022 (arXiv 2211.00593) and Goldowsky-Dill et al. 2023 (arXiv 2304.05969):

1. Run both prompts and keep what every head and MLP adds.
2. In the base run, give the sender its value of the source run and hold all other heads and MLPs at
   their base values. What changes in the residual stream has come straight from the sender; the
   receivers' queries, keys, values or hidden neurons are computed from it, real LayerNorm included.
3. Run the base prompt once more with the receivers so changed, everything else computed as ever, and
   measure.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens.attention_mask import real_tokens
from optlens.patching.base_run import BaseRun, site_values
from optlens.patching.measure import AnyMetric, Measure
from optlens.patching.pairs import check_undivided, denoises, paired_on_host, undisturbed
from optlens.patching.path_nodes import lay_out, parse_receivers
from optlens.patching.path_wave import PathRow, PathWave
from optlens.patching.places import Positions, looked_up, places_of
from optlens.patching.result import (
    PatchResult,
    note_undefined,
    paired_labels,
    token_labels,
    warn_of_undefined,
)
from optlens.progress import progress_bar
from optlens.recording import fingerprint
from optlens.selection import Selection

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM


def path_patch(
    model: OPTForCausalLM,
    clean: Prompt,
    corrupt: Prompt,
    senders: Any = "heads",
    receivers: Any = "final",
    metric: AnyMetric | None = None,
    direction: str = "noise",
    over: str | Sequence[str] | None = None,
    freeze_mlps: bool = True,
    layers: Selection = None,
    heads: Selection = None,
    positions: Positions = None,
    memory_budget: int | None = None,
    progress: bool = True,
    spans: Mapping[str, Any] | None = None,
    attention_mask: Tensor | None = None,
) -> PatchResult:
    """Patch what senders tell receivers directly, one sender at a time, and measure each.

    In pre-LN models the direct path is the residual stream itself, a plain sum; in the post-LN 350m
    it leads through the LayerNorms on the way, which are computed.

    Args:
        model: The model.
        clean: The prompt, or prompts, with the answer that is asked for.
        corrupt: As many prompts, each of as many tokens as its clean one.
        senders: "heads" for each head in turn, "mlps" for each MLP; or a list of `(layer, head)`,
            `(layer, "mlp")` and "embed", and of lists of these that send together.
        receivers: `(layer, head, "q")`, with "k" or "v" likewise; `(layer, head)` for all three;
            `(layer, "mlp")`; a list of these, which all receive at once; or "final", what the
            unembedding reads.
        metric: As for `patch_sweep`.
        direction: "noise", as usual: the base run is the clean one, senders get corrupt values.
            "denoise" is the opposite.
        over: The axes of the result: "layer" and "head" for heads, "layer" for MLPs, "sender" for a
            list, each with "pos" if wanted: one position of the sender at a time. Components that
            no axis tells apart send together.
        freeze_mlps: Whether MLPs between sender and receiver are held at their base values. If
            not, they are computed anew, and paths through them count as direct, as in Wang et al.
        layers: Layers of the senders; all unless given. Those behind the receivers change nothing.
        heads: Heads of the senders, likewise.
        positions: Positions of the senders, as for `patch_sweep`.
        memory_budget: Bytes that may be taken beside the weights; half of what is free unless
            given.
        progress: Show a progress bar.
        spans: Names for `positions`, as for `patch_sweep`.
        attention_mask: As for `patch_sweep`.

    Returns:
        The metric of every path. Interrupted from the keyboard, what was done by then, with NaN
        elsewhere.

    Raises:
        InputError: If prompts, senders, receivers or metric do not fit together, or a sender in a
            list has no path to the receivers.
        MemoryError: If `memory_budget` is too small.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> clean = "While Mary and John were at the store, John gave a book to"
        >>> corrupt = "While Mary and John were at the store, Mary gave a book to"
        >>> metric = optlens.metrics.logit_diff(" Mary", " John")
        >>> result = path_patch(
        ...     model, clean, corrupt, "heads", (3, 0, "q"), metric, progress=False
        ... )
        >>> result.axes, tuple(result.values.shape)
        (('layer', 'head'), (5, 8))
    """
    check_undivided(model)
    denoise = denoises(direction)
    (clean_tokens, corrupt_tokens), mask = paired_on_host(model, clean, corrupt, attention_mask)
    parsed = parse_receivers(receivers, model.config)
    real = real_tokens(clean_tokens, mask)
    positions = places_of(model, clean_tokens, real, positions, spans)
    chosen = {"layer": layers, "head": heads, "pos": positions}
    grid = lay_out(model.config, senders, parsed, over, real, chosen)
    tokens = (clean_tokens, corrupt_tokens)
    base_tokens, source_tokens = tokens if not denoise else tokens[::-1]
    with undisturbed(model):
        kept = {"resid_pre", "z", "attn_out", "mlp_out"}
        values, final = site_values(model, base_tokens, mask, kept)
        base = BaseRun(base_tokens, real, mask is not None, values, final)
        sources, source_final = site_values(
            model, source_tokens, mask, {"z", "mlp_out", "embed", "pos_embed"}
        )
        finals = (final, source_final) if not denoise else (source_final, final)
        measure = Measure(model, base, metric, finals)
    # up to the first token that differs, both runs are the same by causality
    differs = (clean_tokens != corrupt_tokens).int().cumsum(-1).gt(0) & real
    wave = PathWave(model, base, sources, parsed, differs, freeze_mlps)
    about = {
        "site": f"paths to {parsed}",
        "senders": str(senders),
        "direction": direction,
        "freeze_mlps": freeze_mlps,
        "clean": clean_tokens.tolist(),
        "corrupt": corrupt_tokens.tolist(),
        "metric": measure.name,
        "model": fingerprint(model),
    } | looked_up(positions)
    result = PatchResult(
        measure.unpatched.expand(len(grid.cells), -1).clone().view(*grid.shape, -1),
        *measure.ends,
        grid.axes,
        paired_labels(model, grid.choices, clean_tokens, corrupt_tokens, real),
        grid.choices,
        about | {"labels": token_labels(model, about)},
    )
    _fill(result, wave, wave.rows_of(grid), measure, memory_budget, progress)
    return result


def _fill(
    result: PatchResult,
    wave: PathWave,
    rows: list[PathRow],
    measure: Measure,
    memory_budget: int | None,
    progress: bool,
) -> None:
    """Run what has to be run, in portions."""
    values = result.per_prompt.view(-1, result.per_prompt.shape[-1])
    portions = list(wave.portions(rows, memory_budget))
    result.undefined = result.per_prompt.isnan().any(-1)
    for row in rows:
        values[row.index, slice(None) if measure.metric.whole else row.prompt] = torch.nan
    result.undefined.view(-1)[[row.index for row in rows]] = False
    with progress_bar(len(rows), progress, unit="path", leave=False) as bar:
        try:
            for portion in portions:
                prompts = [row.prompt for row in portion]
                with undisturbed(wave.model):
                    final = wave.run(portion)
                    at = torch.arange(len(portion), device=final.device)[:, None]
                    read = final[at, measure.reads[prompts]]
                    entries = [row.index for row in portion]
                    measure.fill(values, entries, prompts, read)
                note_undefined(result, entries)
                bar.update(len(portion))
        except KeyboardInterrupt:
            missing = result.missing
            warnings.warn(
                f"Interrupted: {int(missing.sum())} of {missing.numel()} paths are missing (NaN).",
                stacklevel=3,
            )
    warn_of_undefined(result, stacklevel=3)
