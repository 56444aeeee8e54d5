"""Named points in a forward pass where values are recorded or edited.

A `HookPoint` is an identity with a name: `z = self.hook_z(z)`. Nothing happens there until somebody
listens. Three kinds of listeners, in this order: *editors* (forward hook functions) get a copy and
may change it, *recorders* see the value after all edits and may only keep it, *gradient hooks* get
the gradient of the loss with respect to that value in the backward pass.

Function signatures are TransformerLens's: `fn(activation, hook)`, with `hook.name` and
`hook.layer()`. This file knows nothing of OPT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optlens.names import UnknownHookError, suggest

HookFunction = Callable[..., Tensor | None]
NameFilter = str | Sequence[str] | Callable[[str], bool] | None


class HookError(ValueError):
    """A hook function that returned something that does not fit its place."""


@dataclass(eq=False)
class Now:
    """Where a model is in a text that it reads or writes; what `hook.now` says to hook functions.

    All hook points of a model share one, which every pass of the whole network brings up to date
    before its first hook. It costs nothing: the pass has these values anyhow.

    Attributes:
        positions: Position of each token of this pass, `[batch, pos]`, counted over each prompt's
            real tokens from the start of its whole text; -1 for padding. None before any pass.
        seen: How many tokens, padding included, came in earlier passes, through cached keys and
            values.
        step: While a model generates, the number of the new token that this pass will choose: 0
            is chosen by the pass over the prompt. None at all other times.

    Example:
        >>> def erase_while_writing(z, hook):
        ...     if hook.now.phase == "decode":
        ...         z[:] = 0.0
    """

    positions: Tensor | None = None
    seen: int = 0
    step: int | None = None

    @property
    def phase(self) -> str:
        """What the pass does: "prefill" reads a prompt, "decode" goes on from what was read."""
        later = self.seen if self.step is None else self.step
        return "decode" if later else "prefill"


class HookHandle:
    """Removes one hook function; removing it twice does nothing."""

    def __init__(self, point: HookPoint, listeners: list, entry: Any) -> None:
        """Remember where the entry was put."""
        self._point, self._listeners, self._entry = point, listeners, entry

    def remove(self) -> None:
        """Take the hook function out, if it is still there."""
        self._listeners[:] = [e for e in self._listeners if e is not self._entry]
        self._point.refresh()


class HookPoint:
    """An identity with a name, where values can be recorded and edited.

    No `nn.Module`: a model has hundreds, and whoever goes through its modules or parameters, or calls
    a point, would pay for each.

    Attributes:
        name: The full hook name, e.g. "blocks.3.attn.hook_pattern".
        optional: True if the model computes this value only when somebody listens.
        listening: True while any hook function or recorder is attached.
        edited: True while what the point returns matters: a forward hook function may change it, or
            a gradient hook or recorder needs it to be on the way to the output. Recorders of
            the forward pass do not count.
        ctx: A dict for hook functions to keep notes in; `reset_hooks` clears it.
        now: Positions, phase and step of the pass that is under way.
    """

    def __init__(self, name: str, optional: bool = False) -> None:
        """Make a point that nobody listens to yet."""
        self.name = name
        self.optional = optional
        self.ctx: dict[str, Any] = {}
        self.now = Now()
        self.editors: list[tuple[HookFunction]] = []
        self.recorders: list[tuple[Callable[[Tensor, HookPoint], None]]] = []
        self.gradient_hooks: list[tuple[HookFunction, bool]] = []
        self.refresh()

    def refresh(self) -> None:
        """Recompute the flags after a listener came or went."""
        self.edited = bool(self.editors or self.gradient_hooks)
        self.listening = bool(self.editors or self.recorders or self.gradient_hooks)

    def layer(self) -> int:
        """Return the number of the block this point belongs to.

        Raises:
            ValueError: If the point is outside the blocks.
        """
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise ValueError(f"{self.name!r} belongs to no block, so it has no layer number.")
        return int(parts[1])

    def __call__(self, value: Tensor) -> Tensor:
        """Return the value, edited if editors are attached, after showing it to recorders."""
        return self._fire(value) if self.listening else value

    def _fire(self, value: Tensor) -> Tensor:
        for (edit,) in tuple(self.editors):
            value = self._apply_edit(edit, value)
        for (record,) in tuple(self.recorders):
            record(value, self)
        if self.gradient_hooks:
            value = self._attach_gradient_hooks(value)
        return value

    def _apply_edit(self, edit: HookFunction, value: Tensor) -> Tensor:
        own_copy = value.clone()  # in-place edits must not reach what was recorded elsewhere
        result = edit(own_copy, hook=self)
        if result is None:
            result = own_copy
        if not isinstance(result, Tensor):
            raise HookError(
                f"The hook function on {self.name!r} returned a {type(result).__name__}; it must "
                "return a tensor, or None to keep its argument (changed in place or not)."
            )
        for what in ("shape", "dtype", "device"):
            given, expected = getattr(result, what), getattr(value, what)
            if given != expected:
                given, expected = (
                    (tuple(given), tuple(expected)) if what == "shape" else (given, expected)
                )
                raise HookError(
                    f"The hook function on {self.name!r} returned a tensor of {what} {given}; "
                    f"expected {what} {expected}."
                )
        return result

    def _attach_gradient_hooks(self, value: Tensor) -> Tensor:
        if not value.requires_grad:
            raise HookError(
                f"A backward hook waits on {self.name!r}, but no gradient flows there: gradients "
                "are switched off (torch.no_grad), or no parameter before it requires them."
            )
        value = value.view_as(value)  # a node of its own: one tensor can bear two names
        ordered = sorted(self.gradient_hooks, key=lambda entry: entry[1])  # recorders last
        for fn, is_recorder in ordered:
            value.register_hook(self._gradient_callback(fn, is_recorder))
        return value

    def _gradient_callback(self, fn: HookFunction, is_recorder: bool) -> Callable:
        def callback(gradient: Tensor) -> Tensor | None:
            if is_recorder:
                fn(gradient, hook=self)
                return None

            def edit(own_copy: Tensor, hook: HookPoint) -> Tensor | None:
                result = fn(own_copy, hook=hook)
                return result[0] if isinstance(result, tuple) and len(result) == 1 else result

            return self._apply_edit(edit, gradient)

        return callback

    def add_hook(self, fn: HookFunction, dir: str = "fwd") -> HookHandle:
        """Attach `fn(activation, hook)` ("fwd") or `fn(gradient, hook)` ("bwd")."""
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"dir must be 'fwd' or 'bwd', got {dir!r}.")
        if dir == "fwd":
            return self._attach(self.editors, (fn,))
        return self._attach(self.gradient_hooks, (fn, False))

    def add_recorder(self, fn: Callable[..., None], dir: str = "fwd") -> HookHandle:
        """Attach a function that sees the value (or gradient) after all edits; it returns None."""
        if dir == "fwd":
            return self._attach(self.recorders, (fn,))
        return self._attach(self.gradient_hooks, (fn, True))

    def _refuse(self, *args: Any, **options: Any) -> None:
        """Refuse PyTorch's own hooks: `__call__` passes them by, so they would never fire.

        Raises:
            HookError: Always, naming what to use.
        """
        raise HookError(
            f"PyTorch's own hooks never fire on the hook point {self.name!r}; use "
            "add_hook(fn) with fn(activation, hook), or add_hook(fn, dir='bwd') for gradients."
        )

    register_forward_hook = register_forward_pre_hook = _refuse
    register_full_backward_hook = register_full_backward_pre_hook = _refuse
    register_backward_hook = _refuse

    def _attach(self, listeners: list, entry: tuple) -> HookHandle:
        listeners.append(entry)
        self.refresh()
        return HookHandle(self, listeners, entry)

    def remove_hooks(self) -> None:
        """Remove every listener."""
        for listeners in (self.editors, self.recorders, self.gradient_hooks):
            listeners.clear()
        self.refresh()

    def __repr__(self) -> str:
        """Show the name."""
        return f"HookPoint({self.name!r})"


class HookedModule(nn.Module):
    """A module whose hook points can be found by name, listened to and reset.

    A subclass calls `collect_hooks` at the end of its `__init__`.
    """

    hook_dict: dict[str, HookPoint]

    def collect_hooks(self) -> None:
        """Build `hook_dict` (name to HookPoint) from all hook points below this module."""
        held = (value for module in self.modules() for value in vars(module).values())
        points = [value for value in held if isinstance(value, HookPoint)]
        now = Now()
        for point in points:
            point.now = now
        self.hook_dict = {point.name: point for point in points}

    @property
    def now(self) -> Now:
        """Positions, phase and step of the pass that is under way, as `hook.now` has them."""
        return next(iter(self.hook_dict.values())).now

    @property
    def edited_hooks(self) -> list[str]:
        """Names of the hook points at which something may change values or gradients."""
        return [name for name, point in self.hook_dict.items() if point.edited]

    def match_hooks(self, names: NameFilter) -> list[HookPoint]:
        """Return the hook points that a name, a list of names or a filter function selects.

        Args:
            names: A full name; a list of them; a function of the name that says True or False; or
                None for every point that is not optional. A function is asked about the optional
                names only if it accepts none of the others: `lambda name: "attn" in name` means
                what the model computes anyhow.

        Raises:
            UnknownHookError: If a name does not exist (the nearest are suggested) or a filter
                function accepts no name.
        """
        if names is None:
            return [point for point in self.hook_dict.values() if not point.optional]
        if callable(names):
            accepted = [point for name, point in self.hook_dict.items() if names(name)]
            chosen = [point for point in accepted if not point.optional] or accepted
            if not chosen:
                first = ", ".join(list(self.hook_dict)[:4])
                raise UnknownHookError(
                    f"The filter accepts none of the {len(self.hook_dict)} hook names "
                    f"({first}, ...); `model.hook_dict` lists them."
                )
            return chosen
        wanted = [names] if isinstance(names, str) else list(names)
        if not wanted:
            raise UnknownHookError("The list of hook names is empty; name at least one.")
        for name in wanted:
            if name not in self.hook_dict:
                raise UnknownHookError(
                    f"This model has no hook named {name!r}. {suggest(name, list(self.hook_dict))}"
                )
        return [self.hook_dict[name] for name in dict.fromkeys(wanted)]

    def add_hook(self, name: NameFilter, fn: HookFunction, dir: str = "fwd") -> HookHandle:
        """Attach a hook function until its handle's `remove()` or `reset_hooks()`.

        Args:
            name: A full hook name, a list of names, or a filter function over names.
            fn: `fn(activation, hook)`; returns a new tensor, or None after looking at or changing
                its argument (its own copy) in place.
            dir: "fwd" for activations, "bwd" for gradients.

        Returns:
            A handle; `handle.remove()` takes it off again, from all the points it was put on.
        """
        points = self.match_hooks(name)
        return _HandleGroup([point.add_hook(fn, dir) for point in points])

    def reset_hooks(self, clear_contexts: bool = True) -> None:
        """Remove every hook function from every point and, by default, clear their `ctx`."""
        for point in self.hook_dict.values():
            point.remove_hooks()
            if clear_contexts:
                point.ctx.clear()

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[tuple[NameFilter, HookFunction]] = (),
        bwd_hooks: Iterable[tuple[NameFilter, HookFunction]] = (),
    ) -> Iterator[HookedModule]:
        """Attach hook functions for the length of a `with` block.

        On leaving, also by an exception, exactly these are removed. A gradient hook stays with the
        computation made inside the block, so `loss.backward()` may come after it.

        Example:
            >>> with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", fn)]):  # doctest: +SKIP
            ...     logits = model(tokens)
        """
        plan = [(name, fn, "fwd") for name, fn in fwd_hooks]
        plan += [(name, fn, "bwd") for name, fn in bwd_hooks]
        for name, _, _ in plan:
            self.match_hooks(name)  # a misspelt name raises before anything is attached
        with _attached([(p, fn, d) for name, fn, d in plan for p in self.match_hooks(name)]):
            yield self

    @contextmanager
    def paused_hooks(self) -> Iterator[None]:
        """Make every listener deaf for the length of a `with` block.

        For computing with a part of the model (the unembedding, say) on other values than those
        of the run that the hooks are meant for.
        """
        try:
            for point in self.hook_dict.values():
                point.listening = False
            yield
        finally:
            for point in self.hook_dict.values():
                point.refresh()

    @contextmanager
    def recorders(
        self,
        points: Iterable[HookPoint],
        fn: Callable[..., None],
        gradient_fn: Callable[..., None] | None = None,
    ) -> Iterator[None]:
        """Show every value (and gradient) at these points to `fn(value, hook)` for a while."""
        handles: list[HookHandle] = []
        try:
            for point in points:
                handles.append(point.add_recorder(fn))
                if gradient_fn is not None:
                    handles.append(point.add_recorder(gradient_fn, dir="bwd"))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _HandleGroup(HookHandle):
    """Handles that are removed together."""

    def __init__(self, handles: list[HookHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def _attached(plan: list[tuple[HookPoint, HookFunction, str]]) -> Iterator[None]:
    handles: list[HookHandle] = []
    try:
        for point, fn, direction in plan:
            handles.append(point.add_hook(fn, direction))
        yield
    finally:
        for handle in handles:
            handle.remove()
