"""The values of one run, by hook name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from optlens.files import read_tensors, write_tensors
from optlens.names import UnknownHookError, get_act_name, suggest


class ActivationCache(Mapping[str, Tensor]):
    """Activations by hook name, in the order in which they were computed.

    `cache["blocks.3.attn.hook_pattern"]`, `cache["pattern", 3]`, `cache["scale", 2, "ln1"]` and
    `cache["resid_pre", -1]` all work; short names are those of `optlens.names.get_act_name`.

    Attributes:
        has_batch_dim: False after `remove_batch_dim`.

    Example:
        >>> _, cache = model.run_with_cache("A photo of a cat")  # doctest: +SKIP
        >>> cache["pattern", 0].shape  # doctest: +SKIP
        torch.Size([1, 12, 6, 6])
    """

    def __init__(
        self, values: dict[str, Tensor], n_layers: int, has_batch_dim: bool = True
    ) -> None:
        """Wrap a dict of hook name to tensor."""
        self._values = dict(values)
        self.n_layers = n_layers
        self.has_batch_dim = has_batch_dim

    def full_name(self, key: str | tuple) -> str:
        """Return the hook name that a key stands for.

        Raises:
            UnknownHookError: If nothing was kept under it; the nearest names are suggested.
        """
        if isinstance(key, str):
            key = (key,)
        if len(key) == 1 and key[0] in self._values:
            return key[0]
        if len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
            key = (key[0], self.n_layers + key[1], *key[2:])
        name = get_act_name(*key)
        if name not in self._values:
            raise UnknownHookError(
                f"Nothing was kept under {name!r}. "
                + (suggest(name, list(self._values)) if self._values else "The cache is empty.")
            )
        return name

    def __getitem__(self, key: str | tuple) -> Tensor:
        """Return the tensor under a full or short name."""
        return self._values[self.full_name(key)]

    def __contains__(self, key: object) -> bool:
        """Return whether something was kept under a full or short name."""
        try:
            self.full_name(key)
        except (UnknownHookError, TypeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """Run over the full names, in the order in which they were computed."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._values)

    def __repr__(self) -> str:
        """Describe the size, not the contents."""
        megabytes = sum(v.nbytes for v in self._values.values()) / 1e6
        return f"ActivationCache({len(self)} tensors, {megabytes:.1f} MB)"

    def stack(self, name: str, part: str | None = None) -> Tensor:
        """Return one short name from every layer, stacked to `[layer, ...]`.

        Args:
            name: A short name, such as "resid_post" or "pattern".
            part: "ln1" or "ln2" for "scale" and "normalized".

        Raises:
            UnknownHookError: If a layer has not kept it.
        """
        return torch.stack([self[name, layer, part] for layer in range(self.n_layers)])

    def to(self, device: torch.device | str) -> ActivationCache:
        """Move every tensor to a device; returns this cache."""
        self._values = {name: value.to(device) for name, value in self._values.items()}
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Drop the batch axis, in place; returns this cache.

        Raises:
            ValueError: If the batch has more than one prompt.
        """
        if self.has_batch_dim:
            for name, value in self._values.items():
                if value.shape[0] != 1:
                    raise ValueError(
                        f"remove_batch_dim needs a batch of one prompt, but {name!r} has "
                        f"shape {tuple(value.shape)}."
                    )
            self._values = {name: value[0] for name, value in self._values.items()}
            self.has_batch_dim = False
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write to a safetensors file; an existing file is replaced only when all is written."""
        facts = {"kind": "ActivationCache", "n_layers": self.n_layers, "order": list(self)}
        write_tensors(path, self._values, {**facts, "has_batch_dim": self.has_batch_dim})

    @classmethod
    def load(cls, path: str | os.PathLike) -> ActivationCache:
        """Read what `save` has written.

        Raises:
            ValueError: If the file is damaged or holds something else.
        """
        tensors, facts = read_tensors(path, "ActivationCache")
        values = {name: tensors[name] for name in facts["order"]}
        return cls(values, facts["n_layers"], facts["has_batch_dim"])
