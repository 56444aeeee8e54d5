"""One prompt of a recording: its real tokens, and where what was recorded of them lies.

A recording may hold several prompts with padding between, and only some of their positions. What
shows one prompt picks it here, and from then on counts real tokens from 0.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.report.markup import token_label

if TYPE_CHECKING:
    from optlens.recording import Recording


@dataclass(frozen=True)
class OnePrompt:
    """Hold the tokens of one prompt and pick its share of a recording's tensors.

    Attributes:
        text: the prompt without the `</s>` in front.
        ids: token ids of the real tokens.
        tokens: their labels, as printed.
        positions: which of them were recorded, as indices into `tokens`.
        columns: where these lie on the recorded axis of the recording's tensors.
        real: True at real tokens among all keys, padding included.
    """

    text: str
    ids: list[int]
    tokens: list[str]
    positions: list[int]
    columns: np.ndarray
    real: np.ndarray
    _recording: "Recording" = field(repr=False)
    _index: int | None = None  # among the prompts of a batch

    def pick(self, values: Any) -> Any:
        """Return this prompt's row of what a recording holds, without the batch axis."""
        return values if self._index is None or values is None else values[self._index]

    def label(self, token: int) -> str:
        """Return a token's label so that it stands for itself wherever it is put."""
        return token_label(self._recording.label(token))

    @cached_property
    def future(self) -> np.ndarray:
        """True where a key lies in a query's future, `[query, key]`."""
        return np.arange(len(self.ids))[None, :] > np.asarray(self.positions)[:, None]


def prompts_of(recording: "Recording") -> list[OnePrompt]:
    """Return every prompt of a recording, one or a batch, without padding."""
    count = len(recording.tokens) if recording.is_batch else 1
    return [_prompt(recording, index if recording.is_batch else None) for index in range(count)]


def as_numpy(values: Any) -> Any:
    """Return a tensor as NumPy, half precision widened; None stays None."""
    if values is None or isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _prompt(recording: "Recording", index: int | None) -> OnePrompt:
    def pick(values: Any) -> Any:
        return values if index is None else values[index]

    ids = as_numpy(pick(recording.tokens))
    real = as_numpy(pick(recording.mask)).astype(bool)
    places = np.asarray(pick(recording.columns))  # what was recorded, as indices into `ids`
    columns = np.flatnonzero(real[places])  # of those, the ones that are no padding
    kept = ids[real].tolist()
    tokens = [token_label(recording.label(token)) for token in kept]
    return OnePrompt(
        text=_as_given(pick(recording.prompt), tokens[0]),
        ids=kept,
        tokens=tokens,
        positions=(real.cumsum() - 1)[places[columns]].tolist(),
        columns=columns,
        real=real,
        _recording=recording,
        _index=index,
    )


def _as_given(prompt: str, first: str) -> str:
    """Return the prompt without the `</s>` that the tokenizer put in front of it."""
    special = first.startswith("<") and first.endswith(">")
    return (prompt.removeprefix(first) if special else prompt) or prompt
