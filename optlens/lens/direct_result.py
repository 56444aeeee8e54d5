"""What direct logit attribution found: a term for each part, and what they must add up to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from optlens.recording import Recording


@dataclass(eq=False)
class LogitAttribution:
    """The terms that add up to a logit, or to a logit difference; batches have a leading axis.

    Parts are named "embed" and "pos_embed" (token and position embedding), "L3H0" (head 0 of layer
    3, without the output bias), "b_O3" (that bias), "mlp3" (the MLP with its output bias),
    "ln_final.bias", and "b_U" if the unembedding has a bias. Parts that a model has not are absent.

    Attributes:
        values: The terms, in logits (nats), `[component]`.
        labels: Their names, in the order in which they are computed.
        total: The model's own logit or logit difference, `[]`.
        n_layers: Blocks of the model.
        n_heads: Heads of each.
        sources: With `by_source=True`, each head's term divided among the tokens whose values it
            has read, `[layer, head, key]`; padding has 0. Else None.
        metadata: The metric, tokens and their labels, the column that was read, the model's
            fingerprint.
        prompts: The prompts, as a recording that holds their tokens alone.
    """

    values: Tensor
    labels: list[str]
    total: Tensor
    n_layers: int
    n_heads: int
    sources: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    prompts: Recording | None = None

    @property
    def is_batch(self) -> bool:
        """Whether there is a leading batch axis."""
        return self.values.ndim == 2

    @property
    def sum(self) -> Tensor:
        """The sum of all terms, `[]`."""
        return self.values.sum(-1)

    @property
    def error(self) -> Tensor:
        """What the terms miss of `total`, `[]`: rounding, unless the stream itself was edited.

        That is the rounding of the run: some 1e-6 of the logits in float32, 1e-3 in half precision.
        An intervention on a head's z or on `mlp_out` changes that part's term. One on `attn_out`,
        `result` or the residual stream writes what belongs to no part, and that appears here.
        """
        return self.total - self.sum

    @property
    def heads(self) -> Tensor:
        """The heads' terms, `[layer, head]`."""
        names = [f"L{layer}H{head}" for layer in self._layers for head in range(self.n_heads)]
        return self._chosen(names).unflatten(-1, (self.n_layers, self.n_heads))

    @property
    def mlps(self) -> Tensor:
        """The MLPs' terms, output bias included, `[layer]`."""
        return self._chosen([f"mlp{layer}" for layer in self._layers])

    @property
    def attention_biases(self) -> Tensor:
        """The terms of attention's output biases, `[layer]`; zeros in a model without biases."""
        names = [f"b_O{layer}" for layer in self._layers]
        return self._chosen(names) if names[0] in self.labels else torch.zeros_like(self.mlps)

    @property
    def layers(self) -> Tensor:
        """What each block adds in all: its heads, the bias of their output, its MLP, `[layer]`."""
        return self.heads.sum(-1) + self.attention_biases + self.mlps

    @property
    def accumulated(self) -> Tensor:
        """The logit of the stream before the first block and after each, `[layer + 1]`.

        All rows are read with the scale of the *final* LayerNorm, so they differ by `layers`; the
        logit lens (`LogitLens.logit`) computes the scale of each row afresh. The last row of both is
        the model's answer. The constant terms (`ln_final.bias`) are in every row.
        """
        before = [name for name in self.labels if _place(name)[1] is None]
        start = self._chosen(before).sum(-1, keepdim=True)
        return torch.cat([start, start + self.layers.cumsum(-1)], -1)

    @property
    def places(self) -> list[tuple[str, int | None, int | None]]:
        """The kind of each part in words, its layer and its head; None where it has none."""
        return [_place(name) for name in self.labels]

    def __getitem__(self, name: str) -> Tensor:
        """Return the term of one part, `[]`, by its name: "embed", "L3H0", "mlp3", ...

        Raises:
            InputError: If there is no such part.
        """
        if name not in self.labels:
            raise checks.InputError(
                f"There is no part {name!r}; parts are named like {', '.join(self._examples)}."
            )
        return self._chosen([name])[..., 0]

    def top(self, count: int = 10) -> list[tuple[str, float]]:
        """Return the parts with the largest terms of either sign; in a batch, of the mean."""
        values = self._mean()
        order = values.abs().argsort(descending=True, stable=True)[:count].tolist()
        return [(self.labels[place], float(values[place])) for place in order]

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table, a row for each part: component, kind, layer, head, value.

        A batch has a row for each part and prompt, with the prompt's number in front.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        rows = []
        for prompt, values in enumerate(self.values if self.is_batch else self.values[None]):
            found = zip(self.labels, self.places, values.tolist(), strict=True)
            for name, (kind, layer, head), value in found:
                row = {"component": name, "kind": kind, "layer": layer, "head": head}
                rows.append(({"prompt": prompt} if self.is_batch else {}) | row | {"value": value})
        return pandas.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})

    def plot(self, **options: Any) -> Figure:
        """Draw the terms as steps from zero to the logit; in a batch, the mean over prompts.

        Args:
            **options: Further arguments of `optlens.plots.waterfall`, such as `most=12`.
        """
        from optlens.plots import waterfall

        title = f"Who wrote {self.metadata.get('metric', 'the logit')}"
        about = {"title": title, "label": "logits (nats)"}
        return waterfall(self._mean(), self.labels, **about | options)

    def __repr__(self) -> str:
        """Name the metric, its value and the largest terms."""
        prompts = f"{len(self.values)} prompts, mean " if self.is_batch else ""
        top = ", ".join(f"{name} {value:+.3g}" for name, value in self.top(4))
        error = float(self.error.abs().max())
        return (
            f"LogitAttribution({self.metadata.get('metric')}: {prompts}"
            f"{float(self.total.mean()):.4g} = {top}, ... {len(self.labels)} parts; "
            f"error {error:.1g})"
        )

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.labels)}

    @property
    def _layers(self) -> range:
        return range(self.n_layers)

    @property
    def _examples(self) -> list[str]:
        kinds: dict[str, str] = {}
        for name in self.labels:
            kinds.setdefault(_place(name)[0], name)
        return list(kinds.values())

    def _chosen(self, names: list[str]) -> Tensor:
        return self.values[..., [self._index[name] for name in names]]

    def _mean(self) -> Tensor:
        return self.values.mean(0) if self.is_batch else self.values


_NAMES = (
    (r"L(\d+)H(\d+)", "head"),
    (r"mlp(\d+)", "mlp"),
    (r"b_O(\d+)", "attention bias"),
    (r"ln_final.bias", "final LayerNorm bias"),
    (r"b_U", "unembedding bias"),
    (r"embed", "token embedding"),
    (r"pos_embed", "position embedding"),
)


def _place(name: str) -> tuple[str, int | None, int | None]:
    """Return the kind of a part, its layer and its head."""
    for pattern, kind in _NAMES:
        if found := re.fullmatch(pattern, name):
            layer, head = [*map(int, found.groups()), None, None][:2]
            return kind, layer, head
    raise ValueError(name)
