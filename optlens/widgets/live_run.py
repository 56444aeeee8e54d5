"""A model on a prompt under interventions, and the way back to what was before.

The one place where a view changes what it shows: every change is a run, and only a run that succeeds
changes anything. Knows no Jupyter library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens.checks import InputError
from optlens.interventions import Intervention, as_list, in_words
from optlens.recording import WHAT, Recording, fingerprint
from optlens.report.one_prompt import prompts_of
from optlens.widgets.branches import lock_of
from optlens.widgets.recipe import code_of

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM


@dataclass(frozen=True, eq=False)
class Setting:
    """Hold what a run starts from.

    Attributes:
        prompt: what `model.record` takes: a text, a list of texts, token ids.
        interventions: what is changed in the run.
        options: further arguments of `model.record`.
    """

    prompt: Prompt
    interventions: tuple[Intervention, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def same_prompt(self, other: Setting) -> bool:
        """Say whether another setting runs on the same prompt."""
        one, two = self.prompt, other.prompt
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            return torch.equal(one, two)
        return type(one) is type(two) and one == two

    @property
    def code(self) -> str:
        """Python code that makes the recording, with `model` as the model."""
        return code_of(self.prompt, self.interventions, self.options)

    def code_with(self, *more: Intervention) -> str:
        """Return the same code with further interventions at the end of the list."""
        return code_of(self.prompt, (*self.interventions, *more), self.options)

    def with_prompt(self, prompt: Prompt) -> Setting:
        """Return the same on another prompt, where chosen positions and padding mean nothing."""
        kept = {k: v for k, v in self.options.items() if k not in ("pos", "attention_mask")}
        return Setting(prompt, self.interventions, kept)


class LiveRun:
    """Hold the recording of a prompt under interventions, and change both.

    Args:
        recording: what is shown first.
        prompt: what it was made from; None to work it out from the recording.
        interventions: those that it was made under.
        original: the same without interventions; None if there are none.

    Attributes:
        recording: what the run under the interventions gave.
        original: what the run without them gave, on the same prompt; the same object without any.
        history: the settings that one can go back and forth through.
        at: the number of the one in force.
        changed: called after every change.
    """

    def __init__(
        self,
        recording: Recording,
        prompt: Prompt | None = None,
        interventions: tuple[Intervention, ...] = (),
        original: Recording | None = None,
    ) -> None:
        self.recording = recording
        self.original = recording if original is None else original
        first = _setting_of(recording) if prompt is None else Setting(own(prompt))
        self.history = [replace(first, interventions=interventions)]
        self.at = 0
        self.changed: Callable[[], None] = lambda: None
        # A run that was made here can be made again, a given recording perhaps not.
        self._hidden = prompt is None and bool(recording.metadata.get("edited_hooks"))
        self._lock = threading.RLock()  # frontends may answer on a thread of their own

    @classmethod
    def of_model(
        cls, model: OPTForCausalLM, prompt: Prompt, interventions: Iterable[Intervention] = ()
    ) -> LiveRun:
        """Run a model on a prompt, under interventions too if there are any."""
        given = tuple(as_list(interventions))
        with lock_of(model):
            _check_undisturbed(model)
            original = model.record(prompt)
            recording = model.record(prompt, interventions=given) if given else original
        return cls(recording, prompt, given, original)

    @property
    def now(self) -> Setting:
        """The setting in force."""
        return self.history[self.at]

    @property
    def obstacle(self) -> str | None:
        """Why nothing can be run here, and what to do about it; None if it can."""
        if self.recording._model is None:
            return (
                "This recording was loaded without its model, so nothing can be run. Attach the "
                "model and show it again: rec.attach(model).show()."
            )
        if self._hidden:
            words = [in_words(each) for each in self.recording.metadata["interventions"]]
            return (
                f"This recording was made under {', '.join(words) or 'hook functions'}, which it "
                "only describes. To change the run, start from the interventions themselves: "
                "optlens.widgets.Explorer(model, prompt, interventions=[...])."
            )
        return None

    def change(
        self, interventions: Iterable[Intervention] | None = None, prompt: Prompt | None = None
    ) -> None:
        """Run with another list of interventions, another prompt, or both; what is None stays.

        Raises:
            InputError: if there is nothing to run with, or it does not fit; nothing changes then.
            TypeError: if something is no prompt or no intervention.
        """
        with self._lock:
            wanted = self._wanted(interventions, prompt)
            if wanted is None:
                return
            self._run(wanted)
            self.history[self.at + 1 :] = [wanted]
            self.at += 1
            self.changed()

    def _wanted(
        self, interventions: Iterable[Intervention] | None, prompt: Prompt | None
    ) -> Setting | None:
        """Return the setting that a change asks for; None if it is the one in force."""
        now = self.now
        given = now.interventions if interventions is None else tuple(as_list(interventions))
        wanted = replace(now, interventions=given)
        if prompt is not None and not wanted.same_prompt(Setting(prompt)):
            _check_not_empty(prompt)
            wanted = wanted.with_prompt(own(prompt))
        unchanged = wanted.same_prompt(now) and given == now.interventions
        return None if unchanged else wanted

    def go(self, at: int) -> None:
        """Go to a setting of the history by its number.

        Raises:
            InputError: if there is none of that number.
        """
        with self._lock:
            last = len(self.history) - 1
            if not 0 <= at <= last:
                raise InputError(f"There is no setting {at}; there are 0 to {last}.")
            if at != self.at:
                self._run(self.history[at])
                self.at = at
                self.changed()

    def _run(self, wanted: Setting) -> None:
        """Record under a setting, and on a new prompt without interventions too; all or nothing."""
        if self.obstacle is not None:
            raise InputError(self.obstacle)
        model = self.recording.model
        with lock_of(model):
            _check_undisturbed(model)
            original = self.original
            if not wanted.same_prompt(self.now):
                original = model.record(wanted.prompt, **wanted.options)
            elif original.metadata.get("fingerprint") != fingerprint(model):
                raise InputError(
                    "The model's weights were altered since the first of these runs, so that before "
                    "and now would be of two models. Run the cell that made this view again."
                )
            recording = original
            if wanted.interventions:
                recording = model.record(
                    wanted.prompt, interventions=wanted.interventions, **wanted.options
                )
        self.original, self.recording = original, recording


def own(prompt: Prompt) -> Prompt:
    """Return a prompt that does not change with what it was given as."""
    if isinstance(prompt, Tensor):
        return prompt.clone()
    return list(prompt) if isinstance(prompt, list) else prompt


def _check_undisturbed(model: OPTForCausalLM) -> None:
    edited = model.edited_hooks
    if edited:
        raise InputError(
            f"Hook functions are attached to {', '.join(edited[:3])}, so this would be a run of "
            "another kind than the one that it is compared with. Remove them with "
            "model.reset_hooks(), or leave the `with` block that they belong to, and give "
            "interventions to the explorer itself."
        )


def _check_not_empty(prompt: Prompt) -> None:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompt, Tensor) and isinstance(texts, list | tuple):
        if not texts or any(isinstance(text, str) and not text for text in texts):
            raise InputError("The prompt is empty; type some text.")


def _setting_of(recording: Recording) -> Setting:
    """Return what makes a recording again, a text where the text gives these tokens."""
    model, options = recording._model, _options_of(recording)
    tokens, mask = recording.tokens, recording.mask
    if model is None or model.tokenizer is None:
        return Setting(tokens, options=options | _padding(mask))
    texts = [one.text for one in prompts_of(recording)]
    prompt = texts if recording.is_batch else texts[0]
    found, found_mask = model.to_tokens_and_mask(prompt)
    real = torch.ones_like(found) if found_mask is None else found_mask
    given = [value if recording.is_batch else value[None] for value in (tokens, mask)]
    same = all(
        torch.equal(one.cpu().long(), two.cpu().long())
        for one, two in zip((found, real), given, strict=True)
    )
    if same:
        return Setting(prompt, options=options)
    return Setting(tokens, options=options | _padding(mask))


def _padding(mask: Tensor) -> dict[str, Tensor]:
    return {} if bool(mask.all()) else {"attention_mask": mask.long()}


def _options_of(recording: Recording) -> dict[str, Any]:
    """Return the arguments of `model.record` that differ from what it does without them."""
    facts, config = recording.metadata, recording.metadata["config"]
    options: dict[str, Any] = {}
    if list(recording.what) != list(WHAT):
        options["what"] = list(recording.what)
    for name, count in (
        ("layers", config["num_hidden_layers"]),
        ("heads", config["num_attention_heads"]),
    ):
        if facts[name] != list(range(count)):
            options[name] = list(facts[name])
    if recording.positions != list(range(recording.tokens.shape[-1])):
        options["pos"] = list(recording.positions)
    if facts.get("dtype") != facts.get("model_dtype"):  # absent from older files
        options["dtype"] = getattr(torch, facts["dtype"].removeprefix("torch."))
    return options
