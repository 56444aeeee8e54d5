"""When a text is at its end: the end-of-text token, or a text that the user waits for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from optlens.checks import InputError
from optlens.config import OPTConfig
from optlens.tokenizer import OPTTokenizer


def eos_tokens(config: OPTConfig, given: Sequence[int] | None) -> tuple[int, ...]:
    """Return the tokens that end a text: those given, else the config's; () if there are none.

    Raises:
        InputError: If one is not in the vocabulary.
    """
    ids = config.eos_token_id if given is None else given
    ids = () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"eos_token_id {token} is no token of this model, which has ids 0 to "
                f"{config.vocab_size - 1}; pass stop_at_eos=False to go on regardless."
            )
    return ids


class StopStrings:
    """Finds stop strings in bytes, so that neither tokens nor characters cut them apart."""

    def __init__(self, texts: Sequence[str], tokenizer: OPTTokenizer) -> None:
        """Remember what to look for, and how tokens are spelt."""
        self._wanted = [text.encode("utf-8") for text in texts]
        self._reach = max(map(len, self._wanted))
        self._spell = cache(lambda token: tokenizer.bytes_of(token) or b"")

    def completed_by(self, tokens: Sequence[int]) -> bool:
        """Say whether the last of these tokens `[pos]` completes a stop string.

        It may have begun in the tokens before, those of the prompt included, and may end inside the
        last token.
        """
        newest = self._spell(tokens[-1])
        text = newest
        for token in reversed(tokens[:-1]):
            if len(text) >= len(newest) + self._reach - 1:
                break
            text = self._spell(token) + text
        before = len(text) - len(newest)
        return any(text.find(s, max(0, before - len(s) + 1)) >= 0 for s in self._wanted)

    def completed(self, tokens: Tensor, first: Tensor) -> list[bool]:
        """Say for each row of `tokens [batch, pos]` whether it ends so.

        Args:
            tokens: The texts.
            first: In which column each begins, after its padding, `[batch]`.
        """
        rows = zip(tokens.tolist(), first.tolist(), strict=True)
        return [self.completed_by(row[start:]) for row, start in rows]
