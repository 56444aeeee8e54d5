"""Which tokens, pairs or triples of tokens set a neuron off.

After Voita, Ferrando and Nalmpantis 2023 ("Neurons in Large Language Models: Dead, N-gram, Positional"): of all
tokens on which a neuron fires, count the n-grams that end there. If a few of them cover nearly all firings, the
neuron detects these n-grams. The smallest such set is found by taking the most frequent ones first.

Text without end has n-grams without end. Of each neuron at most `capacity` are kept: where there are more, all its
counts are lowered by that of the first one too many, and those at zero go (Misra and Gries 1982, in the form that
can be merged, Agarwal et al. 2012). A kept count is then too low by at most `lost`, and an n-gram that is missing had no
more than that. For a detector, whose firings are few n-grams, next to nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.neurons.result import NeuronResult, check_fits, labels_of
from optlens.neurons.windows import BATCH, Batch, Text, choose, reading, watch
from optlens.recording import fingerprint
from optlens.selection import Selection

if TYPE_CHECKING:
    from pandas import DataFrame

    from optlens.model import OPTForCausalLM

BUFFER = 2**22  # firings that are held before they are counted


@dataclass(frozen=True)
class Trigger:
    """An n-gram on whose last token a neuron fires.

    Attributes:
        tokens: Its token ids.
        labels: Legible names of these.
        count: How often the neuron fires on it.
        share: That as a fraction of all firings of the neuron.
    """

    tokens: list[int]
    labels: list[str]
    count: int
    share: float

    def __repr__(self) -> str:
        """Show the n-gram and its share."""
        return f"{''.join(self.labels)} {100 * self.share:.1f} %"


@dataclass(eq=False, repr=False, kw_only=True)
class Triggers(NeuronResult):
    """The n-grams that set neurons off, most frequent first.

    Attributes:
        tokens: Token ids of the n-grams, `[layer, neuron, most, n]`; -1 where there are fewer.
        counts: How often the neuron fires on each, `[layer, neuron, most]`.
        fired: On how many n-grams it fires in all, `[layer, neuron]`.
        covering: How many n-grams cover `coverage` of its firings, `[layer, neuron]`; `most + 1`
            where more than `most` are needed, 0 where it never fires.
        lost: How much too low the counts may be, `[layer, neuron]`; 0 where they are exact.
        coverage: The share of firings that is to be covered.
    """

    tokens: Tensor
    counts: Tensor
    fired: Tensor
    covering: Tensor
    lost: Tensor
    coverage: float

    @property
    def most(self) -> int:
        """With how many n-grams a neuron still counts as a detector."""
        return self.counts.shape[-1]

    @property
    def detectors(self) -> Tensor:
        """True for neurons whose firings `most` n-grams or fewer cover, `[layer, neuron]`."""
        return (self.covering > 0) & (self.covering <= self.most)

    def of(self, layer: int, neuron: int) -> list[Trigger]:
        """Return the n-grams on which one neuron fires, most frequent first, `most` at most.

        Raises:
            InputError: If the neuron is not among those that were looked at.
        """
        at = self.place(layer, neuron)
        fired = int(self.fired[at])
        return [
            Trigger(ids, [self.label(token) for token in ids], count, count / fired)
            for ids, count in zip(self.tokens[at].tolist(), self.counts[at].tolist(), strict=True)
            if count > 0
        ]

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table, a row for each neuron and n-gram.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        rows = [
            {
                "layer": layer,
                "neuron": neuron,
                "ngram": "".join(trigger.labels),
                "count": trigger.count,
                "share": trigger.share,
            }
            for layer in self.layers
            for neuron in self.neurons
            for trigger in self.of(layer, neuron)
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        """Say how many are detectors."""
        n = self.tokens.shape[-1]
        found = f"{int(self.detectors.sum())} of {self.detectors.numel()}"
        return (
            f"{self._about()}; {found} fire on {self.most} {n}-grams or fewer, "
            f"to {100 * self.coverage:g} %)"
        )


def triggers(
    model: OPTForCausalLM,
    text: Text,
    layers: Selection = None,
    neurons: Selection = None,
    n: int = 1,
    coverage: float = 0.95,
    most: int = 50,
    capacity: int = 1000,
    window: int | None = None,
    batch_size: int = BATCH,
    prepend_bos: bool = True,
    progress: bool = True,
) -> Triggers:
    """Count on which tokens (or pairs, or triples of tokens) of a text neurons fire.

    A neuron fires where its activation (`mlp.hook_post`) is above 0. An n-gram ends with the token
    on which it fires and lies in one window; the `</s>` at its start may be its beginning.

    Args:
        model: The model; hooks and interventions attached to it act.
        text: As `top_examples` takes it; read window by window.
        layers: Which blocks: a number, several, or a slice; None for all.
        neurons: Which neurons of each, likewise.
        n: How many tokens make an n-gram.
        coverage: The share of a neuron's firings that its n-grams are to cover.
        most: With how many n-grams a neuron is still a detector; so many are returned.
        capacity: How many different n-grams are counted for each neuron at a time. Memory grows
            with it; counts are exact where a neuron has no more, see `Triggers.lost`.
        window: Tokens of one window, its `</s>` included; 128 unless given.
        batch_size: Windows that are run at once.
        prepend_bos: Whether a window that does not begin with `</s>` gets it in front. It is never
            itself counted as fired on.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If the text is empty, or a selection or number does not fit.
        MemoryError: If the counts would not fit, before running.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> text = "The cat sat on the mat. The dog sat on the cat."
        >>> found = optlens.neurons.triggers(model, text, layers=0, progress=False)
        >>> found.covering.shape
        torch.Size([1, 1024])
    """
    how = reading(model, window, batch_size, prepend_bos, progress)
    chosen, which = choose(model, layers, neurons)
    _check(n, coverage, most, capacity, model.config.vocab_size, len(which))
    hint = "choose fewer layers= or neurons=, or a smaller capacity="
    # a key and a count each, and as much again while they are sorted
    cells = min(capacity, model.config.vocab_size**n) * len(which)
    check_fits(16 * len(chosen) * (cells + BUFFER) + 32 * cells, "cpu", hint)
    tables = [_Counts(len(which), capacity, model.config.vocab_size**n) for _ in chosen]

    def see(row: int, activations: Tensor, batch: Batch) -> None:
        grams, whole = _grams(batch, n, model.config.vocab_size)
        fires = (activations > 0) & (batch.counted & whole)[..., None]
        window, pos, neuron = fires.nonzero(as_tuple=True)
        tables[row].add(neuron, grams[window, pos])

    watch(model, text, chosen, which, how, see)
    tops = [table.top(most) for table in tables]
    keys, counts = (torch.stack(part) for part in zip(*tops, strict=True))
    fired = torch.stack([table.fired for table in tables])
    tokens = _tokens(keys, n, model.config.vocab_size)
    return Triggers(
        layers=chosen,
        neurons=which,
        metadata={"labels": labels_of(model, tokens), "fingerprint": fingerprint(model)},
        tokens=tokens,
        counts=counts,
        fired=fired,
        covering=_covering(counts, fired, coverage),
        lost=torch.stack([table.lost for table in tables]),
        coverage=coverage,
    )


def _check(n: int, coverage: float, most: int, capacity: int, vocab: int, neurons: int) -> None:
    if n < 1 or most < 1 or capacity < most or not 0 < coverage <= 1:
        raise checks.InputError(
            f"n={n}, coverage={coverage}, most={most}, capacity={capacity} do not go together: n "
            "and most are at least 1, capacity at least as large as most, coverage above 0 and at "
            "most 1."
        )
    if vocab**n * neurons >= 2**63:
        raise checks.InputError(
            f"{n}-grams of {vocab} tokens for {neurons} neurons cannot be numbered in 64 bits; "
            "take a smaller n= or fewer neurons=."
        )


def _grams(batch: Batch, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Number the n-gram that ends at each token, and say where there is one, `[batch, pos]`."""
    grams, whole = batch.tokens.clone(), torch.ones_like(batch.counted)
    for back in range(1, n):
        before = batch.tokens.roll(back, 1)
        grams += before * vocab**back
        whole[:, :back] = False
    return grams, whole


