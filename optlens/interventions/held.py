"""A run as a source of activations: what a recording, a cache or a mapping of hooks holds of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from optlens import checks
from optlens.cache import ActivationCache
from optlens.interventions.address import SITES, Index
from optlens.names import get_act_name
from optlens.recording import Recording
from optlens.selection import select


@dataclass(frozen=True, eq=False)
class HeldRun:
    """One site's activations in a run.

    Attributes:
        values: Hook name to value, each with a batch axis, shaped as in the table of hooks.
        real: True at real tokens, `[batch, pos]`; None if that is not known.
    """

    values: dict[str, Tensor]
    real: Tensor | None = None

    def __repr__(self) -> str:
        """Name the hooks."""
        names = list(self.values)
        return f"<{', '.join(names[:3])}{', ...' * (len(names) > 3)}>"


def held_run(source: Recording | Mapping[str, Tensor], site: str, layer: Index) -> HeldRun:
    """Take from a source what it holds of a site.

    Args:
        source: A `Recording`, an `ActivationCache`, or any mapping of full hook names to tensors.
        site: One of `SITES`.
        layer: The blocks that are needed; where the source does not tell how many there are, and
            for None, all that it holds.

    Raises:
        InputError: If the source lacks a block that is needed, or holds only some of the
            positions.
    """
    if isinstance(source, Recording):
        n_layers, known, real = _of_recording(source, site)
    else:
        n_layers = source.n_layers if isinstance(source, ActivationCache) else None
        known, real = {str(name): value for name, value in source.items()}, None
    if site == "embed":
        wanted = ["hook_embed"]
    elif n_layers is None or layer is None:
        pattern = re.compile(re.escape(get_act_name(site, 0)).replace("0", r"\d+", 1))
        wanted = [name for name in known if pattern.fullmatch(name)]
    else:
        wanted = [get_act_name(site, i) for i in select(layer, n_layers, "layer")]
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        what = missing[0] if missing else f"hooks of {site!r}"
        raise checks.InputError(
            f"The source does not hold {what}, only {_some(known)}. Record it with "
            f"model.record(prompt, what={site!r}), or pass the prompt itself as source=."
        )
    return HeldRun({name: _with_batch(name, known[name], site) for name in wanted}, real)


def _with_batch(name: str, value: Tensor, site: str) -> Tensor:
    n_axes = 1 + len(SITES[site])
    value = value.detach()
    value = value[None] if value.ndim == n_axes - 1 else value
    if value.ndim != n_axes:
        raise checks.InputError(
            f"{name!r} of the source has shape {tuple(value.shape)}; expected "
            f"[batch, {', '.join(SITES[site])}], or one prompt's without the batch axis."
        )
    return value


def _of_recording(rec: Recording, site: str) -> tuple[int, dict[str, Tensor], Tensor]:
    """Return the number of blocks, what a recording holds of a site by hook name, and its mask."""
    config = rec.metadata["config"]
    n_layers, width = config["num_hidden_layers"], rec.tokens.shape[-1]
    if rec.positions != list(range(width)) or rec.heads != list(
        range(config["num_attention_heads"])
    ):
        raise checks.InputError(
            f"The recording holds positions {rec.positions} and heads {rec.heads} only; record "
            "without pos= and heads= to hold a run at it."
        )
    found: dict[str, Tensor] = {}
    layer_axis = int(rec.is_batch)
    if "attention" in rec.what and site == "pattern":
        for row, layer in enumerate(rec.layers):
            found[get_act_name("pattern", layer)] = rec.attention.select(layer_axis, row)
    if "residual" in rec.what and site in ("resid_pre", "resid_post"):
        for row, layer in enumerate(rec.layers):
            found[get_act_name("resid_post", layer)] = rec.residual.select(layer_axis, row + 1)
        found[get_act_name("resid_pre", 0)] = rec.residual.select(layer_axis, 0)
    for name in rec.what:
        full = get_act_name(name) if "hook_" in name else None
        if full is not None:
            found[full] = rec[full]
        elif get_act_name(name, 0) == get_act_name(site, 0):
            for row, layer in enumerate(rec.layers):
                found[get_act_name(site, layer)] = rec[name].select(layer_axis, row)
    real = rec.mask.cpu()
    return n_layers, found, real if rec.is_batch else real[None]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing of it"
