"""Gather what a page shows of one recorded prompt, as plain arrays and legible words.

With `one_prompt.py`, this is all of the report that reads a `Recording`, and it knows no model.
Padding is dropped, and keys that lie in a query's future become NaN, so that what comes after sees
one prompt of real tokens. What was not recorded is None and has no place on the page.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.recording import NotRecordedError
from optlens.report.one_prompt import OnePrompt, as_numpy, prompts_of

if TYPE_CHECKING:
    from optlens.recording import Recording


@dataclass(frozen=True)
class LensFacts:
    """Hold the logit lens of one prompt, by row (embedding first) and recorded position."""

    rows: list[str]
    ids: np.ndarray  # [row, pos, k] int64
    words: list[list[list[str]]]  # [row][pos][k]
    probs: np.ndarray  # [row, pos, k]
    entropy: np.ndarray  # [row, pos], nats
    kl: np.ndarray  # [row, pos], nats, from the final prediction to the row's


@dataclass(frozen=True)
class Answer:
    """Hold the model's prediction after the prompt, and how each row of the lens ranks it."""

    words: list[str]  # [k], best first
    probs: np.ndarray  # [k]
    row_probs: np.ndarray  # [row], of the best word; NaN where it is not known
    row_ranks: np.ndarray  # [row], 0 is the top; -1 where it is only known to be under the top k

    @property
    def settled(self) -> int | None:
        """Return the row from which the answer stays on top to the end; None if it never does."""
        below = np.flatnonzero(self.row_ranks != 0)
        first = int(below[-1]) + 1 if below.size else 0
        return first if first < len(self.row_ranks) else None


@dataclass(frozen=True)
class Facts:
    """Hold what a page shows of one prompt."""

    prompt: str  # without the `</s>` in front
    shape: str  # the model in words, such as "6 layers of 8 heads"
    ids: list[int]
    tokens: list[str]  # as printed
    positions: list[int]  # the recorded positions, as indices into `tokens`
    layers: list[int]
    heads: list[int]
    lens: LensFacts | None
    answer: Answer | None
    attention: np.ndarray | None  # [layer, head, query, key], NaN where masked
    norms: np.ndarray | None  # [row, pos]
    norm_rows: list[str]
    provenance: list[tuple[str, str]]


def gather(recording: "Recording", top_k: int = 5) -> list[Facts]:
    """Return the facts of every prompt of a recording, one or a batch.

    Args:
        recording: what was recorded; a part that it lacks is left out.
        top_k: how many tokens a cell of the lens lists, at most the size of the vocabulary.

    Raises:
        ValueError: when `top_k` is under 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: a cell of the lens lists at least one token")
    lens = stored_lens(recording, top_k)
    parts = {name: _recorded(recording, name) for name in ("attention", "residual")}
    return [_one(recording, lens, parts, prompt) for prompt in prompts_of(recording)]


def lens_facts(recording: "Recording", lens: Any, prompt: OnePrompt) -> LensFacts:
    """Return the lens of one prompt, as `Recording.logit_lens` gives it, in words and arrays."""
    values = (lens.top_tokens, lens.top_probs, lens.entropy, lens.kl)
    top, probs, entropy, kl = (as_numpy(prompt.pick(v))[:, prompt.columns] for v in values)
    names = {number: prompt.label(number) for number in np.unique(top).tolist()}
    words = [[[names[i] for i in cell] for cell in row] for row in top.tolist()]
    return LensFacts(list(lens.labels), top, words, probs, entropy, kl)


def stored_lens(recording: "Recording", top_k: int) -> Any:
    """Return the recording's logit lens; None if it holds none."""
    try:
        return recording.logit_lens(top_k=min(top_k, recording.metadata["config"]["vocab_size"]))
    except NotRecordedError:
        return None


def _one(recording: "Recording", lens: Any, parts: dict[str, Any], prompt: OnePrompt) -> Facts:
    """Return the facts of one prompt, without its padding."""
    attention, residual = (as_numpy(prompt.pick(parts[name])) for name in ("attention", "residual"))
    if attention is not None:
        attention = attention[:, :, prompt.columns][..., prompt.real].astype(np.float64)
        attention[..., prompt.future] = np.nan
    facts = None if lens is None else lens_facts(recording, lens, prompt)
    norms = None if residual is None else np.linalg.norm(residual, axis=-1)[:, prompt.columns]
    return Facts(
        prompt=prompt.text,
        shape=shape_in_words(recording),
        ids=prompt.ids,
        tokens=prompt.tokens,
        positions=prompt.positions,
        layers=list(recording.layers),
        heads=list(recording.heads),
        lens=facts,
        answer=_answer(recording, lens, facts, prompt),
        attention=attention,
        norms=norms,
        norm_rows=list(recording.row_labels),
        provenance=_provenance(recording),
    )


def shape_in_words(recording: "Recording") -> str:
    """Return the size of the model, such as "6 layers of 8 heads"."""
    config = recording.metadata["config"]
    heads = _count(config["num_attention_heads"], "head")
    return f"{_count(config['num_hidden_layers'], 'layer')} of {heads}"


def _answer(
    recording: "Recording", lens: Any, facts: LensFacts | None, prompt: OnePrompt
) -> Answer | None:
    """Return the prediction after the last token, where the recording reaches so far."""
    last_layer = recording.metadata["config"]["num_hidden_layers"] - 1
    at_end = prompt.positions[-1] == len(prompt.ids) - 1
    if facts is None or not at_end or recording.layers[-1] != last_layer:
        return None
    best = int(facts.ids[-1, -1, 0])
    column = prompt.columns[-1]
    try:
        found = (as_numpy(prompt.pick(f(best))) for f in (lens.rank, lens.prob))
        ranks, probs = (values[:, column] for values in found)
    except NotRecordedError:  # loaded without its model: the stored top tokens must do
        found = facts.ids[:, -1] == best  # [row, k]
        ranks = np.where(found.any(-1), found.argmax(-1), -1)
        probs = np.where(found.any(-1), (facts.probs[:, -1] * found).sum(-1), np.nan)
    return Answer(facts.words[-1][-1], facts.probs[-1, -1], probs, ranks)


def _recorded(recording: "Recording", name: str) -> Any:
    return getattr(recording, name) if name in recording.what else None


def _provenance(recording: "Recording") -> list[tuple[str, str]]:
    """Return what the recording says of its origin, in words."""
    facts = recording.metadata
    config = facts["config"]
    name = config.get("_name_or_path") or "OPT"
    model = (
        f"{name}: {_count(config['num_hidden_layers'], 'layer')}, "
        f"{_count(config['num_attention_heads'], 'head')} each, width {config['hidden_size']}, "
        f"MLP {config['ffn_dim']}, vocabulary {config['vocab_size']:,}"
    )
    pairs = [
        ("model", model),
        ("fingerprint of its weights", facts["fingerprint"][:16]),
        ("computed in", facts["model_dtype"].removeprefix("torch.")),
        ("stored in", facts["dtype"].removeprefix("torch.")),
        ("recorded", ", ".join(facts["what"])),
        ("edited while running", ", ".join(facts["edited_hooks"]) or "nothing"),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts["versions"].items())),
    ]
    return [(name, value) for name, value in pairs if value]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
