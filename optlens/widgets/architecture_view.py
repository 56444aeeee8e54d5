"""The view of a model: its parts in the order of the computation, with the real numbers of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optlens.checks import InputError
from optlens.lens.source import prompts_alone
from optlens.recording import Recording
from optlens.widgets.architecture_part import ArchitecturePart
from optlens.widgets.selection import Selection, selection_of
from optlens.widgets.view import View

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM


class ArchitectureView(View):
    """Show the model drawn, with what each stage computed on a prompt and the lines that do it.

    One block is open, that of the selected layer. The model runs once more for this view, with
    explicit attention; of every tensor shape, statistics, a histogram and a few numbers are kept.

    Args:
        source: a recording, whose model is drawn; or a model.
        prompt: what the model is to be run on; None with a recording.
        selection: what is selected, to link views; all views of one recording share one by default.

    `to_png` and `to_svg` write the stages from tokens to logits, with `detail=True` those of the
    selected block.

    Raises:
        InputError: if the recording was made with interventions, which this run would not have.
        NotRecordedError: if the recording was loaded without its model.
        TypeError: if a model comes without a prompt, or a recording with one.

    Example:
        >>> import optlens
        >>> optlens.widgets.ArchitectureView(optlens.load(), "The cat sat on the")
        ArchitectureView(pre-LN, layers=5, heads=8, tokens=6)
    """

    kinds = ("architecture",)

    def __init__(
        self,
        source: Recording | OPTForCausalLM,
        prompt: Prompt | None = None,
        selection: Selection | None = None,
    ) -> None:
        if isinstance(source, Recording) is not (prompt is None):
            raise TypeError(
                "ArchitectureView takes a recording alone, ArchitectureView(rec), or a model with "
                "a prompt, ArchitectureView(model, prompt)."
            )
        if isinstance(source, Recording):
            model, recording = source.model, source
            _check_plain(recording)
        else:
            # Not kept, but its metadata says all that views know of a prompt.
            model, recording = source, prompts_alone(source.record(prompt, what="hook_embed"))
        part = ArchitecturePart(recording, model)
        super().__init__(recording, [part], selection or selection_of(recording))


def _check_plain(recording: Recording) -> None:
    edited = recording.metadata["edited_hooks"]
    if edited:
        raise InputError(
            f"This recording was made while {edited[0]!r} was edited, and the numbers of a plain run "
            "would not be its own. Give the model and the prompt inside of the same `with "
            "model.intervene([...])` or `model.hooks(...)`."
        )
