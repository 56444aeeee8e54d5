"""How often neurons fire over a text: dead ones, and those that respond to the position.

After Voita, Ferrando and Nalmpantis 2023 ("Neurons in Large Language Models: Dead, N-gram, Positional"), who look
at one bit of a neuron: whether it is active, that is above 0. A neuron is dead over a text if it never is. It is
positional if whether it fires depends on the position: by the mutual information of the two, in nats,

    I = sum_p  n_p / n  *  [ f_p ln(f_p / f) + (1 - f_p) ln((1 - f_p) / (1 - f)) ]

with n_p the tokens seen at position p, f_p the fraction of them on which the neuron fires, n and f the same over
all positions. Estimated from a finite text, I comes out too large, by about (positions - 1) / (2 n) for a neuron
that does not depend on the position at all; `bias` is that number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens.neurons.result import NeuronResult, check_fits
from optlens.neurons.windows import BATCH, Batch, Text, choose, reading, watch
from optlens.recording import fingerprint
from optlens.selection import Selection

if TYPE_CHECKING:
    from pandas import DataFrame

    from optlens.model import OPTForCausalLM


@dataclass(eq=False, repr=False, kw_only=True)
class NeuronStatistics(NeuronResult):
    """How often, how strongly and at which positions neurons fire.

    Attributes:
        fired_at: On how many tokens each fires, `[layer, neuron, pos]`.
        tokens_at: How many tokens were seen at each position, `[pos]`.
        mean: The mean activation, `[layer, neuron]`, float64.
        max: The largest activation, `[layer, neuron]`.
    """

    fired_at: Tensor
    tokens_at: Tensor
    mean: Tensor
    max: Tensor

    @property
    def counted(self) -> int:
        """How many tokens were looked at."""
        return int(self.tokens_at.sum())

    @property
    def fired(self) -> Tensor:
        """On how many tokens each neuron fires, `[layer, neuron]`."""
        return self.fired_at.sum(-1)

    @property
    def frequency(self) -> Tensor:
        """The fraction of tokens on which each neuron fires, `[layer, neuron]`, float64."""
        return self.fired.double() / self.counted

    @property
    def dead(self) -> Tensor:
        """True for neurons that never fire over this text, `[layer, neuron]`."""
        return self.fired == 0

    @property
    def position_frequency(self) -> Tensor:
        """The fraction of tokens at each position on which a neuron fires, `[layer, neuron, pos]`.

        NaN at positions where no token was seen.
        """
        return self.fired_at.double() / self.tokens_at

    @property
    def position_information(self) -> Tensor:
        """Mutual information of firing and position, in nats, `[layer, neuron]`, float64.

        0 for a neuron that fires equally often everywhere; at most ln 2. See `bias`.
        """
        seen = self.tokens_at > 0
        share = self.tokens_at[seen].double() / self.counted
        here, overall = self.position_frequency[..., seen], self.frequency[..., None]
        terms = torch.zeros_like(here)
        for at, everywhere in ((here, overall), (1 - here, 1 - overall)):
            # 0 ln 0 is 0; a share that is 0 overall is 0 at every position
            terms += torch.where(at > 0, at * (at / everywhere).log(), 0.0)
        return (terms * share).sum(-1).clamp(min=0)

    @property
    def bias(self) -> float:
        """By how much `position_information` is too large for a neuron that ignores the position."""
        return (int((self.tokens_at > 0).sum()) - 1) / (2 * self.counted)

    def positional(self, threshold: float = 0.05) -> Tensor:
        """Return True for positional neurons, `[layer, neuron]`.

        Args:
            threshold: The mutual information, in nats, that has to be exceeded, after `bias` is
                taken off.
        """
        return self.position_information - self.bias > threshold

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table, a row for each neuron.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        names = ("fired", "frequency", "dead", "mean", "max", "position_information")
        index = pandas.MultiIndex.from_product(
            [self.layers, self.neurons], names=["layer", "neuron"]
        )
        columns = {name: getattr(self, name).flatten().numpy() for name in names}
        return pandas.DataFrame(columns, index=index).reset_index()

    def __repr__(self) -> str:
        """Say how many are dead and how often the others fire."""
        alive = self.frequency[~self.dead]
        often = f"; the others fire on {100 * alive.mean():.3g} %" if len(alive) else ""
        return (
            f"{self._about()}; over {self.counted} tokens {int(self.dead.sum())} of "
            f"{self.dead.numel()} are dead{often})"
        )


def statistics(
    model: OPTForCausalLM,
    text: Text,
    layers: Selection = None,
    neurons: Selection = None,
    window: int | None = None,
    batch_size: int = BATCH,
    prepend_bos: bool = True,
    progress: bool = True,
) -> NeuronStatistics:
    """Count on which fraction of a text neurons fire, over all and at each position.

    A neuron fires where its activation (`mlp.hook_post`) is above 0. With ReLU a neuron that does
    not fire writes nothing; with GELU (Galactica) it still writes a little, and dead means only
    that its input never was above 0.

    A position is the token's place in its window. For positional neurons give texts at least as
    long as the window, so that all positions are seen, and many windows: see
    `NeuronStatistics.bias`.

    Args:
        model: The model; hooks and interventions attached to it act.
        text: As `top_examples` takes it; read window by window.
        layers: Which blocks: a number, several, or a slice; None for all.
        neurons: Which neurons of each, likewise.
        window: Tokens of one window, its `</s>` included; 128 unless given.
        batch_size: Windows that are run at once.
        prepend_bos: Whether a window that does not begin with `</s>` gets it in front. It is never
            counted.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If the text is empty, or a selection does not fit the model.
        MemoryError: If the counts would not fit, before running.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> found = optlens.neurons.statistics(model, "The cat sat on the mat.", progress=False)
        >>> found.frequency.shape, found.counted
        (torch.Size([5, 1024]), 8)
    """
    how = reading(model, window, batch_size, prepend_bos, progress)
    chosen, which = choose(model, layers, neurons)
    grid = (len(chosen), len(which))
    hint = "choose fewer layers= or neurons=, or a smaller window="
    check_fits(4 * grid[0] * grid[1] * how.window, model.device, hint)
    at = model.device
    fired_at = torch.zeros(len(chosen), how.window, len(which), dtype=torch.int32, device=at)
    tokens_at = torch.zeros(how.window, dtype=torch.long, device=at)
    total = torch.zeros(grid, dtype=torch.float64, device=at)
    largest = torch.full(grid, -torch.inf, device=at)

    def see(row: int, activations: Tensor, batch: Batch) -> None:
        uncounted = ~batch.counted[..., None]
        n_pos = activations.shape[1]
        kept = activations.masked_fill(uncounted, 0.0)
        fired_at[row, :n_pos] += (kept > 0).sum(0, dtype=torch.int32)
        total[row] += kept.sum((0, 1), dtype=torch.float64)
        top = activations.masked_fill(uncounted, -torch.inf).amax((0, 1))
        largest[row] = torch.maximum(largest[row], top)
        if row == 0:
            tokens_at[:n_pos] += batch.counted.sum(0)

    counted = watch(model, text, chosen, which, how, see)
    return NeuronStatistics(
        layers=chosen,
        neurons=which,
        metadata={"fingerprint": fingerprint(model), "window": how.window},
        fired_at=fired_at.transpose(1, 2).contiguous().cpu(),
        tokens_at=tokens_at.cpu(),
        mean=(total / counted).cpu(),
        max=largest.cpu(),
    )
