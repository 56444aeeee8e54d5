"""Attention knockout: cut edges of attention in a window of blocks, one set at a time.

Geva et al. 2023 (arXiv 2304.14767): the scores of some queries at some keys become -inf before the
softmax, so that the other keys share the attention. What the metric loses is what was carried along
these edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.attention_mask import real_tokens
from optlens.interventions import Intervention
from optlens.patching.base_run import run_base
from optlens.patching.cuts import Cuts
from optlens.patching.grid import Cell, Grid, layers_written, positions_in_all
from optlens.patching.measure import AnyMetric
from optlens.patching.pairs import prompts_on_host, undisturbed
from optlens.patching.plan import SweepPlan
from optlens.patching.result import PatchResult
from optlens.patching.sites import site_named
from optlens.patching.spans import Spans, positions_of
from optlens.patching.standing import Standing
from optlens.patching.stream import SweepStream
from optlens.patching.sweep import Sweep
from optlens.selection import Selection, select

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

AXES = ("layer", "head", "query", "key")
_AXIS_OF = {"queries": "query", "keys": "key"}
Sets = Spans | Mapping[str, Spans] | None


def knockout_sweep(
    model: OPTForCausalLM,
    prompt: Prompt,
    metric: AnyMetric | None = None,
    queries: Sets = -1,
    keys: Sets = None,
    window: int = 1,
    over: str | Sequence[str] = ("layer", "key"),
    layers: Selection = None,
    heads: Selection = None,
    memory_budget: int | None = None,
    progress: bool = True,
    dry_run: bool = False,
    stream: bool = False,
    resume: PatchResult | None = None,
    interventions: Intervention | Iterable[Intervention] = (),
    spans: Mapping[str, Any] | None = None,
    attention_mask: Tensor | None = None,
) -> PatchResult | SweepPlan | SweepStream:
    """Cut edges of attention, one set at a time, and measure each.

    Args:
        model: The model.
        prompt: The prompt or prompts to run.
        metric: As for `patch_sweep`.
        queries: The tokens that do not see: positions, a text such as " Mary", a list with one of
            these for each prompt (see `optlens.patching.spans.positions_of`), or None for all. If
            "query" is an axis, each of these positions by itself; or a dict of named sets,
            `{"subject": "The Space Needle", "last": -1}`, one set at a time.
        keys: The tokens that they do not see, likewise with the axis "key". A query that is left
            without any key attends to nothing.
        window: Blocks in which one knockout acts, around the entry of the layer axis; in one block
            alone often little is lost, since its neighbours carry the same.
        over: The axes of the result, of "layer", "head", "query" and "key". What is no axis is cut
            whole.
        layers: Blocks to sweep over; or, without the axis "layer", to cut at once. All unless
            given.
        heads: Heads to sweep over; all unless given.
        memory_budget: As for `patch_sweep`.
        progress: As for `patch_sweep`.
        dry_run: As for `patch_sweep`.
        stream: As for `patch_sweep`.
        resume: As for `patch_sweep`.
        interventions: One or several of `optlens.interventions` that act on every run, on the
            scores before the knockout.
        spans: Names for positions in `interventions`, as `model.intervene` takes them.
        attention_mask: For padded token ids, on either side: 1 at real tokens, 0 at padding,
            `[prompts, pos]`. They are brought to the form of texts, padded on the left.

    Returns:
        The metric of every knockout; its `clean` is the run that nothing was done to, and it has no
        `corrupt`.

    Raises:
        InputError: If positions are not found, or arguments do not fit together.
        MemoryError: If `memory_budget` is too small.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> sets = {"subject": "France", "relation": "capital of"}
        >>> metric = optlens.metrics.prob(" Paris")
        >>> result = knockout_sweep(
        ...     model, "The capital of France is", metric, -1, sets, window=2, progress=False
        ... )
        >>> result.labels["key"]
        ['subject', 'relation']
    """
    tokens, mask = prompts_on_host(model, prompt, attention_mask)
    real = real_tokens(tokens, mask)
    over = [over] if isinstance(over, str) else list(over)
    _check_axes(over, heads, window)
    query_names, query_sets = _sets(model, tokens, real, queries, "queries", "query" in over)
    key_names, key_sets = _sets(model, tokens, real, keys, "keys", "key" in over)
    choices = {
        "layer": select(layers, model.config.n_layers, "layers"),
        "head": select(heads, model.config.n_heads, "heads"),
        "query": query_names,
        "key": key_names,
    }
    cells = _cells(over, choices, window, model.config.n_layers)
    columns = torch.empty(len(tokens), 0, dtype=torch.long)
    cuts = Cuts(_at_columns(query_sets, real), _at_columns(key_sets, real), real)
    grid = Grid(tuple(over), {axis: choices[axis] for axis in over}, cells, columns, cuts)
    about = {"site": "attn_scores", "mode": "knockout", "window": window}
    about |= {"prompts": tokens.tolist()}
    for axis, names, sets in (("query", query_names, query_sets), ("key", key_names, key_sets)):
        about[axis] = dict(zip(map(str, names), sets, strict=True))
    with undisturbed(model):
        standing = Standing(model, interventions, spans)
        with standing.at_work(tokens, mask, "prompts"):
            base = run_base(model, tokens, mask, {"attn_scores"})
    finals = base.final, None
    sweep = Sweep(model, base, {}, grid, metric, finals, None, about, memory_budget, standing)
    return sweep.answer(dry_run, stream, progress, resume)


def _check_axes(over: list[str], heads: Selection, window: int) -> None:
    wrong = [axis for axis in over if axis not in AXES]
    if wrong or not over or len(set(over)) != len(over):
        raise checks.InputError(
            f"over={tuple(over)} must name at least one of the axes {', '.join(AXES)}, each once."
        )
    if heads is not None and "head" not in over:
        raise checks.InputError(
            f"heads were chosen, but 'head' is not among over={tuple(over)}; add it. For a knockout "
            "of several heads at once, use optlens.Knockout(layers, query, key, heads)."
        )
    if window < 1:
        raise checks.InputError(f"window={window}: a knockout acts in at least one layer.")


def _sets(
    model: OPTForCausalLM, tokens: Tensor, real: Tensor, given: Sets, name: str, swept: bool
) -> tuple[list[int | str], list[list[list[int]]]]:
    """Find what the entries of an axis mean.

    Returns:
        What they stand for; and for each entry and prompt the positions.
    """
    lengths = real.sum(-1).tolist()
    if isinstance(given, Mapping):
        if not swept:
            raise checks.InputError(
                f"{name}={dict(given)!r} are sets to try one at a time; add "
                f"{_AXIS_OF[name]!r} to over=."
            )
        if not given:
            raise checks.InputError(f"{name}={{}} names no set.")
        return [str(label) for label in given], [
            positions_of(model, tokens, real, each, f"{name}[{label!r}]")
            for label, each in given.items()
        ]
    if given is None and swept:
        entries, _ = positions_in_all(None, real)
        return entries, [[[entry % length] for length in lengths] for entry in entries]
    if given is None:
        return ["all"], [[list(range(length)) for length in lengths]]
    places = positions_of(model, tokens, real, given, name)
    return _one_by_one(places, lengths, name) if swept else (["chosen"], [places])


def _at_columns(sets: list[list[list[int]]], real: Tensor) -> Tensor:
    """Mark the columns of each set's positions, `[set, prompts, pos]` on the CPU."""
    columns = [row.nonzero().flatten() for row in real]
    chosen = torch.zeros(len(sets), *real.shape, dtype=torch.bool)
    for number, places in enumerate(sets):
        for row, place in enumerate(places):
            chosen[number, row, columns[row][place]] = True
    return chosen


