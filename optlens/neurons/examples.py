"""The places of a text where a neuron fires most strongly, with what stands around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.neurons.best import NOTHING, Best
from optlens.neurons.result import NeuronResult, check_fits, labels_of
from optlens.neurons.windows import BATCH, Batch, Text, choose, reading, watch
from optlens.recording import fingerprint
from optlens.selection import Selection

if TYPE_CHECKING:
    from pandas import DataFrame

    from optlens.model import OPTForCausalLM


@dataclass(frozen=True)
class Example:
    """One place where a neuron fires.

    Attributes:
        layer: The neuron's block.
        neuron: Its number there.
        activation: How strongly it fires.
        tokens: Token ids of the context.
        labels: Legible names of these.
        activations: The neuron's activation at each of these; NaN is nowhere among them.
        index: Which of these the example is about.
        document: Which document of the text the token is from.
        offset: The token's place in that document, in tokens.
        position: Its position in the window that was run.
    """

    layer: int
    neuron: int
    activation: float
    tokens: list[int]
    labels: list[str]
    activations: list[float]
    index: int
    document: int
    offset: int
    position: int

    def __repr__(self) -> str:
        """Show the context, the token in brackets."""
        words = list(self.labels)
        words[self.index] = f"[{words[self.index]}]"
        return f"{self.activation:.3f} {''.join(words)}"


@dataclass(eq=False, repr=False, kw_only=True)
class TopExamples(NeuronResult):
    """The strongest examples of each neuron, strongest first.

    Attributes:
        values: Their activations, `[layer, neuron, k]`; 0 where there are fewer than k.
        tokens: Token ids of their contexts, `[layer, neuron, k, context]`; -1 where the context
            reaches beyond its window.
        activations: The neuron's activation at each token of these; NaN beyond the window.
        documents: Which document each is from, `[layer, neuron, k]`; -1 where there is none.
        offsets: The token's place in the document, in tokens, `[layer, neuron, k]`.
        positions: The token's position in the window that was run, `[layer, neuron, k]`.
        before: How many tokens of a context stand before the one it is about.
        counted: How many tokens were looked at.
    """

    values: Tensor
    tokens: Tensor
    activations: Tensor
    documents: Tensor
    offsets: Tensor
    positions: Tensor
    before: int
    counted: int

    def of(self, layer: int, neuron: int) -> list[Example]:
        """Return the examples of one neuron, strongest first; fewer than k if it seldom fires.

        Raises:
            InputError: If the neuron is not among those that were looked at.
        """
        at = self.place(layer, neuron)
        found = []
        for rank in range(int((self.values[at] > 0).sum())):
            tokens = self.tokens[at][rank]
            inside = tokens != NOTHING
            ids = tokens[inside].tolist()
            found.append(
                Example(
                    layer,
                    neuron,
                    float(self.values[at][rank]),
                    ids,
                    [self.label(token) for token in ids],
                    self.activations[at][rank][inside].tolist(),
                    int(inside[: self.before].sum()),
                    int(self.documents[at][rank]),
                    int(self.offsets[at][rank]),
                    int(self.positions[at][rank]),
                )
            )
        return found

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table, a row for each example.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        rows = [
            {
                "layer": layer,
                "neuron": neuron,
                "rank": rank,
                "activation": example.activation,
                "token": example.labels[example.index],
                "context": "".join(example.labels),
                "document": example.document,
                "offset": example.offset,
                "position": example.position,
            }
            for layer in self.layers
            for neuron in self.neurons
            for rank, example in enumerate(self.of(layer, neuron))
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        """Say how many examples of what."""
        return f"{self._about()}; up to {self.values.shape[-1]} examples each, of {self.counted} tokens)"


def top_examples(
    model: OPTForCausalLM,
    text: Text,
    layers: Selection = None,
    neurons: Selection = None,
    k: int = 10,
    context: tuple[int, int] = (16, 8),
    window: int | None = None,
    batch_size: int = BATCH,
    prepend_bos: bool = True,
    progress: bool = True,
) -> TopExamples:
    """Find where in a text neurons fire most strongly, for one, several or all of them in one pass.

    A neuron's activation is the value of `mlp.hook_post`. The text is read in windows, each a run
    of its own, and never held as a whole. A window gives a neuron one example at most, its largest
    activation there, so that no two overlap; of examples with the same text up to the token, only
    the strongest is kept. Of equal activations the earlier in the text comes first.

    Args:
        model: The model; hooks and interventions attached to it act.
        text: Text; a path or an open file; documents (any iterable of texts); or token ids, `[pos]`
            or a document a row, which are cut like text. Documents never share a window.
        layers: Which blocks: a number, several, or a slice; None for all.
        neurons: Which neurons of each, likewise.
        k: How many examples of each.
        context: How many tokens before and after each to keep.
        window: Tokens of one window, its `</s>` included; 128 unless given.
        batch_size: Windows that are run at once.
        prepend_bos: Whether a window that does not begin with `</s>` gets it in front. It is never
            counted, being the same in each.
        progress: Whether to show a progress bar.

    Returns:
        The examples, on the CPU. Only activations above 0 count.

    Raises:
        InputError: If the text is empty, or a selection or size does not fit the model.
        MemoryError: If the examples would not fit, before running.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> texts = ["Mary gave a pen to John.", "The cat sat on the mat."]
        >>> found = optlens.neurons.top_examples(model, texts, 1, 986, progress=False)
        >>> found.of(1, 986)
        [6.001 </s>Mary·gave·a·pen[·to]·John.]
    """
    how = reading(model, window, batch_size, prepend_bos, progress)
    before, after = context
    if k < 1 or before < 0 or after < 0:
        raise checks.InputError(
            f"k={k} and context={context} ask for less than nothing: k must be at least 1, "
            "and the tokens before and after at least 0."
        )
    chosen, which = choose(model, layers, neurons)
    cells = len(chosen) * len(which) * k
    hint = "choose fewer layers= or neurons=, a smaller k= or a shorter context="
    check_fits(cells * (36 + 8 * (before + 1 + after)), model.device, hint)
    best = [Best(len(which), k, before, after, model.device) for _ in chosen]

    def see(row: int, activations: Tensor, batch: Batch) -> None:
        best[row].update(activations, batch)

    counted = watch(model, text, chosen, which, how, see)
    names = ("values", "tokens", "activations", "documents", "offsets", "positions")
    found = {name: torch.stack([getattr(b, name) for b in best]).cpu() for name in names}
    about = {"labels": labels_of(model, found["tokens"]), "fingerprint": fingerprint(model)}
    about |= {"window": how.window}
    return TopExamples(
        layers=chosen, neurons=which, metadata=about, before=before, counted=counted, **found
    )
