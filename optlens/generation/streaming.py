"""Generation piece by piece: each piece of text as soon as its characters are whole."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optlens.checks import InputError
from optlens.generation.rows import whole_step
from optlens.generation.run import Job

if TYPE_CHECKING:
    from optlens.generation.result import Generation
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM


class Stream:
    """An iterator over the pieces of a text that is being written.

    The pieces of a stream, put together, are the continuation that `model.generate` returns. The
    model runs only while the next piece is asked for, and hooks and interventions of the stream are
    attached only then; one may stop at any piece.
    """

    def __init__(self, job: Job) -> None:
        """Take a job for one text."""
        self._job = job
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ended = False

    def __iter__(self) -> Iterator[str | int]:
        """Go on where the stream is."""
        return self

    def __next__(self) -> str | int:
        """Write until there is something to show; return it."""
        job = self._job
        while not job.strategy.done:
            with job.active(), whole_step(job.strategy):
                token = int(job.strategy.step()[0])
            if not job.is_text:
                return token
            piece = self._decoder.decode(self._bytes_of(token))
            if piece:
                return piece
        if self._ended:
            raise StopIteration
        self._ended = True
        rest = self._decoder.decode(b"", final=True) if job.is_text else ""
        if not rest:
            raise StopIteration
        return rest  # bytes that never became a character, as U+FFFD

    def _bytes_of(self, token: int) -> bytes:
        tokenizer = self._job.model.tokenizer
        special = token in tokenizer.special_ids
        return b"" if special else tokenizer.bytes_of(token) or b""

    @property
    def result(self) -> Generation:
        """What is written so far, as `model.generate(..., return_dict=True)` returns it."""
        return self._job.result(interrupted=not self._job.strategy.done)


def stream(
    model: OPTForCausalLM,
    prompt: Prompt | None = None,
    max_new_tokens: int | None = 20,
    **options: Any,
) -> Stream:
    """Write on from one prompt, piece by piece.

    Args:
        model: The model.
        prompt: A text, of which pieces of text come; or token ids `[pos]` or `[1, pos]`, of which
            token ids come. The pieces do not repeat the prompt.
        max_new_tokens: How many tokens to write at most.
        **options: As for `generate`, without beams, several texts and `return_dict`.

    Returns:
        An iterator; its `result` is what is written so far, with all that `return_dict=True` gives.

    Raises:
        InputError: As `generate` does, before anything runs; also for more than one text.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> pieces = list(model.stream("The cat sat on the", 5))
        >>> "The cat sat on the" + "".join(pieces) == model.generate("The cat sat on the", 5)
        True
    """
    given = options.get("input_ids") if prompt is None else prompt
    several = isinstance(given, list | tuple) or (
        isinstance(given, Tensor) and given.ndim > 1 and len(given) > 1
    )
    for name in ("num_beams", "num_return_sequences"):
        several = several or options.get(name, 1) != 1
    if several:
        raise InputError(
            "stream writes one text: give one prompt, without num_beams and num_return_sequences; "
            "model.generate writes several."
        )
    if options.pop("return_dict", None) is False:
        raise InputError("stream has its pieces and its result; leave out return_dict.")
    return Stream(Job(model, prompt, max_new_tokens, **options))
