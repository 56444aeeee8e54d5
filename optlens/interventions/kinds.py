"""The kinds of interventions: what is done to a run, as data.

Each is a frozen dataclass that can be printed, compared and saved. Making one checks all that can
be checked without a model; `optlens.interventions.edits` turns it into hook functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from optlens import checks
from optlens.interventions.address import EDGES, SITES, Address, Index, Place, as_index
from optlens.interventions.held import HeldRun, held_run
from optlens.interventions.intervention import Intervention, Prompts, as_prompts, check_numbers
from optlens.recording import Recording
from optlens.selection import show

MODES = ("zero", "mean", "resample")


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention):
    """Write a given value.

    Attributes:
        site: Where: `embed resid_pre resid_mid resid_post attn_out mlp_out q k v z result
            mlp_pre mlp_post pattern attn_scores`.
        layer: Which blocks: a number (negative from the end), several, a slice, or None for all.
        pos: Which positions: likewise, counted over each prompt's real tokens, -1 the newest; or a
            token's text such as " John", `(" John", 1)` for its second place, a span's name.
        head: Which heads, at sites that have heads.
        neuron: Which neurons, at "mlp_pre" and "mlp_post".
        value: What to write, a tensor or a number. It is broadcast as NumPy does on assignment to
            `activations[layer, batch, pos, head]`: the axes are `layer batch pos` and those of
            the site (`d_model`; `head d_head`; `neuron`; for edges `layer batch head query key`),
            without those that are addressed by a single number. With `pos=None` its pos axis runs
            over the columns of the (padded) batch.
        query: Which querying positions, at "pattern" and "attn_scores", in place of `pos`.
        key: Which positions they look at, likewise. Pairs that are masked (later tokens, padding)
            stay as they are.

    Raises:
        InputError: If the site does not exist or lacks the axis that is addressed, or the value
            has NaN in it.

    Example:
        >>> import torch
        >>> Patch("resid_post", layer=5, pos=-1, value=torch.zeros(768))
        Patch('resid_post', layer=5, pos=-1, value=tensor[768] float32)
    """

    site: str
    layer: Index = None
    pos: Place = None
    head: Index = None
    neuron: Index = None
    value: Tensor | float | None = None
    query: Place = None
    key: Place = None

    def _check(self) -> None:
        if self.value is None:
            raise checks.InputError("Patch needs value=, the tensor (or number) to write.")
        check_numbers(self, "value", infinite=self.site == "attn_scores")


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Take away what a component says: write zeros, a mean, or another prompt's activation.

    Attributes:
        site: Where, as for `Patch`.
        layer: Which blocks, as for `Patch`.
        head: Which heads.
        neuron: Which neurons.
        pos: Which positions.
        mode: "zero"; "mean" of the model's unedited runs on `reference`, over all its prompts and
            real positions (`</s>` included); "resample", the activation at the same position of
            one reference prompt of equal length, drawn for each prompt.
        reference: Prompts for "mean" and "resample": a text, a list of texts, or token ids.
        per_position: Take the mean for each position on its own; the reference prompts must then
            have as many tokens each.
        seed: Of the draw of "resample".
        query: Which querying positions, at "pattern" and "attn_scores", in place of `pos`.
        key: Which positions they look at.

    Raises:
        InputError: If the address is wrong, or a reference is missing or given in vain.

    Example:
        >>> Ablate("z", layer=9, head=6, mode="mean", reference=["A b c", "D e f"])
        Ablate('z', layer=9, head=6, mode='mean', reference=<2 prompts>)
    """

    site: str
    layer: Index = None
    head: Index = None
    neuron: Index = None
    pos: Place = None
    mode: Literal["zero", "mean", "resample"] = "zero"
    reference: Prompts | None = None
    per_position: bool = False
    seed: int = 0
    query: Place = None
    key: Place = None

    def _check(self) -> None:
        self._set("reference", as_prompts(self.reference, "reference"))
        if self.mode not in MODES:
            raise checks.InputError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if (self.mode == "zero") != (self.reference is None):
            why = {
                "zero": "mode='zero' writes zeros and has no use for a reference; leave it out, or "
                "take mode='mean'.",
                "mean": "A mean ablation needs reference=, the prompts to take the mean over: "
                "typical text, or the prompts of the experiment themselves.",
                "resample": "A resample ablation needs reference=, the prompts of which one lends "
                "its activation; they need as many tokens as the prompt that is run.",
            }
            raise checks.InputError(why[self.mode])
        if self.per_position and self.mode != "mean":
            raise checks.InputError(f"per_position goes with mode='mean', not {self.mode!r}.")
        if self.mode == "mean" and SITES[self.site] == EDGES and not self.per_position:
            raise checks.InputError(
                f"A mean over positions makes no sense at {self.site!r}, whose axes are positions; "
                "pass per_position=True with reference prompts as long as the prompt."
            )


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Intervention):
    """Add `scale * vector`, by default to the residual stream from a position on.

    It acts on tokens to come as well, when a run continues with cached keys and values.

    Attributes:
        layer: Which blocks, as for `Patch`.
        vector: What to add, `[d_model]` at the residual stream, `[d_head]` (with `head`) at "z";
            further axes as for the value of `Patch`. Gradients flow into it.
        scale: How much of it.
        site: Where, as for `Patch`.
        start: From which position on; negative from the end.
        pos: Which positions instead, as for `Patch`.
        head: Which heads.
        neuron: Which neurons.

    Raises:
        InputError: If the address is wrong, both `start` and `pos` are given, or the vector has NaN
            or infinity in it.

    Example:
        >>> import torch
        >>> Steer(layer=8, vector=torch.ones(768), scale=4.0)
        Steer(layer=8, vector=tensor[768] float32, scale=4.0)
    """

    layer: Index = None
    vector: Tensor | float | None = None
    scale: float = 1.0
    site: str = "resid_post"
    start: int = 0
    pos: Place = None
    head: Index = None
    neuron: Index = None

    def _check(self) -> None:
        if self.vector is None:
            raise checks.InputError("Steer needs vector=, what to add.")
        check_numbers(self, "vector")
        check_numbers(self, "scale")
        self._set("start", as_index(self.start, "start"))
        if not isinstance(self.start, int):
            raise checks.InputError(
                f"start must be one position, got {self.start!r}; or give pos=."
            )
        if self.pos is not None and self.start != 0:
            raise checks.InputError(f"Give start={self.start} or pos={show(self.pos)}, not both.")
        if SITES[self.site] == EDGES:
            raise checks.InputError(
                f"Steer adds at positions; site {self.site!r} has pairs of them. Take Patch or Scale."
            )

    @property
    def address(self) -> Address:
        """Where it acts."""
        from_start = slice(self.start, None) if self.start else None
        pos = from_start if self.pos is None else self.pos
        return Address(self.site, self.layer, pos, self.head, self.neuron)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Intervention):
    """Multiply by a factor: 0 removes, 1 changes nothing, -1 turns round.

    Attributes:
        site: Where, as for `Patch`.
        layer: Which blocks, as for `Patch`.
        head: Which heads.
        neuron: Which neurons.
        pos: Which positions.
        factor: What to multiply with.
        query: Which querying positions, at "pattern" and "attn_scores", in place of `pos`.
        key: Which positions they look at. Rows of the pattern are not renormalised.

    Raises:
        InputError: If the address is wrong or there is no finite factor.

    Example:
        >>> Scale("mlp_post", layer=2, neuron=77, factor=0)
        Scale('mlp_post', layer=2, neuron=77, factor=0)
    """

    site: str
    layer: Index = None
    head: Index = None
    neuron: Index = None
    pos: Place = None
    factor: float | None = None
    query: Place = None
    key: Place = None

    def _check(self) -> None:
        if self.factor is None or isinstance(self.factor, Tensor):
            raise checks.InputError(f"Scale needs factor=, a number; got {self.factor!r}.")
        check_numbers(self, "factor")


