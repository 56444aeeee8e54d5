"""What a forward pass starts from: text, token ids, embeddings or a residual stream.

Whatever a caller gives is checked here and brought to one form, `Inputs`, so that the network in
`model.py` can trust what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optlens import checks
from optlens.attention_mask import AttentionMask
from optlens.config import OPTConfig
from optlens.kv_cache import KVCache

Prompt = str | Sequence[str] | Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one forward pass starts from, checked. One of the first three is not None.

    Attributes:
        tokens: Token ids, `[batch, pos]`.
        embeds: Token embeddings, `[batch, pos, word_embed_proj_dim]`.
        residual: What the first of `blocks` reads, `[batch, pos, d_model]`.
        position_ids: `[batch, pos]`, counted from 0 over real tokens; -1 for padding.
        mask: Which keys each query may see.
        cache: Keys and values of the tokens before; this pass adds its own. None for neither.
        blocks: Numbers of the blocks to run.
    """

    tokens: Tensor | None
    embeds: Tensor | None
    residual: Tensor | None
    position_ids: Tensor
    mask: AttentionMask
    cache: KVCache | None
    blocks: range


class InputMethods:
    """Checks and completes the inputs of a model; a mixin beside `TokenizerMethods`."""

    _config: OPTConfig
    device: torch.device
    dtype: torch.dtype

    def prepare_inputs(
        self,
        input_ids: Prompt | None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_at_layer: int | None = None,
        past_key_values: KVCache | None = None,
        prepend_bos: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokenise text, add a batch axis, move to the model's device, and check ids and mask.

        Returns:
            Token ids (or the residual that `start_at_layer` takes, or `inputs_embeds`), and the
            mask, None where nothing is padding; it stays where it was made.

        Raises:
            InputError: If the input is empty, out of range or contradicts itself.
        """
        given, mask = self._checked_inputs(
            input_ids, attention_mask, inputs_embeds, start_at_layer, past_key_values, prepend_bos
        )
        return given.to(self.device), mask

    def inputs_on_host(
        self,
        input_ids: Prompt,
        attention_mask: Tensor | None = None,
        prepend_bos: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokenise text and check it as `prepare_inputs` does, but leave it on the CPU.

        What is to be run is planned from tokens and masks. They come from the CPU; read there, no
        plan has to wait for an accelerator.

        Returns:
            Token ids, `[batch, pos]`, and the mask, None where nothing is padding.

        Raises:
            InputError: If the input is empty, out of range or contradicts itself.
        """
        tokens, mask = self._checked_inputs(
            input_ids, attention_mask, None, None, None, prepend_bos
        )
        return tokens.cpu(), None if mask is None else mask.cpu()

    def _checked_inputs(
        self,
        input_ids: Prompt | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        start_at_layer: int | None,
        past_key_values: KVCache | None,
        prepend_bos: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `prepare_inputs` does, before it is moved."""
        if (input_ids is None) == (inputs_embeds is None):
            raise checks.InputError(
                "Give exactly one of input_ids (or text) and inputs_embeds, "
                f"got {'neither' if input_ids is None else 'both'}."
            )
        checks.tensors(attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        checks.past_key_values(past_key_values, self._config.n_layers)
        given = inputs_embeds if input_ids is None else input_ids
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not isinstance(given, Tensor):
            given, attention_mask = self._tokenise(
                given, attention_mask, past_key_values, prepend_bos
            )
        if start_at_layer is not None:
            checks.residual(input_ids, self._config.d_model, self.dtype)
        elif inputs_embeds is not None:
            checks.embeddings(inputs_embeds, self._config.word_embed_proj_dim, self.dtype)
        else:
            given = given.unsqueeze(0) if given.ndim == 1 else given
            checks.token_ids(given, self._config.vocab_size)
            given = given.long()
        batch, length = given.shape[0], seen + given.shape[1]
        checks.sequence_length(length, self._config.n_ctx)
        if attention_mask is not None and attention_mask.ndim == 1:
            attention_mask = attention_mask.unsqueeze(0)
        if not checks.attention_mask(attention_mask, batch, length, past_key_values):
            attention_mask = None
        return given, attention_mask

    def _tokenise(
        self,
        text: str | Sequence[str],
        attention_mask: Tensor | None,
        past: KVCache | None,
        prepend_bos: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return a text's ids, and a mask over cached and new tokens if some are padding."""
        if past is not None and past.has_padding:
            raise checks.InputError(
                "past_key_values holds padded prompts, and text cannot say which cached tokens are "
                "padding; continue with token ids, model.to_tokens(text, prepend_bos=False), and an "
                "attention_mask over the cached and the new tokens."
            )
        if attention_mask is not None:
            raise checks.InputError(
                "attention_mask goes with token ids; text makes its own when it is padded."
            )
        seen = 0 if past is None else past.get_seq_length()
        # a text that continues has its `</s>` already
        tokens, mask = self._ids_and_mask(text, prepend_bos=prepend_bos and seen == 0)
        if mask is not None and seen:
            mask = torch.cat([mask.new_ones(len(mask), seen), mask], dim=1)
        return tokens, mask

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor | None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = True,
        **options: Any,
    ) -> dict[str, Any]:
        """Return what `forward` takes at the next step of decoding; PEFT and decoding loops ask.

        The method has transformers' name and meaning: tokens that the cache has seen are left out.

        Args:
            input_ids: All token ids so far, `[batch, pos]`.
            past_key_values: Keys and values of the tokens seen; none at the first step.
            attention_mask: Ones and zeros over all tokens so far; None if none is padding.
            inputs_embeds: Embeddings of the prompt, which stand in for ids until it has been seen.
            use_cache: Whether the step shall return keys and values.
            **options: Further arguments of `forward`, handed on.

        Raises:
            InputError: If the cache has seen all tokens, so that there is no step to make.

        Example:
            >>> import optlens
            >>> model = optlens.load()
            >>> tokens = model.to_tokens("One two three one two")
            >>> cache = None
            >>> for _ in range(3):
            ...     step = model.prepare_inputs_for_generation(tokens, cache)
            ...     out = model(**step)
            ...     cache = out.past_key_values
            ...     tokens = torch.cat([tokens, out.logits[:, -1:].argmax(-1)], dim=1)
            >>> step["input_ids"].shape
            torch.Size([1, 1])
        """
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        step = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            **options,
        }
        if inputs_embeds is not None and seen == 0:
            return step | {"inputs_embeds": inputs_embeds}
        # after embeddings, ids may hold only what was generated, which the mask alone can tell
        total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        new = total - seen
        if not 0 < new <= input_ids.shape[1]:
            raise checks.InputError(
                f"The cache holds {seen} tokens of {total}: there is no new token to run. Append "
                "what was chosen to input_ids, and a one to the attention_mask."
            )
        return step | {"input_ids": input_ids[:, -new:]}

    def complete_inputs(
        self,
        input_ids: Prompt | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Inputs:
        """Check all that `forward` takes, and derive mask, positions, cache and blocks to run.

        Raises:
            InputError: If something does not fit the model or contradicts something else.
        """
        blocks = checks.layer_range(start_at_layer, stop_at_layer, self._config.n_layers)
        in_part = start_at_layer is not None or stop_at_layer is not None
        checks.tensors(position_ids=position_ids)
        checks.partial_run(start_at_layer, stop_at_layer, position_ids, past_key_values, use_cache)
        cache = past_key_values
        if cache is None and use_cache and not in_part:
            cache = KVCache()  # asked for, so that a prompt may come in chunks
        given, padding = self.prepare_inputs(
            input_ids, attention_mask, inputs_embeds, start_at_layer, cache
        )
        if cache is None and use_cache is None and self._config.use_cache and not in_part:
            cache = KVCache()
        seen = 0 if cache is None else cache.get_seq_length()
        batch, pos = given.shape[:2]
        mask = AttentionMask(padding, batch, pos, seen + pos, given.device)
        if cache is not None and padding is not None:
            cache.has_padding = True
        if position_ids is None:
            position_ids = mask.position_ids
        else:
            checks.position_ids(position_ids, batch, pos, self._config.n_ctx)
            position_ids = position_ids.to(given.device)
        if start_at_layer is not None:
            return Inputs(None, None, given, position_ids, mask, cache, blocks)
        if inputs_embeds is not None:
            return Inputs(None, given, None, position_ids, mask, cache, blocks)
        return Inputs(given, None, None, position_ids, mask, cache, blocks)
