"""Scores of heads by where they look: previous token, duplicate, induction, first token, and how widely.

With A the attention of one head, q a query and k a key, counted over a prompt's real tokens:

| score | mean over queries q of | queries that can have it |
|---|---|---|
| `previous_token` | A[q, q - 1] | all but the first |
| `duplicate_token` | the sum of A[q, k] over earlier tokens k equal to token q | with an earlier equal token |
| `induction` | the sum of A[q, j + 1] over earlier tokens j equal to token q | with an earlier equal token |
| `first_token` | A[q, 0] | all but the first |
| `entropy` | the entropy of A[q, :], in nats | all but the first |
| `distance` | the sum of A[q, k] (q - k), in tokens | all but the first |

Previous-token and induction heads are described by Olsson et al. 2022 (arXiv 2209.11895), who measure
them on random tokens that repeat; duplicate-token heads by Wang et al. 2022 (arXiv 2211.00593); the
first token as a sink of attention by Xiao et al. 2023 (arXiv 2309.17453). A mean over the queries that
can have the score gives a perfect head 1. TransformerLens's `head_detector` (error measure "mul")
divides by all queries instead: that is `queries="all"`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.lens.source import batched, recording_of
from optlens.logit_math import widened
from optlens.recording import Recording
from optlens.selection import select

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM
    from optlens.selection import Selection

MATCHES = ("previous_token", "duplicate_token", "induction")
KINDS = (*MATCHES, "first_token", "entropy", "distance")
LABELS = {
    "previous_token": "attention to the previous token",
    "duplicate_token": "attention to earlier equal tokens",
    "induction": "attention to what followed earlier equal tokens",
    "first_token": "attention to the first token",
    "entropy": "entropy of attention (nats)",
    "distance": "mean distance (tokens)",
}
_AT_ONCE = 2**20  # weights


@dataclass(eq=False)
class HeadScores:
    """Six numbers for every head; for a batch of prompts with a leading batch axis.

    NaN where no query of the prompt can have the score, as in a prompt without equal tokens.

    Attributes:
        previous_token: Attention to the token before, 0 to 1, `[layer, head]`.
        duplicate_token: Attention to earlier equal tokens, 0 to 1, `[layer, head]`.
        induction: Attention to what followed earlier equal tokens, 0 to 1, `[layer, head]`.
        first_token: Attention to the first token, 0 to 1, `[layer, head]`.
        entropy: Mean entropy of attention, in nats, `[layer, head]`.
        distance: Mean distance to what is attended, in tokens, `[layer, head]`.
        layers: The numbers of the layers.
        heads: The numbers of the heads.
        counts: For each score, over how many queries it is the mean; in a batch a list of them.
    """

    previous_token: Tensor
    duplicate_token: Tensor
    induction: Tensor
    first_token: Tensor
    entropy: Tensor
    distance: Tensor
    layers: list[int]
    heads: list[int]
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_batch(self) -> bool:
        """Whether there is a leading batch axis."""
        return self.entropy.ndim == 3

    def __getitem__(self, kind: str) -> Tensor:
        """Return one score by its name, `[layer, head]`.

        Raises:
            InputError: If there is no such score.
        """
        if kind not in KINDS:
            raise checks.InputError(f"There is no score {kind!r}; scores are {', '.join(KINDS)}.")
        return getattr(self, kind)

    def mean(self) -> HeadScores:
        """Return the mean over the prompts of a batch, leaving out those without the score."""
        if not self.is_batch:
            return self
        means = {kind: self[kind].nanmean(0) for kind in KINDS}
        counts = {kind: sum(count) for kind, count in self.counts.items()}
        return HeadScores(**means, layers=self.layers, heads=self.heads, counts=counts)

    def top(self, kind: str, count: int = 5) -> list[tuple[int, int, float]]:
        """Return the heads with the largest score, best first: layer, head, score.

        In a batch, by the mean over prompts. Heads without the score (NaN) are left out.
        """
        scores = self.mean()[kind]
        order = scores.flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        found = []
        for place in order[:count].tolist():
            layer, head = divmod(place, len(self.heads))
            if not scores[layer, head].isnan():
                found.append((self.layers[layer], self.heads[head], float(scores[layer, head])))
        return found

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table, a row for each head; in a batch, for each prompt and head.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        names = {"prompt": range(len(self.entropy))} if self.is_batch else {}
        names |= {"layer": self.layers, "head": self.heads}
        index = pandas.MultiIndex.from_product(names.values(), names=names)
        columns = {kind: self[kind].flatten().numpy() for kind in KINDS}
        return pandas.DataFrame(columns, index=index).reset_index()

    def plot(self, kind: str = "induction", **options: Any) -> Figure:
        """Draw one score for every head; in a batch, the mean over prompts.

        Args:
            kind: Which score.
            **options: Further arguments of `optlens.plots.head_scores`, such as `style="dark"`.
        """
        from optlens.plots import head_scores as draw

        about = {"layers": self.layers, "heads": self.heads, "label": LABELS.get(kind)}
        title = {"title": f"Heads by {kind.replace('_', ' ')}"}
        return draw(self.mean()[kind], **about | title | options)


@torch.no_grad()
def head_scores(
    model: OPTForCausalLM | None,
    source: Recording | Prompt,
    queries: str = "eligible",
    exclude: str | Iterable[str] = (),
    layers: Selection = None,
) -> HeadScores:
    """Score every head by where it looks; this module's docstring has the definitions.

    Args:
        model: The model; None is enough for a recording.
        source: A recording that holds "attention", or a prompt or a list of prompts. Induction
            shows best on random words that repeat: `prompts.induction(model, 8, length=20).clean`.
        queries: The mean is over the queries that can have the score ("eligible"), or over all
            ("all"), where those that cannot have it count as 0.
        exclude: Attention to leave out of `previous_token`, `duplicate_token` and `induction`,
            which are then shares of what is left: "first" (to the first token), "current" (of a
            token to itself), or both.
        layers: Which layers to score, since long prompts take time; None for all that there are.

    Returns:
        Scores `[layer, head]`, in float32 at least, of the layers and heads that were recorded.

    Raises:
        NotRecordedError: If the recording holds no attention.
        InputError: If an argument is unknown, or a layer was not recorded.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> prompts = optlens.prompts.induction(model, 4, length=12).clean
        >>> scores = head_scores(model, prompts).mean()
        >>> layer, head, score = scores.top("induction", 1)[0]
        >>> score > 0.9
        True
    """
    if queries not in ("eligible", "all"):
        raise checks.InputError(f"queries={queries!r}: give 'eligible' or 'all'.")
    left_out = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for name in left_out:
        if name not in ("first", "current"):
            raise checks.InputError(f"exclude={name!r}: give 'first', 'current' or both.")
    recording = recording_of(model, source, "attention", layers=layers)
    chosen = _layers(recording, layers)
    tokens, mask = (batched(recording, name).cpu() for name in ("tokens", "mask"))
    prompts = [
        _Places(tokens[b], mask[b], columns, queries == "all", left_out)
        for b, columns in enumerate(recording.metadata["columns"])
    ]
    found = []
    for layer in chosen:
        attention = batched(recording, "attention", layer)  # [batch, head, query, key]
        found.append([places.scores(attention[b]) for b, places in enumerate(prompts)])
    values = {
        kind: torch.stack([torch.stack([of[kind] for of in row]) for row in found], 1)
        for kind in KINDS
    }
    counts = {kind: [places.counts[kind] for places in prompts] for kind in KINDS}
    if not recording.is_batch:
        values = {kind: value[0] for kind, value in values.items()}
        counts = {kind: count[0] for kind, count in counts.items()}
    return HeadScores(**values, layers=chosen, heads=recording.heads, counts=counts)


def _layers(recording: Recording, wanted: Selection) -> list[int]:
    """Return the numbers of the layers to score."""
    chosen = select(wanted, recording.metadata["config"]["num_hidden_layers"], "layer")
    if wanted is None:
        return recording.layers
    if missing := [layer for layer in chosen if layer not in recording.layers]:
        raise checks.InputError(
            f"layers={wanted}: this recording has no layer {missing[0]}; it has {recording.layers}."
        )
    return chosen


class _Places:
    """Which keys of one prompt count for which score, and the mean over which queries.

    Attributes:
        counts: For each score, over how many queries it is the mean.
    """

    def __init__(
        self, tokens: Tensor, mask: Tensor, columns: list[int], everywhere: bool, exclude: tuple
    ) -> None:
        """Find the places.

        Args:
            tokens: Token ids, padding included, `[pos]`.
            mask: True at real tokens, `[pos]`.
            columns: The recorded queries.
            everywhere: Whether the mean is over all queries.
            exclude: What to leave out of the first three scores.
        """
        self.keys = mask.nonzero()[:, 0]
        at = torch.tensor(columns, dtype=torch.long)
        self.rows = mask[at].nonzero()[:, 0]
        query = (mask.cumsum(0) - 1)[at[self.rows]][:, None]  # counted over real tokens
        key = torch.arange(len(self.keys))
        real = tokens[self.keys]
        duplicate = (real[query] == real) & (key < query)
        induction = torch.zeros_like(duplicate)
        induction[:, 1:] = duplicate[:, :-1]
        self.hidden = torch.zeros_like(duplicate)
        if "first" in exclude:
            self.hidden |= key == 0
        if "current" in exclude:
            self.hidden |= key == query
        self.hides = bool(self.hidden.any())
        wanted = (key == query - 1, duplicate, induction)
        self.wanted = {
            kind: found & ~self.hidden for kind, found in zip(MATCHES, wanted, strict=True)
        }
        self.distance = query - key
        later = query[:, 0] >= 0 if everywhere else query[:, 0] > 0
        self.counted = {kind: later for kind in KINDS}
        if not everywhere:
            self.counted |= {kind: found.any(-1) for kind, found in self.wanted.items()}
        self.counts = {kind: int(rows.sum()) for kind, rows in self.counted.items()}

    def scores(self, attention: Tensor) -> dict[str, Tensor]:
        """Return each score of the heads of one layer, `[head]`.

        Args:
            attention: Of one layer and prompt, `[head, query, key]`.
        """
        # Some heads at a time: what lies in the processor's cache is read over and over.
        at_once = max(1, _AT_ONCE // max(1, attention.shape[-2] * attention.shape[-1]))
        parts = [self._scores(heads) for heads in attention.split(at_once)]
        return {kind: torch.cat([part[kind] for part in parts]) for kind in KINDS}

    def _scores(self, attention: Tensor) -> dict[str, Tensor]:
        device = attention.device
        if len(self.rows) < attention.shape[-2]:
            attention = attention[:, self.rows.to(device)]
        if len(self.keys) < attention.shape[-1]:
            attention = attention[..., self.keys.to(device)]
        whole = widened(attention)
        found = {
            "first_token": whole[..., 0],
            "entropy": torch.special.entr(whole).sum(-1),
            "distance": (whole * self.distance.to(whole)).sum(-1),
        }
        result = {
            kind: each[:, self.counted[kind].to(device)].mean(-1).cpu()
            for kind, each in found.items()
        }
        left = whole.masked_fill(self.hidden.to(device), 0.0) if self.hides else whole
        weights = left.sum(-1)
        for kind, wanted in self.wanted.items():  # they lie in rows that count
            hits = left.flatten(1) @ wanted.to(left).flatten()
            result[kind] = (hits / weights[:, self.counted[kind].to(device)].sum(-1)).cpu()
        return result