def _tokens(keys: Tensor, n: int, vocab: int) -> Tensor:
    """Turn numbers of n-grams back into their tokens, `[..., n]`; -1 stays -1."""
    columns = [keys // vocab**back % vocab for back in reversed(range(n))]
    return torch.stack(columns, -1).masked_fill((keys < 0)[..., None], -1)


def _covering(counts: Tensor, fired: Tensor, coverage: float) -> Tensor:
    """Return how many of the most frequent n-grams cover a share of all firings."""
    reached = counts.cumsum(-1).double() / fired.clamp(min=1)[..., None] >= coverage
    first = (~reached).sum(-1) + 1  # one more than there are where it is never reached
    return first.masked_fill(fired == 0, 0)


class _Counts:
    """How often each neuron of a layer fires on each n-gram, in bounded memory.

    Attributes:
        fired: All firings of each neuron, `[neuron]`.
        lost: By how much its counts may be too low, `[neuron]`.
    """

    def __init__(self, n_neurons: int, capacity: int, n_grams: int):
        """Start with nothing counted."""
        self.capacity, self.n_grams = capacity, n_grams
        self.fired = torch.zeros(n_neurons, dtype=torch.long)
        self.lost = torch.zeros(n_neurons, dtype=torch.long)
        self.keys = torch.zeros(0, dtype=torch.long)  # sorted; neuron * n_grams + n-gram
        self.counts = torch.zeros(0, dtype=torch.long)
        self._waiting: list[Tensor] = []
        self._n_waiting = 0

    def add(self, neuron: Tensor, gram: Tensor) -> None:
        """Count firings, each given by its neuron and its n-gram's number."""
        self._waiting.append((neuron * self.n_grams + gram).cpu())
        self._n_waiting += len(neuron)
        if self._n_waiting > max(BUFFER, len(self.keys)):
            self._count_waiting()

    def top(self, most: int) -> tuple[Tensor, Tensor]:
        """Return the most frequent n-grams of each neuron and their counts, `[neuron, most]`.

        Of equally frequent ones the smaller number comes first; -1 and 0 where there are fewer.
        """
        self._count_waiting()
        neuron, rank = self._ranks()
        chosen = rank < most
        shape = (len(self.fired), most)
        grams, counts = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
        place = (neuron[chosen], rank[chosen])
        grams[place], counts[place] = self.keys[chosen] % self.n_grams, self.counts[chosen]
        return grams, counts

    def _count_waiting(self) -> None:
        """Merge what waits into the counts, and keep no more of them than the capacity allows."""
        if not self._waiting:
            return
        new, times = torch.cat(self._waiting).unique(return_counts=True)
        self._waiting, self._n_waiting = [], 0
        self.fired.index_add_(0, new // self.n_grams, times)
        self.keys, place = torch.cat([self.keys, new]).unique(return_inverse=True)
        merged = torch.zeros_like(self.keys)
        self.counts = merged.index_add_(0, place, torch.cat([self.counts, times]))
        neuron, rank = self._ranks()
        first_too_many = rank == self.capacity
        cut = torch.zeros_like(self.lost)
        cut[neuron[first_too_many]] = self.counts[first_too_many]
        self.lost += cut
        self.counts = self.counts - cut[neuron]
        kept = self.counts > 0
        self.keys, self.counts = self.keys[kept], self.counts[kept]

    def _ranks(self) -> tuple[Tensor, Tensor]:
        """Return each key's neuron and how many of that neuron's keys are counted more often."""
        neuron = self.keys // self.n_grams
        order = self.counts.argsort(descending=True, stable=True)
        order = order[neuron[order].argsort(stable=True)]  # by neuron, then by count
        starts = torch.searchsorted(neuron, neuron)  # the keys are sorted, so by neuron
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - starts[order]
        return neuron, rank
