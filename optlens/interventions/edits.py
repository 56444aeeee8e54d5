"""From interventions to hook functions.

An `Edit` is one intervention meeting one model. A `Session` is a list of them during a `with`
block; before each forward pass it looks at the pass's tokens and tells every edit which columns are
meant, so that whatever is wrong raises before anything is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from optlens import checks
from optlens.hooks import HookPoint
from optlens.inputs import Inputs
from optlens.interventions.address import EDGES, SITES, items_of
from optlens.interventions.held import HeldRun
from optlens.interventions.intervention import Intervention
from optlens.interventions.kinds import Ablate, Freeze, Knockout, Patch, Scale, Steer
from optlens.interventions.passes import Chosen, Pass, Spans
from optlens.interventions.reference import References
from optlens.interventions.values import (
    Average,
    Borrowed,
    Given,
    Means,
    PerDevice,
    Resampled,
    Source,
    take_columns,
)

if TYPE_CHECKING:
    from optlens.base import OPTBase
    from optlens.kv_cache import KVCache

_numbers = itertools.count()


class Edit:
    """One intervention meeting one model: a hook function for each of its hooks."""

    def __init__(
        self,
        intervention: Intervention,
        model: OPTBase,
        spans: Spans,
        references: References,
    ) -> None:
        """Check the address against the model, and run what the intervention refers to.

        Args:
            intervention: What to do.
            model: The model.
            spans: Names for positions; those that the intervention uses are kept.
            references: The runs that it and others of its list refer to.

        Raises:
            InputError: If the model lacks what is addressed.
        """
        self.intervention = intervention
        self.number = next(_numbers)  # in the order of the list, across nested contexts
        config, address = model.config, intervention.address
        self.address, self.hooks = address, address.hooks(config)
        places = (address.pos, address.query, address.key)
        names = [name for place in places for name in items_of(place) if isinstance(name, str)]
        self.spans = {name: spans[name] for name in names if name in spans}
        self.are_edges = SITES[address.site] == EDGES
        narrowed = address.chosen(config)
        self.axis = None if narrowed is None else narrowed[0]
        self.indices = None if narrowed is None else PerDevice(torch.tensor(narrowed[1]))
        self.source = _source(intervention, model, references)
        self.bound_to: tuple[int, int] | None = None  # batch and columns of the pass
        self.inputs: ReferenceType[Inputs] | None = None

    def bind(self, run: Pass, inputs: ReferenceType[Inputs] | None = None) -> None:
        """Find out which columns are meant in the pass that begins.

        Args:
            run: The pass.
            inputs: What the decoder was given for it. They are gone when it is over, however it
                ended; None if it may act in any pass of this shape.

        Raises:
            InputError: If an addressed position does not exist or a value does not fit.
        """
        axes = ("query", "key") if self.are_edges else ("pos",)
        chosen = {axis: run.choose(getattr(self.address, axis), axis) for axis in axes}
        limits = {} if self.source is None else self.source.bind(run, chosen)
        self.selected = self._selected(run, chosen, limits)
        self.acts = self.selected is None or bool(self.selected.on(torch.device("cpu")).any())
        self.bound_to, self.inputs = (run.batch, run.n_query), inputs

    def _selected(
        self, run: Pass, chosen: dict[str, Chosen], limits: dict[str, Tensor]
    ) -> PerDevice | None:
        """Return where the hook's value is to be replaced, shaped like it; None for everywhere."""
        if not self.are_edges and chosen["pos"].is_all and not limits:
            return None
        columns = {
            axis: (choice.slots >= 0) & limits.get(axis, torch.tensor(True))
            for axis, choice in chosen.items()
        }
        if self.are_edges:
            query, key = columns["query"], columns["key"]
            return PerDevice(query[:, None, :, None] & key[:, None, None, :] & run.visible)
        more_axes = len(SITES[self.address.site]) - 1
        return PerDevice(columns["pos"][(...,) + (None,) * more_axes])

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        """Edit a hook's value, its own copy."""
        shape = (value.shape[0], value.shape[2 if self.are_edges else 1])
        if shape != self.bound_to or (self.inputs is not None and self.inputs() is None):
            raise checks.InputError(self._astray(shape))
        return self._edited(value, hook.name, lambda numbers: numbers) if self.acts else None

    def at_places(self, value: Tensor, hook: str, prompts: Tensor, columns: Tensor) -> Tensor:
        """Edit a part of the pass that this is bound to, for who computes only that part.

        Args:
            value: Rows of a hook's value, with some columns only: `[run, pos, ...]`, or
                `[run, head, query, key]` with all keys. It is left as it is.
            hook: The hook's name.
            prompts: Which prompt of the pass each row belongs to, `[run]`.
            columns: Which of its columns there are, `[run, pos]`; queries, for edges.

        Returns:
            The value after the edit.
        """

        def there(numbers: Tensor) -> Tensor:
            if numbers.ndim < value.ndim:  # the same for all prompts and positions
                return numbers
            numbers = numbers[prompts] if numbers.shape[0] > 1 else numbers
            axis = 2 if self.are_edges else 1
            return take_columns(numbers, axis, columns) if numbers.shape[axis] > 1 else numbers

        if not self.acts:
            return value
        new = self._edited(value, hook, there)
        # without a choice of places it may be the very numbers that are to be written
        return new.clone() if self.selected is None and self.indices is None else new

    def _edited(self, value: Tensor, hook: str, there: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a value after the edit; `there` takes from what fits the whole pass its part."""
        indices = None if self.indices is None else self.indices.on(value.device)
        part = value if indices is None else value.index_select(self.axis, indices)
        new = self._changed(part, hook, there)
        if self.selected is not None:
            new = torch.where(there(self.selected.on(value.device)), new, part)
        new = new.expand_as(part)
        return new.contiguous() if indices is None else value.index_copy(self.axis, indices, new)

    def _astray(self, shape: tuple[int, int]) -> str:
        if self.bound_to not in (None, shape):
            return (
                f"{self.intervention!r} was resolved for tokens [batch, pos] = "
                f"{list(self.bound_to)}, but the run has {list(shape)}; resolve it for these."
            )
        return (
            f"{self.intervention!r} acts in calls of the whole model, from which it knows where "
            "tokens stand; a part of the model was called alone. Use model.hooks there."
        )

    def _changed(self, part: Tensor, hook: str, there: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what replaces the addressed heads or neurons, at all positions."""
        match self.intervention:
            case Scale(factor=factor):
                return torch.where(part.isinf(), part, part * factor)  # -inf: a masked score
            case Steer(scale=scale):
                return part + scale * there(self.source.at(hook, part))
        return there(self.source.at(hook, part))


def _source(intervention: Intervention, model: OPTBase, references: References) -> Source | None:
    """Prepare where an intervention's numbers come from."""
    config, address = model.config, intervention.address
    match intervention:
        case Patch(value=numbers):
            return Given(numbers, f"The value of {intervention!r}", address, config)
        case Steer(vector=numbers):
            return Given(numbers, f"The vector of {intervention!r}", address, config)
        case Knockout():
            return Given(-torch.inf, "", address, config)
        case Ablate(mode="zero"):
            return Given(0.0, "", address, config)
        case Ablate(mode="mean", per_position=True):
            means = references.mean_of_positions(intervention.reference)
            return Means(means, "The reference of a mean ablation", address, config, False)
        case Ablate(mode="mean"):
            return Average(references.mean_over_all(intervention.reference, address))
        case Ablate():
            run, tokens = references.run(intervention.reference)
            return Resampled(run, tokens, intervention.seed, address, config)
        case Freeze(source=source):
            if not isinstance(source, HeldRun):
                source, _ = references.run(source)
            return Borrowed(source, "The source of Freeze", address, config, True)
    return None


class Session:
    """A list of interventions at work on one model."""

    def __init__(
        self,
        model: OPTBase,
        interventions: Intervention | Iterable[Intervention],
        spans: Spans | None = None,
    ) -> None:
        """Check the interventions against the model, and make their reference runs."""
        self.model, self.spans = model, dict(spans or {})
        several = as_list(interventions)
        references = References(model, several)
        self.edits = [Edit(each, model, self.spans, references) for each in several]
        self.prompts: WeakKeyDictionary[KVCache, Pass] = WeakKeyDictionary()

    @property
    def hooks(self) -> list[tuple[str, Edit]]:
        """Pairs of hook name and hook function, in the order of the list."""
        return [(hook, edit) for edit in self.edits for hook in edit.hooks]

    def bind(self, run: Pass, inputs: ReferenceType[Inputs] | None = None) -> None:
        """Tell every edit about a pass; see `Edit.bind`."""
        for edit in self.edits:
            edit.bind(run, inputs)

    def bind_to(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Tell every edit about passes over whole sequences, `[batch, pos]`, and their padding."""
        real = torch.ones_like(tokens) if mask is None else mask
        names = {"tokenizer": self.model.tokenizer, "spans": self.spans}
        self.bind(Pass(real.bool().cpu(), tokens.shape[1], tokens, **names))

    def begin(self, decoder: Any, args: tuple, kwargs: dict) -> None:
        """Look at the pass that the decoder is about to make."""
        inputs: Inputs = args[0] if args else kwargs["inputs"]
        if not any(_listens(self.model.hook_dict[hook], edit) for hook, edit in self.hooks):
            return  # paused, taken off, or a reference run
        cache = inputs.cache
        prompt = None if cache is None else self.prompts.get(cache)
        names = {"tokenizer": self.model.tokenizer, "spans": self.spans}
        run = Pass.of_inputs(inputs, prompt, **names)
        self.bind(run, ref(inputs))
        if cache is not None and run.is_first:
            self.prompts[cache] = run

    def end(self, decoder: Any, args: tuple, output: Any) -> None:
        """Forget the pass, also when it failed.

        An interrupt from the keyboard passes by; then the pass's inputs are no more.
        """
        for edit in self.edits:
            edit.bound_to = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Act on every run inside a `with` block; may be entered again to go on with the same texts."""
        before = self.model.decoder.register_forward_pre_hook(self.begin, with_kwargs=True)
        after = self.model.decoder.register_forward_hook(self.end, always_call=True)
        try:
            with self.model.hooks(fwd_hooks=self.hooks):
                yield
        finally:
            before.remove()
            after.remove()


def _listens(point: HookPoint, edit: Edit) -> bool:
    return point.listening and any(fn is edit for (fn,) in point.editors)


@contextmanager
def intervene(
    model: OPTBase,
    interventions: Intervention | Iterable[Intervention],
    spans: Spans | None = None,
) -> Iterator[OPTBase]:
    """Let interventions act on every run of a model inside a `with` block.

    Positions are looked up anew in every run, whatever its prompts, padding and cached keys and
    values; a run in which one does not exist raises before anything is computed. When a run goes
    on token by token, positions count from the start of the whole sequence, -1 is the newest
    token, and a step in which a position does not occur is left alone. Several interventions at one
    place act in the order of the list; those of an outer block before those of an inner one.

    Args:
        model: The model.
        interventions: One, or several.
        spans: Names for positions, to be used like a token's text: name to one position or `range`
            for all prompts, or a list with an entry (a position, or several) for each prompt.

    Yields:
        The model.

    Raises:
        InputError: If an intervention does not fit the model, or, when running, the prompt.

    Example:
        >>> with intervene(model, [Knockout(query=-1, key=" John")]):  # doctest: +SKIP
        ...     logits = model("When John and Mary went to the shops, John gave the bag to").logits
    """
    with Session(model, interventions, spans).attached():
        yield model


def resolve(
    interventions: Intervention | Iterable[Intervention],
    model: OPTBase,
    tokens: Tensor,
    mask: Tensor | None = None,
    spans: Spans | None = None,
) -> list[tuple[str, Edit]]:
    """Turn interventions into hook functions for runs on given tokens.

    Args:
        interventions: One, or several.
        model: The model.
        tokens: Token ids of the whole sequence, `[batch, pos]`.
        mask: The padding mask, `[batch, pos]`; None if nothing is padding.
        spans: As for `intervene`.

    Returns:
        Pairs of a hook name and `fn(activation, hook)`, as `model.run_with_hooks` takes them; in
        the order of the list.

    Raises:
        InputError: If an intervention does not fit the model or the prompt.

    Example:
        >>> pairs = resolve(Scale("z", layer=0, factor=2), model, tokens)  # doctest: +SKIP
        >>> model.run_with_hooks(tokens, fwd_hooks=pairs)  # doctest: +SKIP
    """
    session = Session(model, interventions, spans)
    session.bind_to(tokens, mask)
    return session.hooks


def active_edits(model: OPTBase) -> list[Edit]:
    """Return the edits that act on a model now, in the order in which they were given."""
    edits = {
        fn.number: fn
        for point in model.hook_dict.values()
        for (fn,) in point.editors
        if isinstance(fn, Edit)
    }
    return [edits[number] for number in sorted(edits)]


def as_list(interventions: Intervention | Iterable[Intervention]) -> list[Intervention]:
    """Bring one or several interventions to a list.

    Raises:
        TypeError: If there is anything else among them.
    """
    several = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for each in several:
        if not isinstance(each, Intervention):
            raise TypeError(
                f"Expected interventions (Patch, Ablate, Steer, Scale, Knockout, Freeze), got "
                f"{type(each).__name__}: {each!r}."
            )
    return several
