"""What a view shows of a recording, in numbers and without a browser.

A part gives the state with which its picture begins, answers the questions that the picture asks
later (a head's weights, a token's way through the layers), and draws itself as a figure and as plain
markup for places without JavaScript. Parts know no Jupyter library.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from optlens.report.markup import Html
from optlens.report.one_prompt import OnePrompt, prompts_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.recording import Recording

# What a page may hold of answers beforehand, in bytes before base64.
PAGE_BYTES = 12_000_000


class QuestionError(ValueError):
    """A question of a picture that has no answer; the message is shown in the view."""


class Part:
    """Hold what one kind of view shows.

    Attributes:
        kind: name of the JavaScript module that draws it.
        title: heading in words.
        recording: what is shown.
        prompts: its prompts without padding.
    """

    kind: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, recording: "Recording"):
        self.recording = recording
        self.prompts: list[OnePrompt] = prompts_of(recording)

    def state(self, prompt: int) -> dict[str, Any]:
        """Return JSON with arrays, about a megabyte at most, that the picture begins with."""
        raise NotImplementedError

    def answer(self, prompt: int, what: str, **wanted: Any) -> dict[str, Any]:
        """Return JSON with arrays for a question of the picture.

        Raises:
            QuestionError: if there is no answer, saying why.
        """
        answers = getattr(self, f"answer_{what}", None)
        if answers is None:
            raise QuestionError(f"The {self.kind} view cannot answer {what!r}.")
        return answers(prompt, **wanted)

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give the questions, with answers, that a page without a kernel must hold."""
        yield from ()

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the picture as a matplotlib figure; with `detail`, of the selected place alone."""
        raise NotImplementedError

    def fallback(self, prompt: int) -> list[Html]:
        """Return plain markup that survives a sanitiser: a picture or a table, with words."""
        raise NotImplementedError

    def counts(self) -> str:
        """Return the part's size in a few words, the same on every run."""
        raise NotImplementedError

    def token_counts(self) -> str:
        """Return how many tokens the prompts have."""
        counts = sorted({len(prompt.ids) for prompt in self.prompts})
        many = f"{len(self.prompts)} prompts, " if len(self.prompts) > 1 else ""
        return f"{many}tokens={'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}"


def check_same_prompts(recording: "Recording", tokens: list[list[int]], what: str) -> None:
    """Check that a result was made of the prompts of a recording.

    Args:
        recording: the recording.
        tokens: those of the result, padding included.
        what: what to call the result.

    Raises:
        ValueError: if the recording has other prompts.
    """
    if recording._tensors["tokens"].tolist() != tokens:
        raise ValueError(
            f"The {what} is of {len(tokens)} prompt(s) that this recording has not: give the "
            f"recording that the {what} was made of, or none."
        )


def layer_of(row: str) -> int | str:
    """Return the layer of a lens's row: 3 of "3", "3 mid" and "3 | 6"; "embed" stands for itself."""
    first = row.split()[0]
    return int(first) if first.isdecimal() else first
