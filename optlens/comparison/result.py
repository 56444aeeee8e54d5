"""What a comparison of two runs found."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.comparison.alignment import Column
from optlens.files import read_fields, write_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

KIND = "comparison"
QUANTITIES = {
    "kl": "KL(a || b) of the logit lens, nats",
    "cosine": "1 - cosine of the residual streams",
}


@dataclass(eq=False, repr=False)
class Comparison:
    """Where two runs, `a` and `b`, differ.

    Columns are the positions of the prompt, or of two prompts the pairs of positions that belong
    together; where a token has no counterpart, what compares is NaN. Rows are the embedding and
    the layers.

    Attributes:
        kl: KL(a || b) of the predictions, in nats, `[column]`.
        kl_reverse: KL(b || a), `[column]`.
        js: Their Jensen-Shannon divergence, in nats, 0 to ln 2, `[column]`.
        lens_kl: KL(a || b) of the logit lenses, `[row, column]`.
        cosine: Of the residual streams, `[row, column]`; None if their widths differ.
        lens_js: The Jensen-Shannon divergence of the logit lenses, `[row, column]`.
        guesses_a: The likeliest tokens of a after each row, `[row, column, k]`; -1 where it has no
            token.
        guesses_b: Those of b.
        guess_probs_a: Their probabilities, `[row, column, k]`.
        guess_probs_b: Likewise b.
        final_a: The likeliest token of a's prediction, `[column]`; -1 where it has no token.
        final_b: That of b.
        columns: Pairs of positions, None where one prompt has no token.
        labels: A name for each column, by its tokens.
        rows: A name for each row: "embed", "0", ..., or "3 | 6" where models differ in depth.
        tokens: The labels of all tokens that occur, by their ids as text.
        metadata: Prompts, their token ids as compared, and model fingerprints.
    """

    kl: Tensor
    kl_reverse: Tensor
    js: Tensor
    lens_kl: Tensor
    cosine: Tensor | None
    lens_js: Tensor
    guesses_a: Tensor
    guesses_b: Tensor
    guess_probs_a: Tensor
    guess_probs_b: Tensor
    final_a: Tensor
    final_b: Tensor
    columns: list[Column]
    labels: list[str]
    rows: list[str]
    tokens: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def top_a(self) -> Tensor:
        """The likeliest token of a after each row, `[row, column]`; -1 where it has no token."""
        return self.guesses_a[..., 0]

    @property
    def top_b(self) -> Tensor:
        """The likeliest token of b after each row, `[row, column]`; -1 where it has no token."""
        return self.guesses_b[..., 0]

    @property
    def prob_a(self) -> Tensor:
        """The probability that a gives to its likeliest token, `[row, column]`."""
        return self.guess_probs_a[..., 0]

    @property
    def prob_b(self) -> Tensor:
        """The probability that b gives to its likeliest token, `[row, column]`."""
        return self.guess_probs_b[..., 0]

    @property
    def aligned(self) -> Tensor:
        """True at columns that have a token on both sides, `[column]`."""
        return torch.tensor([None not in column for column in self.columns])

    @property
    def changed(self) -> Tensor:
        """True where the likeliest next token differs, `[column]`; False where nothing compares."""
        return (self.final_a != self.final_b) & self.aligned

    def label(self, token: int) -> str:
        """Return a legible name for a token id; "" for -1, no token."""
        return self.tokens.get(str(int(token)), f"⟨{int(token)}⟩") if token >= 0 else ""

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table, a row for each column of the comparison.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        numbers = ("kl", "kl_reverse", "js")
        table = {
            "position_a": [a for a, _ in self.columns],
            "position_b": [b for _, b in self.columns],
            "token": self.labels,
            **{name: getattr(self, name).numpy() for name in numbers},
            "top_a": [self.label(token) for token in self.final_a],
            "top_b": [self.label(token) for token in self.final_b],
            "changed": self.changed.numpy(),
        }
        frame = pandas.DataFrame(table)
        return frame.astype({"position_a": "Int64", "position_b": "Int64"})

    def plot(self, quantity: str = "kl", **options: Any) -> Figure:
        """Draw a number for every layer and token as a heatmap.

        Args:
            quantity: "kl" for the divergence of the logit lenses, "cosine" for 1 - cosine.
            **options: Further arguments of `optlens.plots.sweep_heatmap`, such as `style="dark"`.

        Raises:
            InputError: For another quantity, or cosines that were not computed.
        """
        from optlens.plots import sweep_heatmap

        if quantity not in QUANTITIES:
            raise checks.InputError(
                f"quantity={quantity!r} is unknown; give one of {', '.join(QUANTITIES)}."
            )
        if quantity == "cosine" and self.cosine is None:
            raise checks.InputError(
                "The residual streams of these models differ in width, so they have no cosine; "
                'plot quantity="kl".'
            )
        about = {
            "rows": self.rows,
            "columns": self.labels,
            "axes_names": ("layer", "token"),
            "label": QUANTITIES[quantity],
            "title": "Two runs compared, layer by layer",
        }
        values = self.lens_kl if quantity == "kl" else 1 - self.cosine
        return sweep_heatmap(values, **about | options)

    def save(self, path: str | os.PathLike) -> None:
        """Write the comparison to one safetensors file, by way of a temporary name."""
        write_fields(path, self, KIND)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Comparison:
        """Read what `save` wrote; no model is needed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or no comparison.
        """
        found = read_fields(path, KIND)
        return cls(**found | {"columns": [tuple(column) for column in found["columns"]]})

    def __repr__(self) -> str:
        """Say how far the predictions are apart, and where most."""
        n_aligned = int(self.aligned.sum())
        worst = int(self.kl.nan_to_num(-1.0).argmax())
        alone = len(self.columns) - n_aligned
        return (
            f"Comparison({n_aligned} tokens{f', {alone} without counterpart' if alone else ''}, "
            f"{len(self.rows)} rows; KL mean {self.kl.nanmean():.4g}, largest "
            f"{self.kl[worst]:.4g} nats at {worst}: {self.labels[worst]}; the likeliest token "
            f"differs at {int(self.changed.sum())})"
        )
