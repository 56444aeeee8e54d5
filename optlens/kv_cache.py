"""Keys and values of the tokens already seen, so that a forward pass can continue from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KVCache:
    """Each layer's keys and values, `[batch, head, pos, d_head]`, grown by every forward pass.

    A model makes one when `use_cache` is on and returns it as `past_key_values`; passed to the next
    call, that call's tokens come after the ones seen. What is cached is what attention used:
    edits at `hook_k` and `hook_v` are kept. A call that raises leaves it as it was.

    Growing copies all that is held, each time. With `room` for as many tokens as will come, memory
    is taken once and each call writes its own tokens only.

    Attributes:
        has_padding: Whether some of the tokens seen are padding; then the next call needs an
            attention_mask that covers them.
        room: For how many tokens memory is set aside when the next ones come; 0 for none. Tokens
            beyond it, and those that carry gradients, are taken in by growing.

    Example:
        >>> out = model(tokens[:, :5], use_cache=True)  # doctest: +SKIP
        >>> rest = model(tokens[:, 5:], past_key_values=out.past_key_values)  # doctest: +SKIP
    """

    def __init__(self, room: int = 0) -> None:
        """Start with no token seen."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # the seen tokens, and free room
        self._lengths: dict[int, int] = {}
        self._owned: set[int] = set()  # layers whose memory nobody else can see
        self.has_padding = False
        self.room = room

    def get_seq_length(self) -> int:
        """Return how many tokens have been seen."""
        return max(self._lengths.values(), default=0)

    def __len__(self) -> int:
        """Return for how many layers keys and values are held."""
        return len(self._lengths)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, each `[batch, head, pos, d_head]`."""
        length = self._lengths[layer]
        key, value = self._layers[layer]
        if key.shape[2] == length:
            return key, value
        return key.narrow(2, 0, length), value.narrow(2, 0, length)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; return all of them.

        Args:
            layer: The block's number.
            key: `[batch, head, pos, d_head]` of the new tokens.
            value: Likewise.

        Raises:
            ValueError: If the batch, the heads or the dtype differ from those of the cached tokens.
        """
        seen = self._lengths.get(layer, 0)
        if seen:
            _check_fits(self._layers[layer][0], key)
        length = seen + key.shape[2]
        if length > self.room or key.requires_grad:
            if seen:
                key, value = (
                    torch.cat(pair, dim=2) for pair in zip(self[layer], (key, value), strict=True)
                )
            self._owned.discard(layer)
            self._layers[layer] = (key, value)
        else:
            self._make_room(layer, key)
            for held, new in zip(self._layers[layer], (key, value), strict=True):
                held.narrow(2, seen, length - seen).copy_(new)
        self._lengths[layer] = length
        return self[layer]

    def _make_room(self, layer: int, like: Tensor) -> None:
        """Give a layer memory for `room` tokens, unless it has it."""
        if layer in self._owned and self._layers[layer][0].shape[2] >= self.room:
            return
        batch, heads, _, d_head = like.shape
        roomy = tuple(like.new_empty(batch, heads, self.room, d_head) for _ in range(2))
        if self._lengths.get(layer, 0):
            for new, held in zip(roomy, self[layer], strict=True):
                new[:, :, : held.shape[2]] = held
        self._layers[layer] = roomy
        self._owned.add(layer)

    def copy(self, length: int | None = None, room: int = 0) -> KVCache:
        """Return a cache of the first `length` tokens (all, by default) that grows on its own.

        Args:
            length: How many tokens to keep.
            room: Set memory aside for so many tokens.
        """
        new = KVCache(room)
        new.has_padding = self.has_padding
        for layer in self._lengths:
            key, value = (part[:, :, :length] for part in self[layer])
            if room:
                new.update(layer, key.detach(), value.detach())
            else:
                new._layers[layer] = (key.clone(), value.clone())
                new._lengths[layer] = key.shape[2]
        return new

    def select(self, rows: Tensor, start: int = 0) -> None:
        """Keep these rows of the batch, in this order; one may be named several times.

        Args:
            rows: Numbers of rows, `[new batch]`.
            start: The caller knows that the tokens before this one are the same in the row that is
                replaced and the one that replaces it, so they need no copying.
        """
        for layer, parts in self._layers.items():
            length, rows = self._lengths[layer], rows.to(parts[0].device)
            if len(rows) == len(parts[0]) and start >= length:
                continue
            if layer in self._owned and len(rows) == len(parts[0]):
                for held in parts:
                    changed = held[:, :, start:length]
                    changed.copy_(changed.index_select(0, rows))
            else:
                key, value = (part.index_select(0, rows) for part in self[layer])
                self._layers[layer] = (key, value)
                self._owned.discard(layer)  # it has no room

    def lengths(self) -> dict[int, int]:
        """Return how many tokens each layer holds."""
        return dict(self._lengths)

    def shorten(self, lengths: dict[int, int]) -> None:
        """Keep each layer's first so many tokens, and no layer that is not named."""
        self._layers = {layer: self._layers[layer] for layer in lengths}
        self._owned &= set(lengths)
        self._lengths = dict(lengths)
        for layer in lengths.keys() - self._owned:
            self._layers[layer] = self[layer]


@contextmanager
def undone_on_failure(cache: KVCache | None) -> Iterator[None]:
    """Take back what a `with` block has added to a cache, if it raises, so that it can be tried again."""
    if not isinstance(cache, KVCache):  # none, or one that is about to be refused
        yield
        return
    lengths, had_padding = cache.lengths(), cache.has_padding
    try:
        yield
    except BaseException:
        cache.shorten(lengths)
        cache.has_padding = had_padding
        raise


def _check_fits(seen: Tensor, new: Tensor) -> None:
    """Check that keys `[batch, head, pos, d_head]` can come after those seen."""
    if seen.shape[0] != new.shape[0]:
        raise ValueError(
            f"past_key_values holds {seen.shape[0]} prompts, but this call has "
            f"{new.shape[0]}; continue with the same batch, or start with a new cache."
        )
    held, needed = ((t.shape[1], t.shape[3], t.dtype, t.device) for t in (seen, new))
    if held != needed:
        raise ValueError(
            "past_key_values was made by another model: it holds {} heads of {} numbers in {} on "
            "{}, but this model has {} of {} in {} on {}; start with a new cache.".format(
                *held, *needed
            )
        )
