"""What the results about neurons share: finding a neuron in them, saving and loading."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from optlens import checks
from optlens.files import read_fields, write_fields
from optlens.memory import available_bytes, describe_bytes


@dataclass(eq=False, repr=False, kw_only=True)
class NeuronResult:
    """Numbers about chosen neurons of chosen layers; each tensor begins with `[layer, neuron]`.

    Attributes:
        layers: Which blocks.
        neurons: Which neurons of each.
        metadata: Where the numbers come from.
    """

    layers: list[int]
    neurons: list[int]
    metadata: dict[str, Any] = field(default_factory=dict)

    def place(self, layer: int, neuron: int) -> tuple[int, int]:
        """Return where a neuron lies in the tensors.

        Raises:
            InputError: If it is not among those that were looked at.
        """
        if layer not in self.layers or neuron not in self.neurons:
            raise checks.InputError(
                f"Neuron {neuron} of layer {layer} was not looked at: this result has "
                f"{len(self.neurons)} neurons of layers {', '.join(map(str, self.layers))}. Choose "
                "others with layers= and neurons= of the function that made it."
            )
        return self.layers.index(layer), self.neurons.index(neuron)

    def label(self, token: int) -> str:
        """Return a legible name for a token id: `·the`, `↵`, `⟨50265⟩`."""
        return self.metadata.get("labels", {}).get(str(int(token)), f"⟨{int(token)}⟩")

    def save(self, path: str | os.PathLike) -> None:
        """Write the result to one safetensors file, by way of a temporary name."""
        write_fields(path, self, type(self).__name__)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or no result of this kind.
        """
        return cls(**read_fields(path, cls.__name__))

    def _about(self) -> str:
        """Say which neurons, as the beginning of a repr."""
        some = f"{len(self.neurons)} neurons" if len(self.neurons) != 1 else "1 neuron"
        if len(self.layers) == 1:
            return f"{type(self).__name__}({some} of layer {self.layers[0]}"
        return f"{type(self).__name__}({some} of each of {len(self.layers)} layers"


def labels_of(model: Any, tokens: Tensor) -> dict[str, str]:
    """Return a legible label for every token id in a tensor, by the id as text; negative ones are none."""
    if model.tokenizer is None:
        return {}
    ids = tokens.unique().tolist()
    return {str(token): model.tokenizer.display(token) for token in ids if token >= 0}


def check_fits(needed: int, device: Any, hint: str) -> None:
    """Check that what a search keeps fits into memory.

    Raises:
        MemoryError: If not, naming what would make it smaller.
    """
    free = available_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"This would keep {describe_bytes(needed)}, but {device} has {describe_bytes(free)} "
            f"free: {hint}."
        )