def _one_by_one(
    places: list[list[int]], lengths: list[int], name: str
) -> tuple[list[int | str], list[list[list[int]]]]:
    """Make each position an entry of its own: the first of each prompt, the second, and so on."""
    if len({len(row) for row in places}) > 1:
        raise checks.InputError(
            f"{name} are {[len(row) for row in places]} positions in the prompts; one at a time "
            f"needs as many in each. Give them as one set: {name}={{'name': ...}}."
        )
    entries = []
    for number, row in enumerate(zip(*places, strict=True)):
        from_end = {place - length for place, length in zip(row, lengths, strict=True)}
        if len(set(row)) == 1:
            entries.append(row[0])
        else:
            entries.append(from_end.pop() if len(from_end) == 1 else f"{name} {number}")
    return entries, [[[place] for place in row] for row in zip(*places, strict=True)]


def _cells(over: list[str], choices: dict[str, list], window: int, n_layers: int) -> list[Cell]:
    """Lay out the knockouts, in the order of the flattened result."""
    site, cells = site_named("attn_scores"), []
    for index, entry in enumerate(itertools.product(*(range(len(choices[a])) for a in over))):
        at = dict(zip(over, entry, strict=True))
        center = choices["layer"][at["layer"]] if "layer" in at else None
        span = layers_written(center, window, choices["layer"], n_layers)
        head = choices["head"][at["head"]] if "head" in at else None
        cut = (at.get("query", 0), at.get("key", 0))
        cells.append(Cell(index, site, span, None, head, None, None, cut))
    return cells
