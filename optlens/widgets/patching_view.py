"""The view of a sweep: a number for every patch, while they are computed and after."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from optlens.progress import progress_bar
from optlens.widgets.arrays import packed, with_buffers
from optlens.widgets.patching_part import PatchingPart
from optlens.widgets.subject import SubjectView

if TYPE_CHECKING:
    from optlens.interventions import Intervention
    from optlens.model import OPTForCausalLM
    from optlens.patching import PatchResult, SweepStream
    from optlens.widgets.selection import Selection

_SAVED_EVERY = 2.0  # seconds between two updates of what a saved notebook shows


class PatchingView(SubjectView):
    """Show what a sweep finds: a table of patches, and any one of them with its interval.

    Given the stream of a sweep, the table fills in while one looks at it: whenever the notebook's
    kernel is free, patches are computed for a tenth of a second at a time. It can be cancelled,
    and goes on from there. A chosen patch shows what the model predicts with it, without it, and in
    the run that its values come from, and the code that makes it.

    Args:
        found: what `optlens.patch_sweep`, `ablate_sweep` or another sweep found (one that was
            interrupted is shown as far as it goes, and says so), or the stream that they return
            with `stream=True`.
        model: the model that was swept, for the predictions under single patches. A stream has it.
        interventions: those that a result's sweep was given, for the same purpose.
        spans: likewise.
        top_k: how many predicted tokens to list.
        selection: what is selected, to link views; give `view.selection` of a view of the clean
            recording to look at the same layer, head and position in both.

    Attributes:
        result: the result; of a stream, as far as it is filled.

    Raises:
        TypeError: if it is no such result or stream.
        InputError: if it has more patches than a picture can show, or the model is another one.

    Example:
        >>> import optlens
        >>> model, metric = optlens.load(), optlens.metrics.logit_diff(" Mary", " John")
        >>> clean = "When Mary and John went to the store, John gave a drink to"
        >>> corrupt = "When Mary and John went to the store, Mary gave a drink to"
        >>> stream = optlens.patch_sweep(
        ...     model, clean, corrupt, "z", ("layer", "head"), metric, stream=True
        ... )
        >>> view = optlens.widgets.PatchingView(stream)  # fills in where it is displayed
        >>> view
        PatchingView(z: layer=5, head=8, 40 not computed)
        >>> view.run(progress=False).complete  # or to the end, here and now
        True
    """

    kinds = ("patching",)

    def __init__(
        self,
        found: PatchResult | SweepStream,
        model: OPTForCausalLM | None = None,
        interventions: Intervention | Iterable[Intervention] = (),
        spans: Mapping[str, Any] | None = None,
        top_k: int = 5,
        selection: Selection | None = None,
    ) -> None:
        part = PatchingPart(found, model, interventions, spans, top_k)
        self._saved = (None, 0.0)  # the state, and the time, of what a saved notebook would show
        super().__init__(part.subject, part, selection)
        self._home = self.selected if selection is None and part.filling is not None else None

    @property
    def result(self) -> PatchResult:
        """What was found; of a stream, as far as it is filled."""
        return self._parts[0].subject

    def run(self, progress: bool = True) -> PatchResult:
        """Compute what is missing, here and now; the picture follows.

        Interrupted from the keyboard, it returns what was done by then, with a warning.

        Args:
            progress: show a progress bar.

        Returns:
            The result.

        Raises:
            InputError: if the model was altered since the sweep began, or hooks edit it.
            RuntimeError: if the view was given a result, which nothing can be added to.
        """
        filling = self._filling("run")
        stream, told = filling.stream, len(filling.stream.filled)
        with progress_bar(len(stream.sweep.rows), progress, unit="patch", leave=False) as bar:
            try:
                while not stream.finished:
                    bar.update(stream.runs_done - bar.n)
                    filling.run()
                    self._tell(told, "done" if stream.finished else "python")
                    told = len(stream.filled)
            except KeyboardInterrupt:
                warnings.warn(
                    f"Interrupted: {filling.facts()['done']} of {filling.facts()['all']} patches "
                    "are done. Call run() again to go on.",
                    stacklevel=2,
                )
            finally:  # whatever stopped it, what was done is shown and kept
                if not stream.finished:
                    self._tell(told, filling.state)
                self._save()
        return stream.result

    def cancel(self) -> None:
        """Compute no more; what was computed stays in `result`. `run`, or the button, goes on.

        Raises:
            RuntimeError: if the view was given a result, which is not being computed.
        """
        filling = self._filling("cancel")
        filling.stop()
        self._tell(len(filling.stream.filled), filling.state)
        self._save()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return what the picture asks for; a saved notebook holds what was computed."""
        found = super().answer(question)
        if question["what"] in ("more", "pause"):
            state, before = self._saved
            if found["state"] not in ("running", state) or time.monotonic() > before + _SAVED_EVERY:
                self._save()
        return found

    def _filling(self, what: str):
        filling = self._parts[0].filling
        if filling is None:
            raise RuntimeError(
                f"There is nothing to {what}: this view shows a result. Give it a running sweep, "
                "PatchingView(optlens.patch_sweep(..., stream=True)); resume=result goes on from "
                "one that was cut short."
            )
        return filling

    def _tell(self, since: int, state: str) -> None:
        """Send the picture what is new, unasked."""
        content, buffers = with_buffers(self._parts[0].filling.news(since) | {"state": state})
        self.send({"kind": "news", "part": 0, "content": content}, buffers)

    def _save(self) -> None:
        """Keep what was computed in the widget's state, from which saved notebooks are drawn."""
        part = self._parts[0]
        self.parts = [self._part_facts(part, 0, data=packed)]
        self._saved = (part.filling.state, time.monotonic())
        if part.filling.state == "done" and self.selected == self._home:
            self.selected = self.selected | part.first()  # nobody has looked for another patch
