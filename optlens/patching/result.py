"""What a sweep found: one number for each patch, and the two numbers to compare it with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.files import read_tensors, write_tensors
from optlens.metrics import normalized

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from optlens.report import PatchView

KIND = "patching result"


@dataclass(eq=False)
class PatchResult:
    """The metric of every patch of a sweep.

    Attributes:
        per_prompt: The metric of each patch and prompt, `[*axes, prompts]`; NaN where it was not
            computed. One column if the metric gives one number for all prompts.
        clean_per_prompt: The metric of the clean run, `[prompts]`; in an ablation, of the run
            that nothing was done to.
        corrupt_per_prompt: The metric of the corrupt run, `[prompts]`; NaN in an ablation.
        axes: The names of the axes.
        labels: For each axis the labels of its entries.
        choices: For each axis what its entries stand for: numbers of layers, heads, positions, ...
        metadata: What was done: site, direction, metric, prompts, window, model fingerprint; labels
            of tokens, if any, by their ids.
    """

    per_prompt: Tensor
    clean_per_prompt: Tensor
    corrupt_per_prompt: Tensor
    axes: tuple[str, ...]
    labels: dict[str, list[str]]
    choices: dict[str, list]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> Tensor:
        """The metric of each patch, the mean over prompts, `[*axes]`."""
        return self.per_prompt.mean(-1)

    @property
    def clean(self) -> float:
        """The metric of the clean run, the mean over prompts."""
        return float(self.clean_per_prompt.mean())

    @property
    def corrupt(self) -> float:
        """The metric of the corrupt run, the mean over prompts."""
        return float(self.corrupt_per_prompt.mean())

    @property
    def complete(self) -> bool:
        """Whether every patch was computed."""
        return not bool(self.per_prompt.isnan().any())

    @property
    def normalized(self) -> Tensor:
        """`(values - corrupt) / (clean - corrupt)`, `[*axes]`: 1 is the clean run, 0 the corrupt.

        NaN, with a warning, where the two runs hardly differ. In an ablation, `values / clean`.
        """
        clean = self.clean_per_prompt.mean()
        if self.corrupt_per_prompt.isnan().all():
            return normalized(self.values, clean, torch.zeros_like(clean))
        return normalized(self.values, clean, self.corrupt_per_prompt.mean())

    def interval(
        self, level: float = 0.95, samples: int = 2000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Estimate how far `values` may be off by the choice of prompts: a bootstrap interval.

        Args:
            level: The probability that the interval is to cover.
            samples: How often the prompts are drawn anew, with replacement.
            seed: Equal seeds give equal intervals.

        Returns:
            Lower and upper ends, each `[*axes]`.

        Raises:
            InputError: With fewer than two prompts.
        """
        count = self.per_prompt.shape[-1]
        if count < 2:
            raise checks.InputError(
                "An interval over prompts needs several of them, with a metric that gives a value "
                f"for each; this result has {count}."
            )
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(count, (samples, count), generator=generator)
        share = torch.zeros(samples, count, dtype=self.per_prompt.dtype)
        share.scatter_add_(1, drawn, torch.full_like(drawn, 1, dtype=share.dtype) / count)
        means = self.per_prompt @ share.T  # [*axes, samples]
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
        low, high = means.quantile(ends, dim=-1)
        return low, high

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table, a row for each patch: axes, value, normalized.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        index = pandas.MultiIndex.from_product(
            [self.labels[axis] for axis in self.axes], names=self.axes
        )
        columns = {"value": self.values.flatten(), "normalized": self.normalized.flatten()}
        frame = pandas.DataFrame({name: v.numpy() for name, v in columns.items()}, index=index)
        return frame.reset_index()

    def plot(self, **options: Any) -> Figure:
        """Draw the result as a heatmap: `normalized`, or in an ablation the change of the metric.

        One axis gives a single row, two a table, three a table for each entry of the first.

        Args:
            **options: Further arguments of `optlens.plots.sweep_heatmap`, such as `style="dark"`.

        Raises:
            InputError: With more than three axes.
        """
        from optlens.plots import sweep_heatmap

        if len(self.axes) > 3:
            raise checks.InputError(
                f"This result has the axes {', '.join(self.axes)}; a figure shows three at most. "
                "Take a part of `values` and draw it with optlens.plots.sweep_heatmap."
            )
        ablation = bool(self.corrupt_per_prompt.isnan().all())
        values = self.values - self.clean if ablation else self.normalized
        label = f"change of {self.metadata.get('metric')}" if ablation else "normalized (1 = clean)"
        sites = self.metadata.get("site", "")
        sites = sites if isinstance(sites, str) else ", ".join(sites)
        names = self.axes if len(self.axes) > 1 else ("", *self.axes)
        about = {
            "rows": self.labels[names[-2]] if names[-2] else [""],
            "columns": self.labels[names[-1]],
            "axes_names": names[-2:],
            "label": label,
            "title": f"{'Ablating' if ablation else 'Patching'} {sites}",
        }
        if len(self.axes) == 3:
            prefix = "" if self.axes[0] == "component" else f"{self.axes[0]} "
            about["panels"] = [prefix + name for name in self.labels[self.axes[0]]]
        if len(self.axes) == 1:
            about["note"] = f"Columns: {self.axes[0]}."
        return sweep_heatmap(values[None] if len(self.axes) == 1 else values, **about | options)

    def to_html(self, path: str | os.PathLike) -> None:
        """Write one self-contained page: no kernel, no network.

        Args:
            path: The file to write; an existing one is replaced when the page is complete.
        """
        from optlens.report import write_sweep_html

        write_sweep_html(self, path)

    def show(self) -> PatchView:
        """Return a view that a notebook displays: heatmap, ends, the strongest patches."""
        from optlens.report import PatchView

        return PatchView(self)

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()

    def save(self, path: str | os.PathLike) -> None:
        """Write the result to one safetensors file, by way of a temporary name."""
        tensors = {
            "per_prompt": self.per_prompt.contiguous(),
            "clean_per_prompt": self.clean_per_prompt,
            "corrupt_per_prompt": self.corrupt_per_prompt,
        }
        about = {"axes": self.axes, "labels": self.labels, "choices": self.choices}
        write_tensors(path, tensors, about | {"kind": KIND, "metadata": self.metadata})

    @classmethod
    def load(cls, path: str | os.PathLike) -> PatchResult:
        """Read what `save` wrote."""
        tensors, about = read_tensors(path, KIND)
        return cls(
            **tensors,
            axes=tuple(about["axes"]),
            labels=about["labels"],
            choices=about["choices"],
            metadata=about["metadata"],
        )

    def __repr__(self) -> str:
        """Say what was swept and what the ends are."""
        shape = " x ".join(f"{axis} {len(self.labels[axis])}" for axis in self.axes)
        missing = "" if self.complete else f", {int(self.per_prompt.isnan().sum())} not computed"
        return (
            f"PatchResult({self.metadata.get('site')}: {shape}; {self.metadata.get('metric')}; "
            f"clean {self.clean:.4g}, corrupt {self.corrupt:.4g}{missing})"
        )


