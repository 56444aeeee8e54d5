"""What a forward pass returns: named fields that can also be read as transformers' outputs are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from optlens import checks
from optlens.kv_cache import KVCache


@dataclass(eq=False)
class ModelOutput:
    """Fields by name; by number or key as in transformers; tensor indices go to the main tensor.

    `out[0]` and `out["logits"]` follow transformers (numbers count the fields that are not None);
    `out[0, -1]`, with several indices, reads from the main tensor as if it had been returned alone.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in order."""
        return tuple(v for v in (getattr(self, f.name) for f in fields(self)) if v is not None)

    def __getitem__(self, key: Any) -> Any:
        """Read a field by number or name, or index the main tensor with several indices."""
        if isinstance(key, str):
            return getattr(self, key)
        if isinstance(key, int | slice):
            return self.to_tuple()[key]
        return self.main[key]

    @property
    def main(self) -> Tensor:
        """The tensor that the model exists to compute."""
        raise AttributeError(f"{type(self).__name__} has no main tensor")


@dataclass(eq=False)
class BaseOutput(ModelOutput):
    """Output of `OPTModel`; see transformers' `BaseModelOutputWithPast`.

    Attributes:
        last_hidden_state: `[batch, pos, word_embed_proj_dim]`, after the final LayerNorm and
            `project_out` where the model has them.
        past_key_values: Keys and values for the next call, if `use_cache`.
        hidden_states: With `output_hidden_states`: what each block was given, before edits at its
            `hook_resid_pre`, `[batch, pos, d_model]`, then `last_hidden_state`.
        attentions: With `output_attentions`: each layer's pattern, `[batch, head, query, key]`.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def main(self) -> Tensor:
        """The last hidden state."""
        return self.last_hidden_state


@dataclass(eq=False)
class CausalLMOutput(ModelOutput):
    """Output of `OPTForCausalLM`; see transformers' `CausalLMOutputWithPast`.

    Attributes:
        loss: Mean next-token cross-entropy in nats, if `labels` were given.
        logits: `[batch, pos, d_vocab]`, or only the positions that `logits_to_keep` names.
        past_key_values: Keys and values for the next call, if `use_cache`.
        hidden_states: With `output_hidden_states`: see `BaseOutput`.
        attentions: With `output_attentions`: each layer's pattern, `[batch, head, query, key]`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def main(self) -> Tensor:
        """The logits."""
        return self.logits


@dataclass(eq=False)
class SequenceClassifierOutput(ModelOutput):
    """Output of `OPTForSequenceClassification`; see transformers' class of that name, with past.

    Attributes:
        loss: In the kind that the config's `problem_type` names, if `labels` were given.
        logits: `[batch, label]`, of each prompt's last token that is not padding.
        past_key_values: Keys and values for the next call, if `use_cache`.
        hidden_states: With `output_hidden_states`: see `BaseOutput`.
        attentions: With `output_attentions`: each layer's pattern, `[batch, head, query, key]`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def main(self) -> Tensor:
        """The logits."""
        return self.logits


@dataclass(eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """Output of `OPTForQuestionAnswering`; see transformers' `QuestionAnsweringModelOutput`.

    Attributes:
        loss: Mean of the cross-entropies of start and end, in nats, if positions were given.
        start_logits: How well the answer begins at each token, `[batch, pos]`.
        end_logits: How well it ends there, the last token included, `[batch, pos]`.
        hidden_states: With `output_hidden_states`: see `BaseOutput`.
        attentions: With `output_attentions`: each layer's pattern, `[batch, head, query, key]`.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def main(self) -> Tensor:
        """Both logits side by side, start then end: `[batch, pos, 2]`."""
        return torch.stack((self.start_logits, self.end_logits), dim=-1)


def as_asked(
    output: ModelOutput, return_dict: bool | None, return_type: str | None = None
) -> ModelOutput | tuple[Any, ...] | Tensor:
    """Return an output in the form that was asked for.

    Args:
        output: What a model has computed.
        return_dict: False for the fields as a tuple.
        return_type: "logits", "loss" or "both" for plain tensors; None for the output.
    """
    if return_type is not None:
        main, loss = output.main, output.loss
        return {"logits": main, "loss": loss, "both": (main, loss)}[return_type]
    return output.to_tuple() if return_dict is False else output


def keep_positions(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """Select positions of `hidden [batch, pos, ...]`, as transformers' `logits_to_keep` does.

    Args:
        hidden: What to select from.
        keep: The last so many (0: all); or positions to keep, `[n]` for all prompts alike or
            `[batch, n]` for each its own.

    Raises:
        InputError: If it is neither, or names a position that is not there.
    """
    if not isinstance(keep, Tensor):
        if not hasattr(keep, "__index__"):
            raise checks.InputError(
                f"logits_to_keep must be a number or a tensor of positions, got {keep!r}; "
                "torch.tensor makes one of a list."
            )
        if keep < 0:
            raise checks.InputError(
                f"logits_to_keep must not be negative, got {keep}; 0 keeps all."
            )
        return hidden if keep == 0 else hidden[:, -keep:]
    checks.kept_positions(keep, *hidden.shape[:2])
    keep = keep.to(hidden.device)
    if keep.ndim == 2:
        return hidden.take_along_dim(keep[..., None].long(), dim=1)
    return hidden[:, keep]