@dataclass(frozen=True, eq=False, repr=False)
class Knockout(Intervention):
    """Cut attention edges: scores become -inf before the softmax, so the other edges share.

    A query that is left without any key attends to nothing: its z is 0.

    Attributes:
        layers: Which blocks, as for `Patch`.
        query: Which positions do not see, as `pos` of `Patch`; None for all.
        key: Which positions they do not see, likewise.
        heads: Which heads; None for all.

    Raises:
        InputError: If neither query nor key is given.

    Example:
        >>> Knockout(layers=range(4), query=-1, key=3)
        Knockout(layers=range(0, 4), query=-1, key=3)
    """

    layers: Index = None
    query: Place = None
    key: Place = None
    heads: Index = None

    def _check(self) -> None:
        if self.query is None and self.key is None:
            raise checks.InputError(
                "Knockout needs query=, key= or both: with neither it would cut every edge. To "
                "take attention away as a whole, Ablate('attn_out', ...)."
            )

    @property
    def address(self) -> Address:
        """Where it acts."""
        return Address("attn_scores", self.layers, None, self.heads, None, self.query, self.key)


@dataclass(frozen=True, eq=False, repr=False)
class Freeze(Intervention):
    """Hold a site at its values in another run, position by position.

    Attributes:
        site: Where, as for `Patch`.
        layer: Which blocks, as for `Patch`.
        source: The run to hold it at: a prompt (it is run on the unedited model), a `Recording` or
            an `ActivationCache` that holds the site in all heads and positions, or a mapping of
            hook names to tensors. One prompt for all, or one for each; as many tokens as those run.
        pos: Which positions; in a run that continues with cached keys and values, tokens that
            the source does not have are left alone.
        head: Which heads.
        neuron: Which neurons.
        query: Which querying positions, at "pattern" and "attn_scores", in place of `pos`.
        key: Which positions they look at.

    Raises:
        InputError: If the address is wrong or the source does not hold the site.

    Example:
        >>> Freeze("pattern", source="When John and Mary met, John")
        Freeze('pattern', source=<1 prompt>)
    """

    site: str
    layer: Index = None
    source: Prompts | HeldRun | None = None
    pos: Place = None
    head: Index = None
    neuron: Index = None
    query: Place = None
    key: Place = None

    def _check(self) -> None:
        if self.source is None:
            raise checks.InputError(
                "Freeze needs source=, the run to hold the site at: a prompt, a Recording, a cache."
            )
        if isinstance(self.source, Recording | Mapping):
            self._set("source", held_run(self.source, self.site, self.layer))
        elif not isinstance(self.source, HeldRun):
            self._set("source", as_prompts(self.source, "source"))


KINDS = {kind.__name__: kind for kind in (Patch, Ablate, Steer, Scale, Knockout, Freeze)}