def make_labels(choices: dict[str, list], str_tokens: list[list[str]]) -> dict[str, list[str]]:
    """Name the entries of each axis; positions of a single prompt carry their token."""
    labels = {}
    for axis, entries in choices.items():
        labels[axis] = [str(entry) for entry in entries]
        if axis in ("pos", "query", "key") and len(str_tokens) == 1:
            labels[axis] = [
                f"{entry}: {str_tokens[0][entry]}" if isinstance(entry, int) else str(entry)
                for entry in entries
            ]
    return labels


def token_labels(model, about: dict[str, Any]) -> dict[str, str]:
    """Return a legible label for every token of a result's prompts, by its id as text.

    They go into the metadata as "labels", like those of a recording, so that a saved result can
    show its prompts without the model.

    Args:
        model: The model, for its tokenizer; without one there are no labels.
        about: The result's metadata; its "clean", "corrupt" and "prompts" hold token ids.
    """
    if model.tokenizer is None:
        return {}
    rows = [row for name in ("clean", "corrupt", "prompts") for row in about.get(name) or []]
    return {str(token): model.tokenizer.display(token) for row in rows for token in row}


def prompt_strings(model, tokens: Tensor, real: Tensor) -> list[list[str]]:
    """Return the text of each prompt's real tokens; their ids where there is no tokenizer.

    Args:
        model: The model.
        tokens: Token ids, `[prompts, pos]`.
        real: True at real tokens, `[prompts, pos]`.
    """
    rows = [row[seen].tolist() for row, seen in zip(tokens.cpu(), real.cpu(), strict=True)]
    if model.tokenizer is None:
        return [[f"⟨{token}⟩" for token in row] for row in rows]
    return [model.tokenizer.to_str_tokens(row) for row in rows]
