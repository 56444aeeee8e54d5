"""What a sweep found: one number for each patch, and the two numbers to compare it with."""

from __future__ import annotations

import os
import warnings
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
POSITION_AXES = ("pos", "query", "key")


@dataclass(eq=False)
class PatchResult:
    """The metric of every patch of a sweep.

    Attributes:
        per_prompt: The metric of each patch and prompt, `[*axes, prompts]`; NaN where it was not
            computed, or is no number. One column if the metric gives one number for all prompts.
        clean_per_prompt: The metric of the clean run, `[prompts]`; in an ablation, of the run
            that nothing was done to.
        corrupt_per_prompt: The metric of the corrupt run, `[prompts]`; NaN in an ablation.
        axes: The names of the axes.
        labels: For each axis the labels of its entries; a position of a single prompt by its token,
            and where a pair of prompts differs by both, the clean one first: `4: John|Mary`.
        choices: For each axis what its entries stand for: numbers of layers, heads, positions, ...
        metadata: What was done: site, direction, metric, prompts, window, model fingerprint; labels
            of tokens, if any, by their ids.
        undefined: The patches that were computed and for which the metric itself gave NaN, bool
            `[*axes]`; None if it never did, as far as is known.
    """

    per_prompt: Tensor
    clean_per_prompt: Tensor
    corrupt_per_prompt: Tensor
    axes: tuple[str, ...]
    labels: dict[str, list[str]]
    choices: dict[str, list]
    metadata: dict[str, Any] = field(default_factory=dict)
    undefined: Tensor | None = None

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
        return not bool(self.missing.any())

    @property
    def missing(self) -> Tensor:
        """The patches that were not computed, bool `[*axes]`."""
        no_number = self.per_prompt.isnan().any(-1)
        return no_number if self.undefined is None else no_number & ~self.undefined

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
        means = self.per_prompt @ self._draws(samples, seed)  # [*axes, samples]
        return _ends(means, level)

    def normalized_interval(
        self, level: float = 0.95, samples: int = 2000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Estimate how far `normalized` may be off by the choice of prompts: a bootstrap interval.

        The effect of a patch and the gap between the two runs are drawn together (a paired
        bootstrap): prompts with a large gap have large effects, so that shares vary less than
        `values` do.

        Args:
            level: The probability that the interval is to cover.
            samples: How often the prompts are drawn anew, with replacement.
            seed: Equal seeds give equal intervals.

        Returns:
            Lower and upper ends, each `[*axes]`; NaN where `normalized` is, with its warning.

        Raises:
            InputError: With fewer than two prompts.

        Example:
            >>> import torch
            >>> values = torch.tensor([[1.0, 2.0, 4.0]])  # one patch, three prompts
            >>> clean = torch.tensor([2.0, 4.0, 8.0])
            >>> result = PatchResult(values, clean, 0 * clean, ("layer",), {"layer": ["0"]}, {})
            >>> result.normalized_interval()  # half of the gap, whichever prompts are drawn
            (tensor([0.5000]), tensor([0.5000]))
        """
        shares = self._draws(samples, seed)
        corrupt = self.corrupt_per_prompt
        corrupt = torch.zeros_like(corrupt) if corrupt.isnan().all() else corrupt
        gaps = (self.clean_per_prompt - corrupt) @ shares  # [samples]
        low, high = _ends((self.per_prompt - corrupt) @ shares / gaps, level)
        vain = self.normalized.isnan()
        return low.masked_fill(vain, torch.nan), high.masked_fill(vain, torch.nan)

    def _draws(self, samples: int, seed: int) -> Tensor:
        """Draw prompts with replacement; return the share of each in each draw, `[prompts, samples]`."""
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
        return share.T

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
        if self._has_two_tokens():
            note = about.get("note", f"Rows: {names[-2]}. Columns: {names[-1]}.")
            about["note"] = f"{note} Where the prompts differ: clean|corrupt."
        return sweep_heatmap(values[None] if len(self.axes) == 1 else values, **about | options)

    def _has_two_tokens(self) -> bool:
        """Tell whether labels name tokens of two prompts that differ there."""
        rows = [self.metadata.get(name) or [] for name in ("clean", "corrupt")]
        named = any(axis in POSITION_AXES for axis in self.axes)
        return named and len(rows[0]) == 1 and rows[0] != rows[1]

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
        if self.undefined is not None:
            tensors["undefined"] = self.undefined
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
        missing = "" if self.complete else f", {int(self.missing.sum())} not computed"
        missing += f", {int(self.undefined.sum())} NaN" if _any(self.undefined) else ""
        return (
            f"PatchResult({self.metadata.get('site')}: {shape}; {self.metadata.get('metric')}; "
            f"clean {self.clean:.4g}, corrupt {self.corrupt:.4g}{missing})"
        )


def note_undefined(result: PatchResult, cells: list[int]) -> None:
    """Take NaN of patches that were just computed as what the metric says of them.

    Args:
        result: A result whose `undefined` is known.
        cells: Indices of the patches in the flattened result.
    """
    here = torch.tensor(cells)
    result.undefined.view(-1)[here] = result.per_prompt.flatten(0, -2)[here].isnan().any(-1)


def warn_of_undefined(result: PatchResult, stacklevel: int) -> None:
    """Warn if the metric gave NaN, saying for how many patches."""
    undefined = checks.on_host(result.undefined)  # None in a rehearsal
    if _any(undefined):
        warnings.warn(
            f"{result.metadata['metric']} is NaN, not a number, for {int(undefined.sum())} of "
            f"{undefined.numel()} patches. They were computed; it is the metric that has no value "
            "there.",
            stacklevel=stacklevel + 1,
        )


def _any(flags: Tensor | None) -> bool:
    return flags is not None and bool(flags.any())


def _ends(drawn: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the interval that holds a share of the drawn numbers, `[..., samples]`."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=drawn.dtype)
    low, high = drawn.quantile(ends, dim=-1)
    return low, high


def make_labels(
    choices: dict[str, list],
    str_tokens: list[list[str]],
    others: list[list[str]] | None = None,
) -> dict[str, list[str]]:
    """Name the entries of each axis; positions of a single prompt carry their token.

    Args:
        choices: For each axis what its entries stand for.
        str_tokens: The text of each token of each prompt.
        others: The same of the prompts that these are paired with; where the two differ both are
            written, with a `|` between.
    """
    labels = {}
    for axis, entries in choices.items():
        labels[axis] = [str(entry) for entry in entries]
        if axis in POSITION_AXES and len(str_tokens) == 1:
            words, others_words = str_tokens[0], (others or str_tokens)[0]
            texts = [
                word if word == other else f"{word}|{other}"
                for word, other in zip(words, others_words, strict=True)
            ]
            labels[axis] = [
                f"{entry}: {texts[entry]}" if isinstance(entry, int) else str(entry)
                for entry in entries
            ]
    return labels


def paired_labels(
    model, choices: dict[str, list], clean: Tensor, corrupt: Tensor, real: Tensor
) -> dict[str, list[str]]:
    """Name the entries of each axis for pairs of prompts: `4: John|Mary` where they differ.

    Args:
        model: The model, for its tokenizer.
        choices: For each axis what its entries stand for.
        clean: Token ids of the clean prompts, `[prompts, pos]`; they come first.
        corrupt: Of the corrupt prompts.
        real: True at real tokens, `[prompts, pos]`.
    """
    return make_labels(choices, *(prompt_strings(model, ids, real) for ids in (clean, corrupt)))


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
