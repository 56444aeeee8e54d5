"""The ends of paths: components that send along the residual stream, and inputs that receive."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

from torch import Tensor

from optlens import checks
from optlens.config import OPTConfig
from optlens.patching.grid import positions_in_all
from optlens.selection import select

INPUTS = ("q", "k", "v")
_AXES_OF = {"heads": ("layer", "head"), "mlps": ("layer",), "list": ("sender",)}
_SENDER_FORMS = (
    "A sender is (layer, head), (layer, 'mlp') or 'embed'; senders= is 'heads', 'mlps', a list of "
    "senders, or of lists of them that send together."
)
_RECEIVER_FORMS = (
    "A receiver is (layer, head, 'q'), with 'k' or 'v' likewise, (layer, head) for all three, "
    "(layer, 'mlp') or 'final'; receivers= is one of these or a list."
)


class Sender(NamedTuple):
    """One component that writes to the residual stream.

    Attributes:
        layer: Its block; -1 for the embedding.
        what: The number of a head, "mlp" or "embed".
    """

    layer: int
    what: int | str

    @property
    def stage(self) -> int:
        """When it writes: two stages to a block."""
        return 2 * self.layer + (self.what == "mlp")

    def __str__(self) -> str:
        return "embed" if self.what == "embed" else f"{self.layer}.{self.what}"


@dataclass(frozen=True)
class Receivers:
    """The inputs that see what is sent.

    Attributes:
        heads: For ("q", layer) and the like, which heads.
        mlps: Which MLPs.
        final: Whether what the unembedding reads is it; then nothing else is.
    """

    heads: dict[tuple[str, int], list[int]]
    mlps: list[int]
    final: bool

    def stage(self, n_layers: int) -> int:
        """When the last of them reads; a sender of an earlier stage has a path to it."""
        if self.final:
            return 2 * n_layers
        return max([2 * layer for _, layer in self.heads] + [2 * n + 1 for n in self.mlps])

    def __str__(self) -> str:
        names = [
            f"{layer}.{head}.{part}" for (part, layer), hs in self.heads.items() for head in hs
        ]
        names += [f"{layer}.mlp" for layer in self.mlps] + (["final"] if self.final else [])
        return ", ".join(names)


@dataclass(frozen=True)
class PathCell:
    """One entry of the result: which components send, from which position.

    Attributes:
        senders: They all send at once.
        pos: Index into the chosen positions; None for all.
    """

    senders: tuple[Sender, ...]
    pos: int | None


def parse_receivers(given: Any, config: OPTConfig) -> Receivers:
    """Read what a user gives as `receivers`.

    Raises:
        InputError: If an entry is of no known form or there is no such layer or head.
    """
    given = [given] if isinstance(given, str) or _is_one(given) else given
    heads: dict[tuple[str, int], list[int]] = {}
    mlps, final = [], False
    for entry in _listed(given, "receivers", _RECEIVER_FORMS):
        if entry == "final":
            final = True
        elif _is_one(entry) and len(entry) == 2 and entry[1] == "mlp":
            mlps += select(index(entry[0]), config.n_layers, "layer")
        elif _is_head(entry) and (len(entry) == 2 or entry[2:] in {(p,) for p in INPUTS}):
            (layer,) = select(index(entry[0]), config.n_layers, "layer")
            (head,) = select(index(entry[1]), config.n_heads, "head")
            for part in entry[2:] or INPUTS:
                heads.setdefault((part, layer), []).append(head)
        else:
            raise checks.InputError(f"{entry!r} is no receiver. {_RECEIVER_FORMS}")
    if final and (heads or mlps):
        raise checks.InputError(
            "'final' among other receivers would undo them: it sets the last residual stream to what "
            "the direct path alone makes of it. Ask for 'final' by itself."
        )
    sets = {key: sorted(set(numbers)) for key, numbers in heads.items()}
    return Receivers(sets, sorted(set(mlps)), final)


def parse_senders(given: Any, config: OPTConfig, receivers: Receivers) -> list[tuple[Sender, ...]]:
    """Read a list of senders, each one component or several that send together.

    Raises:
        InputError: If an entry is of no known form, there is no such layer or head, or it comes
            after all receivers.
    """
    given = [given] if isinstance(given, str) or _is_one(given) else given
    groups = []
    for entry in _listed(given, "senders", _SENDER_FORMS):
        group = entry if isinstance(entry, list) else [entry]
        senders = tuple(_sender(one, config) for one in group)
        if not senders:
            raise checks.InputError(f"A list of senders is empty. {_SENDER_FORMS}")
        late = [str(one) for one in senders if one.stage >= receivers.stage(config.n_layers)]
        if late:
            raise checks.InputError(
                f"The sender {', '.join(late)} comes after the receivers {receivers}: there is no "
                "path from it to them."
            )
        groups.append(senders)
    return groups


@dataclass(frozen=True, eq=False)
class PathGrid:
    """All entries of a result.

    Attributes:
        axes: The names of its axes.
        choices: For each axis what its entries stand for.
        cells: The entries, in the order of the flattened result.
        columns: Where the positions that "pos" runs over are in each prompt's row,
            `[prompts, positions]`.
    """

    axes: tuple[str, ...]
    choices: dict[str, list]
    cells: list[PathCell]
    columns: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(len(self.choices[axis]) for axis in self.axes)


def lay_out(
    config: OPTConfig,
    senders: Any,
    receivers: Receivers,
    over: Sequence[str] | str | None,
    real: Tensor,
    chosen: dict[str, Any],
) -> PathGrid:
    """Lay out the entries of a result.

    Args:
        config: The model's config.
        senders: As the user gave it.
        receivers: What receives.
        over: The axes, or None for all but "pos".
        real: True at real tokens, `[prompts, pos]`.
        chosen: The user's "layer", "head" and "pos", None where not given.

    Raises:
        InputError: If axes and senders do not fit together.
    """
    kind = senders if isinstance(senders, str) and senders in _AXES_OF else "list"
    over = [over] if isinstance(over, str) else list(_AXES_OF[kind] if over is None else over)
    _check_axes(over, kind, chosen)
    groups = parse_senders(senders, config, receivers) if kind == "list" else []
    positions, columns = positions_in_all(chosen["pos"], real)
    choices = {
        "layer": select(chosen["layer"], config.n_layers, "layers"),
        "head": select(chosen["head"], config.n_heads, "heads"),
        "sender": [" + ".join(map(str, group)) for group in groups],
        "pos": positions,
    }
    cells = []
    for entry in itertools.product(*(range(len(choices[axis])) for axis in over)):
        at = dict(zip(over, entry, strict=True))
        here = {axis: choices[axis][at[axis]] for axis in ("layer", "head") if axis in at}
        layers = [here["layer"]] if "layer" in here else choices["layer"]
        if kind == "list":
            sending = groups[at["sender"]] if "sender" in at else itertools.chain(*groups)
        elif kind == "mlps":
            sending = (Sender(layer, "mlp") for layer in layers)
        else:
            heads = [here["head"]] if "head" in here else choices["head"]
            sending = (Sender(layer, head) for layer in layers for head in heads)
        cells.append(PathCell(tuple(sending), at.get("pos")))
    return PathGrid(tuple(over), {axis: choices[axis] for axis in over}, cells, columns)


def _check_axes(over: list[str], kind: str, chosen: dict[str, Any]) -> None:
    allowed = (*_AXES_OF[kind], "pos")
    if not over or len(set(over)) != len(over) or not set(over) <= set(allowed):
        raise checks.InputError(
            f"over={tuple(over)} must name at least one of the axes {', '.join(allowed)}, each once: "
            f"these are the axes where senders are {'a list' if kind == 'list' else kind}."
        )
    for axis, numbers in chosen.items():
        if numbers is not None and axis not in allowed:
            raise checks.InputError(
                f"{axis}s were chosen, which has no meaning where senders are "
                f"{'a list' if kind == 'list' else kind}."
            )
    if chosen["pos"] is not None and "pos" not in over:
        raise checks.InputError("positions were chosen, but 'pos' is not in over=; add it.")


def _sender(entry: Any, config: OPTConfig) -> Sender:
    if entry == "embed":
        return Sender(-1, "embed")
    if _is_one(entry) and len(entry) == 2:
        (layer,) = select(index(entry[0]), config.n_layers, "layer")
        if entry[1] == "mlp":
            return Sender(layer, "mlp")
        if _is_head(entry):
            (head,) = select(index(entry[1]), config.n_heads, "head")
            return Sender(layer, head)
    raise checks.InputError(f"{entry!r} is no sender. {_SENDER_FORMS}")


def _is_one(entry: Any) -> bool:
    """Tell a single sender or receiver, which is a tuple that begins with a layer."""
    return isinstance(entry, tuple) and 2 <= len(entry) <= 3 and hasattr(entry[0], "__index__")


def _is_head(entry: Any) -> bool:
    return _is_one(entry) and hasattr(entry[1], "__index__")


def _listed(given: Any, name: str, forms: str) -> list:
    if not isinstance(given, list | tuple) or not given:
        raise checks.InputError(f"{name}={given!r} is no list of at least one. {forms}")
    return list(given)
