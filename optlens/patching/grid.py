"""Which patches a sweep consists of: the product of its axes, each cell one set of writes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from optlens import checks
from optlens.patching.cuts import Cuts
from optlens.patching.places import Places, Positions
from optlens.patching.sites import SITES, Site, sites_named
from optlens.selection import Selection, select, select_positions

AXES = ("component", "layer", "head", "pos", "neuron", "key")
_NEEDS = {"head": "head", "neuron": "d_mlp", "key": "key"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One patch of a sweep. None stands for all.

    Attributes:
        index: Its place in the flattened result.
        site: What is written.
        layers: The blocks in which it is written.
        pos: Index into the sweep's positions (queries, for pattern and scores).
        head: The head.
        neuron: The neuron of the MLP.
        key: Index into the sweep's positions: which source position of the pattern.
        cut: Instead of a write, a knockout: indices into the query sets and key sets of the grid's
            `cuts`.
    """

    index: int
    site: Site
    layers: range
    pos: int | None
    head: int | None
    neuron: int | None
    key: int | None
    cut: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Grid:
    """All patches of a sweep.

    Attributes:
        axes: The names of the result's axes.
        choices: For each axis what its entries stand for: site names, numbers of blocks, heads,
            neurons, positions.
        cells: The patches, in the order of the flattened result.
        columns: Where the chosen positions are in each prompt's row, `[prompts, positions]`.
        cuts: Which edges of attention the cells cut, if they do.
    """

    axes: tuple[str, ...]
    choices: dict[str, list]
    cells: list[Cell]
    columns: Tensor
    cuts: Cuts | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(len(self.choices[axis]) for axis in self.axes)


def make_grid(
    model_config,
    site: str | Sequence[str],
    over: Sequence[str],
    real: Tensor,
    layers: Selection = None,
    heads: Selection = None,
    positions: Places | Positions = None,
    neurons: Selection = None,
    window: int = 1,
) -> Grid:
    """Lay out a sweep.

    Args:
        model_config: The model's `OPTConfig`.
        site: One site, or several as the axis "component".
        over: The axes of the result, of `AXES`.
        real: True at real tokens, `[prompts, pos]`.
        layers: Blocks to sweep over (or to write all at once, if "layer" is no axis); all of them.
        heads: Likewise.
        positions: Likewise; counted over each prompt's real tokens, negative from the end; texts
            looked up by `places_of`.
        neurons: Likewise.
        window: Blocks that one patch writes: this many around the entry of the layer axis.

    Raises:
        InputError: If an axis does not exist, is named twice or does not fit the site.
    """
    sites = sites_named(site)
    over = axes_of(site, over)
    if window < 1:
        raise checks.InputError(f"window={window}: a patch writes at least one layer.")
    chosen_positions, columns = positions_in_all(positions, real)
    choices = {
        "component": [each.name for each in sites],
        "layer": select(layers, model_config.n_layers, "layers"),
        "head": select(heads, model_config.n_heads, "heads"),
        "pos": chosen_positions,
        "neuron": select(neurons, model_config.d_mlp, "neurons"),
        "key": chosen_positions,
    }
    restricted = {"head": heads, "pos": positions, "neuron": neurons}
    for axis, chosen in restricted.items():
        if chosen is not None and axis not in over and not (axis == "pos" and "key" in over):
            raise checks.InputError(
                f"{axis}s were chosen, but {axis!r} is not among over={tuple(over)}; add it."
            )
    all_layers = choices["layer"]
    cells = []
    for index, entry in enumerate(itertools.product(*(range(len(choices[a])) for a in over))):
        at = dict(zip(over, entry, strict=True))
        center = all_layers[at["layer"]] if "layer" in at else None
        cells.append(
            Cell(
                index,
                sites[at.get("component", 0)],
                range(1)
                if sites[at.get("component", 0)].name == "embed"
                else layers_written(center, window, all_layers, model_config.n_layers),
                at.get("pos"),
                choices["head"][at["head"]] if "head" in at else None,
                choices["neuron"][at["neuron"]] if "neuron" in at else None,
                at.get("key"),
            )
        )
    return Grid(tuple(over), {axis: choices[axis] for axis in over}, cells, columns)


def layers_written(center: int | None, window: int, layers: list[int], n_layers: int) -> range:
    """Give the blocks that a patch writes: a window around one, or all from first to last."""
    if center is None:
        span = range(min(layers), max(layers) + 1)
        if list(span) != sorted(layers):
            raise checks.InputError(
                f"layers={layers} has gaps; without 'layer' in over=, all of a range are written."
            )
        return span
    # the window of causal tracing: as many before as after, one more before where it is even
    return range(max(0, center - window // 2), min(n_layers, center - (-window // 2)))


def axes_of(site: str | Sequence[str], over: str | Sequence[str]) -> list[str]:
    """Return the axes of a sweep's result; several sites are one, the first unless named.

    Args:
        site: One site, or several.
        over: The axes that were asked for.

    Raises:
        InputError: If an axis does not exist, is named twice or does not fit the site.

    Example:
        >>> axes_of(["attn_out", "mlp_out"], ("layer", "pos"))
        ['component', 'layer', 'pos']
    """
    sites = sites_named(site)
    over = [over] if isinstance(over, str) else list(over)
    if len(sites) > 1 and "component" not in over:
        over = ["component", *over]
    for axis in over:
        if axis not in AXES:
            raise checks.InputError(
                f"over={tuple(over)} names {axis!r}; the axes are {', '.join(AXES)}."
            )
        for site in sites:
            if axis in _NEEDS and _NEEDS[axis] not in site.axes:
                raise checks.InputError(
                    f"The site {site.name!r} has the axes {', '.join(site.axes)}, so a sweep over "
                    f"{axis!r} means nothing there. Sites that have it: {_with_axis(_NEEDS[axis])}."
                )
            if axis == "layer" and site.name == "embed":
                raise checks.InputError("The site 'embed' comes once, not in every layer.")
    if len(set(over)) != len(over) or not over:
        raise checks.InputError(f"over={tuple(over)} must name at least one axis, each once.")
    return over


def _with_axis(axis: str) -> str:
    return ", ".join(site.name for site in SITES.values() if axis in site.axes)


def positions_in_all(chosen: Places | Positions, real: Tensor) -> tuple[list, Tensor]:
    """Resolve positions of a sweep, which every prompt must have.

    Args:
        chosen: What was asked for; None for all, from the end where lengths differ, since that is
            where prompts of unequal length are asked alike.
        real: True at real tokens, `[prompts, pos]` on the CPU.

    Returns:
        The positions, and their columns, `[prompts, positions]`; see `optlens.selection`.
    """
    if isinstance(chosen, Places):
        return chosen.entries, chosen.columns
    if chosen is None:
        lengths = real.sum(-1)
        shortest, longest = int(lengths.min()), int(lengths.max())
        chosen = range(shortest) if shortest == longest else range(-shortest, 0)
    return select_positions(chosen, real)
