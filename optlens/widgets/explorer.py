"""The view of all that a recording holds, in which the run itself can be changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import traitlets

from optlens.checks import InputError
from optlens.interventions import Intervention, as_list
from optlens.recording import NotRecordedError, Recording
from optlens.widgets.attention_part import AttentionPart
from optlens.widgets.interventions_part import InterventionsPart
from optlens.widgets.lens_part import LensPart
from optlens.widgets.live_run import LiveRun, own
from optlens.widgets.part import Part
from optlens.widgets.residual_part import ResidualPart
from optlens.widgets.selection import Selection, share_selection
from optlens.widgets.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM


class Explorer(View):
    """Show all that a recording holds in linked views, and change the run by clicking.

    A new prompt, or an intervention at a selected head, sub-layer or place in the stream, runs the
    model again, and every view shows the new run; the prediction without interventions stands
    beside the new one. Whatever cannot be run changes nothing and says why.

    Args:
        source: a recording, or a model.
        prompt: what the model is to be run on; None with a recording.
        selection: what is selected, to link other views; all views of one recording share one by
            default. It goes on with every new recording.
        interventions: what to begin with, beside a model.

    Attributes:
        recording: the run that is shown.
        original: the run on the same prompt without interventions.
        interventions: what is in force, a tuple of `optlens.interventions`. Setting it runs the
            model; `explorer.observe(fn, "interventions")` hears of clicks too.
        prompt: what the model is run on; setting it runs the model.

    Raises:
        NotRecordedError: if the recording holds nothing that can be shown.
        TypeError: if a model comes without a prompt, or a recording with one, or with
            interventions.

    Example:
        >>> import optlens
        >>> explorer = optlens.widgets.Explorer(optlens.load(), "The cat sat on the")
        >>> explorer
        Explorer(lens, attention, residual; layers=5, heads=8, tokens=6)
        >>> explorer.interventions = [optlens.Ablate("z", layer=3, head=0)]  # as a click does
        >>> explorer
        Explorer(lens, attention, residual; layers=5, heads=8, tokens=6, interventions=1)
        >>> explorer.undo()
        >>> explorer.interventions
        ()
    """

    kinds = ("interventions", "lens", "attention", "residual")

    interventions = traitlets.Any(())
    prompt = traitlets.Any()

    def __init__(
        self,
        source: Recording | OPTForCausalLM,
        prompt: Prompt | None = None,
        selection: Selection | None = None,
        interventions: Iterable[Intervention] = (),
    ) -> None:
        given = tuple(as_list(interventions))
        if isinstance(source, Recording) is not (prompt is None):
            raise TypeError(
                "Explorer takes a recording alone, Explorer(rec), or a model with a prompt, "
                "Explorer(model, prompt)."
            )
        if isinstance(source, Recording):
            if given:
                raise TypeError(
                    "interventions= goes with a model and a prompt, Explorer(model, prompt, "
                    "interventions=[...]); for a recording, set explorer.interventions afterwards."
                )
            self._run = LiveRun(source)
        else:
            self._run = LiveRun.of_model(source, prompt, given)
        self._own = InterventionsPart(self._run)
        self._following = True  # the traits below follow the run, not the run them
        super().__init__(
            self._run.recording, [self._own, *_parts_of(self._run.recording)], selection
        )
        self._follow()
        self._run.changed = self._renew

    @property
    def original(self) -> Recording:
        """The run on the same prompt without interventions."""
        return self._run.original

    @property
    def code(self) -> str:
        """Python code that makes `recording` again, with `model` as the model."""
        return self._run.now.code

    def undo(self) -> None:
        """Go back to the prompt and the interventions before the last change.

        Raises:
            InputError: if there was no change, or it cannot be run.
        """
        self._step(-1, "nothing to undo: the prompt and the interventions are the first ones")

    def redo(self) -> None:
        """Take back the last `undo`; raises like it."""
        self._step(1, "nothing to redo: no change was undone")

    def _step(self, by: int, end: str) -> None:
        if not 0 <= self._run.at + by < len(self._run.history):
            raise InputError(f"There is {end}.")
        self._run.go(self._run.at + by)

    # ---------------------------------------------------------------------- the traits and the run

    @traitlets.validate("interventions")
    def _run_with(self, proposal: Any) -> tuple[Intervention, ...]:
        given = tuple(as_list(proposal["value"]))
        if not self._following:
            self._run.change(given)
        return given

    @traitlets.validate("prompt")
    def _run_on(self, proposal: Any) -> Any:
        if not self._following:
            self._run.change(prompt=proposal["value"])
        return proposal["value"]

    def _renew(self) -> None:
        """Show what the run gives now; called after every change of it."""
        recording, selected = self._run.recording, self.selected
        self._own.renew()
        parts = _parts_of(recording)
        if recording.tokens.shape != self.recording.tokens.shape or not bool(
            (recording.tokens == self.recording.tokens).all()
        ):
            selected = self._fitting(selected)
        share_selection(recording, self.selection)
        self._show(recording, [self._own, *parts], selected["prompt"])
        self._follow()
        self.selected = selected  # last: who observes it may raise, and meets the new run

    def _fitting(self, selected: dict[str, Any]) -> dict[str, Any]:
        """Return the selection on other prompts: the last token of one, the same layer and head."""
        prompt = min(selected["prompt"], len(self._own.prompts) - 1)
        last = self._own.prompts[prompt].positions[-1]
        return selected | {"prompt": prompt, "query": last, "key": None, "token": None}

    def _follow(self) -> None:
        """Let the traits say what the run is."""
        self._following = True
        try:
            self.interventions = self._run.now.interventions
            self.prompt = own(self._run.now.prompt)
        finally:
            self._following = False

    # --------------------------------------------------------------------------- as a picture

    def figure(self, style: Literal["light", "dark"] = "light", detail: bool = False) -> Figure:
        """Return the lens (or else what is shown first below it) as a matplotlib figure."""
        return self._parts[1].figure(self.selected | {"prompt": self._prompt}, style, detail)

    def __repr__(self) -> str:
        """Return a line that is the same on every run."""
        config = self.recording.metadata["config"]
        kinds = ", ".join(part.kind for part in self._parts[1:])
        size = f"layers={config['num_hidden_layers']}, heads={config['num_attention_heads']}"
        more = [self._parts[0].token_counts(), self._own.counts()]
        return f"Explorer({kinds}; {', '.join([size, *filter(None, more)])})"


def _parts_of(recording: Recording) -> list[Part]:
    """Return the parts for all that a recording holds."""
    parts = []
    for make in (LensPart, AttentionPart, ResidualPart):
        try:
            parts.append(make(recording))
        except NotRecordedError:  # what was not recorded is not shown
            continue
    if not parts:
        raise NotRecordedError(
            f"This recording holds {', '.join(recording.what)}, nothing that the explorer "
            "shows; record it with what=('attention', 'residual', 'logit_lens')."
        )
    return parts
