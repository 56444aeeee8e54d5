"""Two models on one prompt, or one model on two prompts: where and by how much do they differ?

Three numbers say so at every token: how far the predictions are apart (Kullback-Leibler divergence, in nats), how
far they are apart when read off after each layer (the logit lens), and the cosine of the two residual streams. The
cosine compares coordinates, so it means something between versions of one model and between prompts, and little
between models that were trained apart; the divergences always do, as long as both predict the same tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from optlens import checks
from optlens.comparison.alignment import align, column_labels
from optlens.comparison.numbers import numbers
from optlens.comparison.result import Comparison
from optlens.files import type_of
from optlens.recording import Recording

if TYPE_CHECKING:
    from optlens.base import Prompt
    from optlens.model import OPTForCausalLM


def compare(
    a: OPTForCausalLM | Recording,
    b: OPTForCausalLM | Recording | None,
    prompt: Prompt | None = None,
    prompt_b: Prompt | None = None,
    top_k: int = 5,
) -> Comparison:
    """Compare two models on one prompt, one model on two prompts, or two recordings.

    - `compare(model_a, model_b, prompt)`: two models;
    - `compare(model, None, prompt, prompt_b)`: two prompts;
    - `compare(recording_a, recording_b)`: what was recorded, with the residual stream; so also
      one run with interventions and one without.

    Two prompts of one length are compared position by position. Others are aligned by the edits
    that turn one into the other; a token without a counterpart is kept, with NaN. Layers are
    compared by their number. Where models differ in depth, each row of the shallower one is
    compared with the row of the other at the nearest relative depth, and `rows` names both.

    Args:
        a: A model, or a recording.
        b: Another; None for the model `a` on another prompt.
        prompt: Text, or token ids `[pos]`, for models; for recordings none.
        prompt_b: What `b` is run on; the same as `a` unless given.
        top_k: How many of each side's likeliest tokens to keep for every row and column.

    Returns:
        The comparison, on the CPU.

    Raises:
        InputError: If there is nothing to compare, the vocabularies differ, or there are several
            prompts on a side, or `top_k` is no whole number of at least 1.
        NotRecordedError: If a recording lacks the residual stream or its model.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> result = compare(model, None, "The cat sat on the", "The big cat sat on the")
        >>> result.labels
        ['</s>', 'The', ' | ·big', '·cat', '·sat', '·on', '·the']
        >>> compare(model, model, "The cat sat").kl.max()
        tensor(0.)
    """
    b_is_a = b is None
    for side, source in (("a", a), ("b", a if b_is_a else b)):
        if not (hasattr(source, "record") or isinstance(source, Recording)):
            raise TypeError(
                f"{side} is {type_of(source)}, expected a model or a recording. To compare two "
                "prompts of one model, write compare(model, None, prompt, prompt_b)."
            )
    if b_is_a and prompt_b is None:
        raise checks.InputError(
            "There is nothing to compare with: give two models, compare(model_a, model_b, prompt), "
            "or two prompts, compare(model, None, prompt, prompt_b)."
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise checks.InputError(f"top_k={top_k!r} must be a whole number of at least 1.")
    first = _recorded(a, prompt, "a")
    other = prompt if prompt_b is None else prompt_b
    second = _recorded(a if b_is_a else b, other, "b")
    _check_vocabulary(first, second)
    pairs, rows = _paired_rows(first, second)
    tokens = [_tokens(recording) for recording in (first, second)]
    columns = align(*tokens)
    names = [[rec.label(i) for i in ids] for rec, ids in zip((first, second), tokens, strict=True)]
    most = min(top_k, first.metadata["config"]["vocab_size"])
    found = numbers(first, second, pairs, columns, most)
    seen = {
        int(i)
        for name in ("guesses_a", "guesses_b", "final_a", "final_b")
        for i in found[name].unique()
        if i >= 0
    }
    labels = {str(token): first.label(token) for token in sorted({*seen, *tokens[0], *tokens[1]})}
    about = {
        "prompts": [first.prompt, second.prompt],
        "ids": tokens,
        "fingerprints": [rec.metadata["fingerprint"] for rec in (first, second)],
    }
    return Comparison(
        **found,
        columns=columns,
        labels=column_labels(columns, *names),
        rows=rows,
        tokens=labels,
        metadata=about,
    )


def _recorded(source: Any, prompt: Prompt | None, side: str) -> Recording:
    """Return a recording of one prompt with its residual stream."""
    if isinstance(source, Recording):
        if prompt is not None:
            raise checks.InputError(
                f"{side} is a recording, which has its prompt; leave prompt out, and give a model "
                "beside it its own as prompt_b=."
            )
        recording = source
    elif prompt is None:
        raise checks.InputError(f"{side} is a model and needs a prompt to run on.")
    else:
        recording = source.record(prompt, what="residual")
    if recording.is_batch:
        raise checks.InputError(
            f"{side} has a batch of {len(recording.tokens)} prompts; compare them one at a time, "
            "each as text or as token ids [pos]."
        )
    recording._get("residual", "residual")  # raises, naming what to record
    return recording


def _check_vocabulary(first: Recording, second: Recording) -> None:
    """Check that both runs predict the same tokens."""
    sizes = [rec.metadata["config"]["vocab_size"] for rec in (first, second)]
    if sizes[0] != sizes[1]:
        raise checks.InputError(
            f"The models predict different vocabularies, of {sizes[0]} and {sizes[1]} tokens; "
            "probabilities can only be compared token by token."
        )
    one, other = first.model.tokenizer, second.model.tokenizer
    if one is None or other is None or one is other:
        return
    words = [tokenizer.to_str_tokens(range(sizes[0])) for tokenizer in (one, other)]
    for token, (left, right) in enumerate(zip(*words, strict=True)):
        if left != right:
            raise checks.InputError(
                f"The models' tokenizers differ: token {token} is {left!r} in a and {right!r} in "
                "b; probabilities can only be compared token by token."
            )


def _paired_rows(first: Recording, second: Recording) -> tuple[list[tuple[int, int]], list[str]]:
    """Pair the rows of two residual streams, and name the pairs."""
    depths = [rec.metadata["config"]["num_hidden_layers"] for rec in (first, second)]
    if depths[0] == depths[1]:
        if first.layers != second.layers:
            raise checks.InputError(
                f"a holds layers {first.layers} and b layers {second.layers}; record the same ones."
            )
        return [(row, row) for row in range(len(first.row_labels))], first.row_labels
    for recording, depth, side in zip((first, second), depths, "ab", strict=True):
        if recording.layers != list(range(depth)):
            raise checks.InputError(
                f"The models have {depths[0]} and {depths[1]} layers, so rows are paired by "
                f"relative depth, which needs all of them; {side} holds layers {recording.layers}."
            )
    shallow = min(depths)
    # half a row more, rounded down, is the nearest row
    rows = [[(2 * i * d + shallow) // (2 * shallow) for i in range(shallow + 1)] for d in depths]
    pairs = list(zip(*rows, strict=True))
    names = [(first.row_labels[a], second.row_labels[b]) for a, b in pairs]
    return pairs, [one if one == other else f"{one} | {other}" for one, other in names]


def _tokens(recording: Recording) -> list[int]:
    """Return the token ids at the recorded positions."""
    return recording.tokens[torch.tensor(recording.columns)].tolist()
