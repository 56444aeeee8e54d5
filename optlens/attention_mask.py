"""Which keys each query may see, and at which position each token stands.

Both follow from the padding mask. Positions count real tokens: `cumsum(mask) * mask - 1`, so that
a prompt has the same positions alone, padded left or padded right; padding stands at -1
(Hugging Face's `modeling_opt.py` does the same).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def real_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Tell which tokens are no padding, `[batch, pos]`, on the device of the tokens.

    Args:
        tokens: Token ids, `[batch, pos]`.
        mask: Ones at real tokens and zeros at padding, or None if nothing is padding.
    """
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return mask.to(tokens.device).bool()


class AttentionMask:
    """The causal mask and the padding of one forward pass, built once and shared by all layers.

    Attributes:
        padding: True at real tokens, `[batch, key]`; None if nothing is padding.
    """

    def __init__(
        self, padding: Tensor | None, batch: int, n_query: int, n_key: int, device: torch.device
    ) -> None:
        """Describe a pass of `n_query` new tokens that come last among `n_key` tokens."""
        self.padding = None if padding is None else padding.to(device=device, dtype=torch.bool)
        self.batch, self.n_query, self.n_key, self.device = batch, n_query, n_key, device
        self._bias: dict[torch.dtype, Tensor] = {}
        self._elsewhere: dict[torch.device, AttentionMask] = {}

    def to(self, device: torch.device | str) -> AttentionMask:
        """Return this mask on a device; made once for all blocks there."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = AttentionMask(
                self.padding, self.batch, self.n_query, self.n_key, device
            )
        return self._elsewhere[device]

    @property
    def may_hide_all_keys(self) -> bool:
        """Whether a query may have no key to see: padding on the left."""
        return self.padding is not None

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of each new token, `[batch, pos]`; -1 for padding."""
        if self.padding is None:
            positions = torch.arange(self.n_key, device=self.device).expand(self.batch, -1)
        else:
            real = self.padding.long()
            positions = real.cumsum(-1) * real - 1
        return positions.narrow(1, self.n_key - self.n_query, self.n_query)

    @cached_property
    def allowed(self) -> Tensor:
        """True where a query may see a key, `[batch or 1, 1, query, key]`."""
        keys = torch.arange(self.n_key, device=self.device)
        queries = keys.narrow(0, self.n_key - self.n_query, self.n_query)
        causal = (keys <= queries.unsqueeze(1)).unsqueeze(0).unsqueeze(0)
        return causal if self.padding is None else causal & self.padding.unsqueeze(1).unsqueeze(1)

    @cached_property
    def fused(self) -> dict[str, Any]:
        """The mask as arguments of `scaled_dot_product_attention`."""
        if self.padding is None and self.n_query == self.n_key:
            return {"is_causal": True}
        if self.padding is None and self.n_query == 1:
            return {}  # the last token sees every token
        return {"attn_mask": self.allowed}

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return `q k^T` with -inf where a query may not see, `[batch, head, query, key]`.

        Args:
            q: Scaled queries, `[batch, head, query, d_head]`.
            k: Keys, `[batch, head, key, d_head]`.
        """
        batch, heads = q.shape[:2]
        # One pass over the largest tensors of a recording: the product is added onto the mask.
        bias = self._additive(q.dtype).expand(batch, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        return scores.unflatten(0, (batch, heads))

    def _additive(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._bias:
            zeros = torch.zeros(self.allowed.shape, dtype=dtype, device=self.device)
            self._bias[dtype] = zeros.masked_fill(self.allowed.logical_not(), -torch.inf)
        return self._bias[dtype]
