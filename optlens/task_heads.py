"""OPTs with a head for a task: classifying a text, and finding an answer in it.

Both are the stack of `model.py` with a linear map behind it: `score` reads the last token of each
prompt, `qa_outputs` reads every token. Hooks, recordings and interventions reach into the stack as
they do in `OPTForCausalLM`. Outputs, losses and gradients are those of transformers' classes of the
same names, and so are the parameter names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from optlens import checks
from optlens.base import OPTBase
from optlens.config import OPTConfig
from optlens.inputs import Inputs, Prompt
from optlens.kv_cache import KVCache, undone_on_failure
from optlens.labels import LabelError, label_fields
from optlens.loss import check_return_type
from optlens.model import OPTDecoder, OPTModel
from optlens.outputs import (
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    as_asked,
)
from optlens.task_loss import (
    check_class_values,
    class_loss,
    class_targets,
    problem_type_of,
    span_loss,
    span_targets,
)


class _OPTWithHead(OPTBase):
    """The common part of the models with a task head."""

    takes_return_type = True

    def __init__(self, config: OPTConfig, head: str, width: int, bias: bool) -> None:
        """Make a model with random weights, drawn as transformers draws them."""
        super().__init__(config)
        self.model = OPTModel(config)
        self.model._config = self._config  # one config for both, and for nobody else
        self.add_module(head, nn.Linear(config.word_embed_proj_dim, width, bias=bias))
        self.finish_init()

    @property
    def decoder(self) -> OPTDecoder:
        """Embeddings and blocks."""
        return self.model.decoder

    def _check_request(self, return_type: str | None, has_targets: bool, **stopped: Any) -> None:
        """Refuse a loss without anything to compare with, and a stopped run that asks for more."""
        checks.stopped_run(return_type=return_type, **stopped)
        check_return_type(return_type)
        if return_type in ("loss", "both") and not has_targets:
            raise checks.InputError(
                f"return_type={return_type!r} needs what the loss compares with: {self.targets}."
            )


class OPTForSequenceClassification(_OPTWithHead):
    """An OPT that classifies texts; the counterpart of transformers' class of this name.

    `config.num_labels` says how many classes there are (2 unless given) and `config.id2label` what
    they are called.

    Example:
        >>> import torch
        >>> from optlens import OPTConfig
        >>> config = OPTConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4,
        ...                    id2label={0: "calm", 1: "angry", 2: "sad"})
        >>> model = OPTForSequenceClassification(config).eval()
        >>> out = model(torch.tensor([[2, 100, 101]]), labels=torch.tensor([1]))
        >>> out.logits.shape, out.loss.ndim
        (torch.Size([1, 3]), 0)
    """

    targets = "labels="

    def __init__(self, config: OPTConfig) -> None:
        """Make a model with random weights, drawn as transformers draws them."""
        super().__init__(config, "score", config.num_labels, bias=False)
        self._config.id2label = config.id2label  # written out, so that a saved config says it
        if self.config.problem_type == "single_label_classification" and config.num_labels == 1:
            raise LabelError(
                "single_label_classification needs at least two classes, got num_labels=1; its "
                'loss would always be 0. Use num_labels=2, or problem_type="regression".'
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a classifier; of a checkpoint without one, with a new head, and say so in a warning.

        A new head is drawn from torch's generator, as `torch.manual_seed` sets it.

        Args:
            source: A folder or Hub id, as for `optlens.load`.
            num_labels: Number of classes, if other than what the checkpoint says.
            id2label: Names of the classes by number, likewise.
            label2id: The same the other way round; one of the two is enough.
            problem_type: "regression", "single_label_classification" or
                "multi_label_classification"; told from the first labels unless given.
            **options: As for `optlens.load`.

        Example:
            >>> from optlens import demo
            >>> _ = torch.manual_seed(0)
            >>> with warnings.catch_warnings(record=True) as said:
            ...     warnings.simplefilter("always")
            ...     model = OPTForSequenceClassification.from_pretrained(demo.path(), num_labels=3)
            >>> "new" in str(said[0].message), model.score.weight.shape
            (True, torch.Size([3, 256]))
        """
        from optlens.checkpoints import load_model

        fields = label_fields(num_labels, id2label, label2id, problem_type)
        return load_model(cls, source, config_fields=fields, **options)

    def forward(
        self,
        input_ids: Prompt | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_type: str | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | Tensor | tuple:
        """Classify each prompt by its last token that is not padding.

        That is, as in transformers, the last whose id is not `config.pad_token_id`, whatever the
        mask says; from embeddings or a residual, the last column. Where the mask calls that very
        token padding, a warning says so.

        Args:
            input_ids: Token ids `[batch, pos]`, text or texts, or a residual; this and what is not
                listed here as `OPTForCausalLM` takes it.
            attention_mask: Ones for real tokens and zeros for padding, `[batch, pos]`.
            position_ids: `[batch, pos]`.
            past_key_values: A `KVCache` of the tokens before these.
            inputs_embeds: `[batch, pos, word_embed_proj_dim]` instead of `input_ids`.
            labels: Classes `[batch]`, -100 not counting; or values `[batch, label]`. Unless
                `config.problem_type` says which loss is meant, the first labels decide, as in
                transformers: one output is a regression, whole numbers are classes, and other
                numbers say of each class whether it is there.
            use_cache: Whether to return `past_key_values`.
            output_attentions: Return the patterns.
            output_hidden_states: Return what each block reads, and the last hidden state.
            return_type: "logits", "loss" or "both" for plain tensors.
            start_at_layer: Take `input_ids` as the residual stream that this block reads.
            stop_at_layer: Return the residual stream that this block would read.
            return_dict: False gives the output's fields as a tuple.

        Returns:
            The output, with `logits [batch, label]`.

        Raises:
            InputError: If the input or the labels do not fit the model, saying what would.
        """
        self._check_request(
            return_type,
            labels is not None,
            stop=stop_at_layer,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        with undone_on_failure(past_key_values):
            inputs = self.complete_inputs(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                use_cache,
                start_at_layer,
                stop_at_layer,
            )
            if stop_at_layer is None:
                last = self._last_tokens(inputs)
                targets = self._targets(labels, inputs.mask.batch)
            resid, patterns, stream = self.decoder(inputs, output_attentions, output_hidden_states)
            if stop_at_layer is not None:
                return resid
            hidden = self.decoder.finish(resid)
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            logits = self.score(hidden[rows, last.to(hidden.device)])  # [batch, label]
            checks.finite(logits, "the classifier")
            loss = None if labels is None else class_loss(self.config.problem_type, logits, targets)
        stream = (*stream, hidden) if output_hidden_states else None
        output = SequenceClassifierOutput(loss, logits, inputs.cache, stream, patterns)
        return as_asked(output, return_dict, return_type)

    def _last_tokens(self, inputs: Inputs) -> Tensor:
        """Return the column of the token that each prompt is classified by, `[batch]`."""
        pad, batch, pos = self.config.pad_token_id, inputs.mask.batch, inputs.mask.n_query
        if pad is None and batch > 1:
            raise checks.InputError(
                f"A batch of {batch} prompts cannot be classified without a padding token: set "
                "model.config.pad_token_id (1 in every published OPT), or pass prompts one by one."
            )
        if pad is None or inputs.tokens is None:
            last = torch.full((batch,), pos - 1)
        else:
            columns = torch.arange(pos, device=inputs.tokens.device)
            last = ((inputs.tokens != pad) * columns).argmax(-1)
        self._warn_of_padding(inputs, last)
        return last

    @staticmethod
    def _warn_of_padding(inputs: Inputs, last: Tensor) -> None:
        padding = None if inputs.mask.padding is None else checks.on_host(inputs.mask.padding)
        columns = checks.on_host(last)
        if padding is None or columns is None:
            return
        real = padding[:, -inputs.mask.n_query :].gather(1, columns[:, None])[:, 0]
        if not bool(real.all()):
            warnings.warn(
                f"Prompt {int((~real).nonzero()[0])} is classified by a token that its "
                "attention_mask calls padding, as transformers does: the last whose id is not "
                "config.pad_token_id or, without ids, the last. Pad with pad_token_id, or on the "
                "left.",
                stacklevel=6,
            )

    def _targets(self, labels: Tensor | None, batch: int) -> Tensor | None:
        """Check labels before anything is run, and settle what kind they are."""
        checks.tensors(labels=labels)
        if labels is None:
            return None
        kind, number = problem_type_of(self.config, labels), self.config.num_labels
        targets = class_targets(kind, labels, batch, number)
        check_class_values(kind, targets, number)
        self.config.problem_type = kind
        return targets


class OPTForQuestionAnswering(_OPTWithHead):
    """An OPT that marks an answer in a text; the counterpart of transformers' class of this name.

    Example:
        >>> import torch
        >>> from optlens import OPTConfig
        >>> config = OPTConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
        >>> model = OPTForQuestionAnswering(config).eval()
        >>> out = model(torch.tensor([[2, 100, 101]]))
        >>> out.start_logits.shape, out.end_logits.shape
        (torch.Size([1, 3]), torch.Size([1, 3]))
    """

    targets = "start_positions= and end_positions="

    def __init__(self, config: OPTConfig) -> None:
        """Make a model with random weights, drawn as transformers draws them."""
        super().__init__(config, "qa_outputs", 2, bias=True)

    def forward(
        self,
        input_ids: Prompt | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_type: str | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringOutput | Tensor | tuple:
        """Say of each token how well an answer would start, and end, there.

        Args:
            input_ids: Token ids `[batch, pos]`, text or texts, or a residual; this and what is not
                listed here as `OPTForCausalLM` takes it.
            attention_mask: Ones for real tokens and zeros for padding, `[batch, pos]`. Padding has
                logits too, as in transformers; they mean nothing, but count in the loss's softmax.
            position_ids: `[batch, pos]`.
            past_key_values: A `KVCache` of the tokens before these; logits are of the new ones.
            inputs_embeds: `[batch, pos, word_embed_proj_dim]` instead of `input_ids`.
            start_positions: Column of each answer's first token, `[batch]`. A column behind the
                prompt (an answer that was cut off) does not count in the loss.
            end_positions: Column of its last token, likewise.
            use_cache: Taken as transformers takes it; this output returns no cache either way.
            output_attentions: Return the patterns.
            output_hidden_states: Return what each block reads, and the last hidden state.
            return_type: "logits" (`[batch, pos, 2]`, start and end), "loss" or "both".
            start_at_layer: Take `input_ids` as the residual stream that this block reads.
            stop_at_layer: Return the residual stream that this block would read.
            return_dict: False gives the output's fields as a tuple.

        Raises:
            InputError: If the input or the positions do not fit, saying what would.
        """
        if (start_positions is None) != (end_positions is None):
            raise checks.InputError("Give both start_positions and end_positions, or neither.")
        self._check_request(
            return_type,
            start_positions is not None,
            stop=stop_at_layer,
            start_positions=start_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        with undone_on_failure(past_key_values):
            inputs = self.complete_inputs(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                False,
                start_at_layer,
                stop_at_layer,
            )
            spans = self._spans(start_positions, end_positions, inputs)
            resid, patterns, stream = self.decoder(inputs, output_attentions, output_hidden_states)
            if stop_at_layer is not None:
                return resid
            hidden = self.decoder.finish(resid)
            both = self.qa_outputs(hidden)  # [batch, pos, 2]
            checks.finite(both, "the question answerer")
            start, end = both.unbind(-1)
            loss = None if spans is None else span_loss(start, end, *spans)
        stream = (*stream, hidden) if output_hidden_states else None
        output = QuestionAnsweringOutput(loss, start, end, stream, patterns)
        return as_asked(output, return_dict, return_type)

    @staticmethod
    def _spans(
        start: Tensor | None, end: Tensor | None, inputs: Inputs
    ) -> tuple[Tensor, Tensor] | None:
        """Check where the answers are, before anything is run."""
        checks.tensors(start_positions=start, end_positions=end)
        if start is None or end is None:
            return None
        size = inputs.mask.batch, inputs.mask.n_query
        return span_targets(start, "start_positions", *size), span_targets(
            end, "end_positions", *size
        )
