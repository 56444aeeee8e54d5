"""Sweeps under interventions: every run of the sweep has them, and one patch besides.

Where a patch and an intervention meet at a site, the intervention acts first and the patch has the
last word, as if hooks had been attached in this order. The runs that are recorded have them by
hooks; `StandingWave` applies them to the values that patched runs compute anew. All of them
change entries one by one, by the prompt and position where these stand, so that it makes no
difference which columns are computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.interventions import Ablate, Intervention
from optlens.interventions.address import Occurrence, items_of
from optlens.interventions.edits import Edit, Session
from optlens.interventions.store import describe_edits
from optlens.patching.group import Group
from optlens.patching.wave import Wave
from optlens.weights import effective_bias, effective_weight

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM

_SQUARES = ("attn_scores", "pattern")


class Standing:
    """Interventions that act on every run of a sweep.

    Attributes:
        session: The interventions meeting the model.
        about: They, described as in the provenance of a recording.
        by_tokens: Whether one of them may act in another way on another prompt of equal length.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        interventions: Intervention | Iterable[Intervention] = (),
        spans: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the interventions against the model, and make their reference runs.

        Args:
            model: The model, in eval mode and with no hook function attached.
            interventions: One, or several; none for an ordinary sweep.
            spans: Names for positions in them, as `model.intervene` takes them.

        Raises:
            InputError: If an intervention does not fit the model.
        """
        self.model, self.session = model, Session(model, interventions, spans)
        self.about = describe_edits(self.session.edits)
        self.by_tokens = any(_by_tokens(edit) for edit in self.session.edits)
        self._at: dict[tuple[str, int], list[tuple[str, Edit]]] = defaultdict(list)
        for hook, edit in self.session.hooks:
            site = edit.address.site
            layer = 0 if site == "embed" else int(hook.split(".")[1])
            self._at[site, layer].append((hook, edit))

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self.session.edits)

    @contextmanager
    def at_work(self, tokens: Tensor, mask: Tensor | None, what: str) -> Iterator[None]:
        """Let them act on runs over some prompts; `edited` goes by the prompts that came last.

        Args:
            tokens: Token ids, `[prompts, pos]`.
            mask: The padding mask, or None.
            what: What to call these prompts in errors.

        Raises:
            InputError: If the prompts lack what an intervention addresses.
        """
        try:
            self.session.bind_to(tokens, mask)
        except checks.InputError as error:
            raise checks.InputError(f"In the {what}: {error}") from error
        self._acted = {edit.number: _columns(edit, tokens.shape[1]) for edit in self.session.edits}
        with self.model.hooks(fwd_hooks=self.session.hooks):
            yield

    def check_site(self, site: str | Sequence[str]) -> None:
        """Refuse to sweep "result", which is done at z, where an intervention comes in between.

        Raises:
            InputError: If that is asked for.
        """
        sites = [site] if isinstance(site, str) else list(site)
        for edit in self.session.edits:
            if "result" in sites and edit.address.site == "result":
                raise checks.InputError(
                    f"The site 'result' is swept by patching z, on which {edit.intervention!r} would "
                    "act afterwards. Sweep 'z', which says that it is so, or intervene at 'z'."
                )

    def acts(self, site: str, layer: int, first: int = 0, end: int | None = None) -> bool:
        """Tell whether any of them changes columns from `first` up to `end` at a site of a block."""
        edits = self._at.get((site, layer), ())
        return any(bool(self._acted[edit.number][first:end].any()) for _, edit in edits)

    def edited(self, x: Tensor, site: str, layer: int, prompts: Tensor, columns: Tensor) -> Tensor:
        """Apply them to computed values.

        Args:
            x: Values of some columns, `[run, pos, ...]`.
            site: Whose.
            layer: Of which block.
            prompts: The prompt of each run, `[run]`.
            columns: The column of each entry, `[run, pos]`.

        Returns:
            The values after the interventions; `x` is left as it is.
        """
        square = site in _SQUARES
        x = x.transpose(1, 2) if square else x
        for hook, edit in self._at.get((site, layer), ()):
            x = edit.at_places(x, hook, prompts, columns)
        return x.transpose(1, 2) if square else x

    def numbers_per_token(self, length: int) -> int:
        """Count the numbers that explicit attention and results of heads make of one token."""
        config, sites = self.model.config, {site for site, _ in self._at}
        squares = 4 * config.n_heads * length if sites & {*_SQUARES} else 0
        return squares + (2 * config.n_heads * config.d_model if "result" in sites else 0)

    def held(self) -> list[Tensor]:
        """Return the recorded runs that they take values from."""
        runs = [getattr(edit.source, "values", {}) for edit in self.session.edits]
        return [value for run in runs for value in run.values()]


def _by_tokens(edit: Edit) -> bool:
    """Tell whether an intervention depends on which tokens a prompt has."""
    each, address = edit.intervention, edit.address
    if isinstance(each, Ablate) and each.mode == "resample":
        return True  # never of the same tokens
    places = [item for at in (address.pos, address.query, address.key) for item in items_of(at)]
    return any(
        isinstance(place, Occurrence) or (isinstance(place, str) and place not in edit.spans)
        for place in places
    )


def _columns(edit: Edit, length: int) -> Tensor:
    """Tell in which columns (queries, for edges) an edit acts in any prompt, `[pos]` on the CPU."""
    if edit.selected is None:
        return torch.ones(length, dtype=torch.bool)
    chosen = edit.selected.on(torch.device("cpu"))
    axis = 2 if edit.are_edges else 1
    return chosen.any(tuple(other for other in range(chosen.ndim) if other != axis))


class StandingWave(Wave):
    """A wave under interventions: what it computes at a site that they edit, they edit."""

    def __init__(self, standing: Standing, *shared: Any) -> None:
        """Keep the interventions and what all patches share; see `Wave`."""
        super().__init__(*shared)
        self.standing = standing

    def _whole(self, layer: int, flow: list[Group]) -> list[Group]:
        """Let interventions act on the new columns of a block's input, then complete the groups."""
        for group in flow:
            group.x = self._edited(group, group.x, "resid_pre", layer)
        return super()._whole(layer, flow)

    def _queries(self, layer: int, group: Group, own: Tensor) -> Tensor:
        """Let interventions act on the new queries, then complete them."""
        return super()._queries(layer, group, self._edited(group, own, "q", layer))

    def _all_keys(self, name: str, layer: int, group: Group, own: Tensor | None) -> Tensor:
        """Let interventions act on the new keys or values, then complete them."""
        own = None if own is None else self._edited(group, own, name, layer)
        return super()._all_keys(name, layer, group, own)

    def _edits_squares(self, layer: int, group: Group) -> bool:
        """Take the explicit path also where interventions edit scores or the pattern."""
        acts = any(self.standing.acts(name, layer, *_span(group, group.x)) for name in _SQUARES)
        return acts or super()._edits_squares(layer, group)

    def _settled(self, group: Group, x: Tensor, name: str, layer: int) -> Tensor:
        """Let interventions act on what a group has computed, then its patches."""
        # queries and a block's input are done by now, before recorded columns were added to them
        if name != "q" and (name != "resid_pre" or layer == 0):
            x = self._edited(group, x, name, layer)
        return super()._settled(group, x, name, layer)

    def _add_heads(self, flow: list[Group], layer: int) -> None:
        """Sum over heads one by one where interventions edit what each of them adds."""
        if not self.standing.acts("result", layer):
            super()._add_heads(flow, layer)
            return
        out_proj = self.model.decoder.layers[layer].self_attn.out_proj
        w_o = effective_weight(out_proj).unflatten(1, self.heads)  # [d_model, head, d_head]
        bias = effective_bias(out_proj)
        for group in flow:
            result = torch.einsum("rphe,dhe->rphd", group.x, w_o)
            total = self._edited(group, result, "result", layer).sum(2)
            group.x = total if bias is None else total + bias

    def _edited(self, group: Group, x: Tensor, name: str, layer: int) -> Tensor:
        """Return a group's first columns of a site after the interventions."""
        if not self.standing.acts(name, layer, *_span(group, x)):
            return x
        columns = group.columns[:, : x.shape[1]]
        return self.standing.edited(x, name, layer, group.prompts, columns)


def _span(group: Group, x: Tensor) -> tuple[int, int | None]:
    """Return between which columns those of a group's value are."""
    return group.first, group.first + x.shape[1] if group.contiguous else None
