"""What an analysis reads from: a recording that the caller has, or one made for it on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from optlens.checks import InputError
from optlens.names import get_act_name
from optlens.recording import NotRecordedError, Recording

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM
    from optlens.selection import Selection


def recording_of(
    model: OPTForCausalLM | None,
    source: Recording | Prompt,
    what: str | Iterable[str],
    pos: Selection = None,
    layers: Selection = None,
    heads: Selection = None,
) -> Recording:
    """Return the recording that was given, or record a prompt.

    Args:
        model: The model; None is enough for a recording that needs no weights, or has its model.
        source: A recording, or a prompt.
        what: What to record of a prompt.
        pos: Which positions of a prompt to record.
        layers: Which of its layers.
        heads: Which of their heads.

    Raises:
        InputError: If there is a prompt and no model to run.
        ValueError: If the recording is of another model.
    """
    if isinstance(source, Recording):
        return source if model is None else source.attach(model)
    if model is None:
        raise InputError(
            "A prompt needs a model to run on, and model is None; or give a recording."
        )
    return model.record(source, what=what, pos=pos, layers=layers, heads=heads)


def need_whole(recording: Recording, purpose: str) -> None:
    """Check that a recording left out no layer and no head.

    Args:
        recording: The recording.
        purpose: What it is needed for, which begins the error's sentence.

    Raises:
        NotRecordedError: Naming what it holds, and the argument to leave out.
    """
    config = recording.metadata["config"]
    for name, held, there_are in (
        ("layers", recording.layers, config["num_hidden_layers"]),
        ("heads", recording.heads, config["num_attention_heads"]),
    ):
        if len(held) < there_are:
            raise NotRecordedError(
                f"{purpose} needs all {there_are} {name}, but this recording was made with "
                f"{name}={held}; record it without {name}=."
            )


def need_positions(recording: Recording, purpose: str) -> None:
    """Check that a recording left out no position; arguments and error as in `need_whole`."""
    there_are = recording.tokens.shape[-1]
    if len(recording.positions) < there_are:
        raise NotRecordedError(
            f"{purpose} needs all {there_are} positions, but this recording was made with "
            f"pos={recording.positions}; record it without pos=."
        )


def batched(recording: Recording, name: str, layer: int | None = None) -> Tensor:
    """Return what was recorded, always with its batch axis.

    Args:
        recording: The recording.
        name: "attention", or a hook's short name; a full name if there is no layer.
        layer: The block's number.

    Raises:
        NotRecordedError: Naming the `what` to add.
    """
    if layer is None:
        value = recording._get(name, name)
    elif name in recording.what or get_act_name(name, layer) in recording.what:
        value = recording[name, layer]
    elif name == "attention":
        held = "pattern" in recording.what or get_act_name("pattern", layer) in recording.what
        value = recording["pattern", layer] if held else recording._get(name, name)
    else:
        value = recording._get(name, name)  # raises, with the short name
    return value if recording.is_batch else value[None]


def one_prompt_of(recording: Recording, prompt: int) -> Recording:
    """Return the recording of one prompt of a batch as one of its own; padding stays.

    Args:
        recording: Of several prompts; one of a single prompt is returned as it is.
        prompt: Which of them.
    """
    if not recording.is_batch:
        return recording
    names = ("prompts", "str_tokens", "columns")
    facts = {name: [recording.metadata[name][prompt]] for name in names}
    tensors = {name: held[prompt : prompt + 1] for name, held in recording._tensors.items()}
    return Recording(tensors, recording.metadata | facts | {"is_batch": False}, recording._model)


def prompts_alone(recording: Recording) -> Recording:
    """Return a recording of the same prompts that holds their tokens and no activation.

    A result keeps it to know its tokens without keeping everything that was recorded.
    """
    width = batched(recording, "tokens").shape[1]
    tensors = {name: recording._tensors[name].cpu() for name in ("tokens", "mask")}
    columns = [list(range(width)) for _ in range(len(tensors["tokens"]))]
    facts = {"what": [], "positions": columns[0], "columns": columns}
    return Recording(tensors, recording.metadata | facts)
