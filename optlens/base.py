"""What every OPT model can do beside its forward pass: take text, be listened to, load and save.

The network itself is in `model.py`, the preparation of its inputs in `inputs.py`, the loss in
`loss.py`. The methods here say where a model is and what it is made of, and run it with hooks or
recorders attached; loading, saving and recording are one line each, delegating to the module that
does it.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from optlens import allocator, checks
from optlens.cache import ActivationCache
from optlens.config import OPTConfig
from optlens.hooks import HookedModule, HookFunction, HookPoint, NameFilter
from optlens.inputs import InputMethods, Prompt
from optlens.loss import check_return_type
from optlens.names import UnknownHookError, hook_names, shape_of
from optlens.outputs import ModelOutput
from optlens.quantized import is_int8
from optlens.tokenizer import OPTTokenizer, TokenizerMethods
from optlens.weights import WeightProperties

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from optlens.generation import Stream
    from optlens.interventions import Intervention
    from optlens.recording import Recording


class OPTBase(HookedModule, TokenizerMethods, InputMethods, WeightProperties):
    """The common part of all OPT models.

    Attributes:
        tokenizer: Turns text into token ids and back; None for a model made from a config alone.
        hook_dict: Hook name to `HookPoint`, in the order of the table in `optlens.names`.
        takes_return_type: Whether `forward` has a loss to give, and so takes `return_type`.
        placement: Says, as text, where the weights are and how they are kept; None if they simply
            are in the memory of one device.
    """

    tokenizer: OPTTokenizer | None = None
    takes_return_type = False
    generation_config = None  # PEFT looks for one before it calls `generate`
    placement: Any = None

    def __init__(self, config: OPTConfig) -> None:
        """Copy the config; a subclass adds its layers and then calls `finish_init`."""
        super().__init__()
        self._config = copy.deepcopy(config)  # its device and dtype are this model's alone

    def finish_init(self) -> None:
        """Draw random weights as transformers does, tie the unembedding, collect the hooks."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=self._config.init_std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
                if getattr(module, "padding_idx", None) is not None:
                    nn.init.zeros_(module.weight.data[module.padding_idx])
        self.tie_weights()
        self.collect_hooks()
        self.hook_dict = {name: self.hook_dict[name] for name in hook_names(self._config)}

    def unembed(self, resid: Tensor) -> Tensor:
        """Turn a residual stream into logits, in a model that has an unembedding.

        Raises:
            InputError: If it has none.
        """
        raise checks.InputError(_no_logits(self, "this"))

    def tie_weights(self) -> None:
        """Share weights that the config says are shared; loading calls this again."""

    # ------------------------------------------------------------------------ what it is

    @property
    def config(self) -> OPTConfig:
        """The model's `OPTConfig`, whose `device` and `dtype` follow the weights."""
        self._config.device, self._config.dtype = self.device, self.dtype
        return self._config

    @property
    def cfg(self) -> OPTConfig:
        """The config, under TransformerLens's name."""
        return self.config

    @property
    def device(self) -> torch.device:
        """Where the embedding lies, and so where token ids must be."""
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.decoder.embed_tokens.weight.dtype

    @property
    def is_loaded_in_8bit(self) -> bool:
        """Whether any matrix is held in 8 bits by bitsandbytes; PEFT asks before it wraps one."""
        return any(is_int8(parameter) for parameter in self.parameters())

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, under the name by which PEFT and others ask for it."""
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the unembedding likewise; None in a model that has none."""
        return getattr(self, "lm_head", None)

    def summary(self) -> None:
        """Print the model's parts, shapes and bytes, and the table of its hooks."""
        from optlens.summary import describe

        print(describe(self))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> Self:
        """Load a checkpoint; see `optlens.load` for the options."""
        from optlens.checkpoints import load_model

        return load_model(cls, source, **options)

    def save_pretrained(self, folder: str | os.PathLike, **options: Any) -> None:
        """Write a checkpoint folder that transformers and optlens read."""
        from optlens.checkpoints import save_model

        save_model(self, folder, **options)

    def record(self, prompt: Prompt, **options: Any) -> Recording:
        """Run on a prompt and keep what happened; see `optlens.record` for the options."""
        from optlens.capture import record

        return record(self, prompt, **options)

    def generate(
        self, prompt: Prompt | None = None, max_new_tokens: int | None = 20, **options: Any
    ) -> Any:
        """Write on from a prompt; see `optlens.generation.generate` for options and result."""
        from optlens.generation import generate

        return generate(self, prompt, max_new_tokens, **options)

    def stream(
        self, prompt: Prompt | None = None, max_new_tokens: int | None = 20, **options: Any
    ) -> Stream:
        """Write on from a prompt, piece by piece; see `optlens.generation.stream`."""
        from optlens.generation import stream

        return stream(self, prompt, max_new_tokens, **options)

    def intervene(
        self, interventions: Intervention | Iterable[Intervention], spans: Mapping | None = None
    ) -> AbstractContextManager[Self]:
        """Let interventions act on every run inside a `with` block.

        See `optlens.interventions.intervene` for positions, order and errors.

        Example:
            >>> with model.intervene([Ablate("z", layer=1, head=4)]):  # doctest: +SKIP
            ...     logits = model("When John and Mary met, John").logits
        """
        from optlens.interventions import intervene

        return intervene(self, interventions, spans)

    # ------------------------------------------------------------- running with hooks attached

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Switch dropout and layerdrop off for a while; each module goes back to its own mode."""
        training = [module for module in self.modules() if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True

    def run_with_hooks(
        self,
        input: Prompt,
        fwd_hooks: Iterable[tuple[NameFilter, HookFunction]] = (),
        bwd_hooks: Iterable[tuple[NameFilter, HookFunction]] = (),
        return_type: str | None = "logits",
        prepend_bos: bool = True,
        attention_mask: Tensor | None = None,
        **forward_options: Any,
    ) -> Any:
        """Run once with hook functions attached, and remove them.

        Args:
            input: Text, a list of texts, or token ids; None beside `inputs_embeds=`.
            fwd_hooks: Pairs of a hook name (or filter over names) and `fn(activation, hook)`.
            bwd_hooks: Pairs likewise, `fn(gradient, hook)`; they act when the caller runs
                `backward()` on what this returns.
            return_type: "logits" (of an `OPTModel`, the last hidden state), "loss", "both", or None
                for the output object.
            prepend_bos: Whether text gets `</s>` in front.
            attention_mask: For padded token ids.
            **forward_options: Further arguments of `forward`.

        Raises:
            UnknownHookError: If a name does not exist (the nearest are suggested), or lies outside
                the blocks that `start_at_layer` and `stop_at_layer` run; of a filter, if all do.
            HookError: If a function returns a wrong shape, dtype or device.

        Example:
            >>> def ablate(z, hook):
            ...     z[:, :, 4] = 0.0
            >>> model = optlens.load()  # doctest: +SKIP
            >>> model.run_with_hooks("Hi", fwd_hooks=[("blocks.1.attn.hook_z", ablate)])  # doctest: +SKIP
        """
        fwd_hooks, bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        start, stop = (forward_options.get(f"{end}_at_layer") for end in ("start", "stop"))
        for names, _ in (*fwd_hooks, *bwd_hooks):
            self._check_reached(names, start, stop)
        with self.hooks(fwd_hooks, bwd_hooks):
            return self._run(input, return_type, prepend_bos, attention_mask, **forward_options)

    def run_with_cache(
        self,
        input: Prompt,
        names_filter: NameFilter = None,
        return_type: str | None = "logits",
        remove_batch_dim: bool = False,
        stop_at_layer: int | None = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        prepend_bos: bool = True,
        attention_mask: Tensor | None = None,
        **forward_options: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run once and keep the values at hook points.

        Values are those after every hook function. They are detached from the graph, and shared
        with the run rather than copied, so keeping them costs no time; but no two of them share
        memory, nor one with what the caller passed in. A returned `past_key_values` or
        `hidden_states` may share memory with them.

        Args:
            input: Text, a list of texts, or token ids.
            names_filter: What to keep: a name, a list of names, a function of the name; or None
                for all that are not computed only on request.
            return_type: As for `run_with_hooks`.
            remove_batch_dim: Drop the batch axis of every kept value; needs a batch of one.
            stop_at_layer: Run only the blocks before this one; returns the residual stream.
            incl_bwd: Run `backward()` on the result, which must be the loss, and keep the
                gradients too, under the name plus "_grad".
            device: Where to keep the values; where they were computed unless given.
            prepend_bos: Whether text gets `</s>` in front.
            attention_mask: For padded token ids.
            **forward_options: Further arguments of `forward`.

        Returns:
            What `return_type` says, and the `ActivationCache`.

        Raises:
            UnknownHookError: If a name does not exist, a filter accepts none, or a named hook lies
                behind `stop_at_layer`.
        """
        if incl_bwd and (return_type != "loss" or stop_at_layer is not None):
            raise checks.InputError(
                f"incl_bwd=True differentiates the loss; got return_type={return_type!r} and "
                f"stop_at_layer={stop_at_layer}, pass return_type='loss' and run all layers."
            )
        kept: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        seen = {_memory(given) for given in (input, forward_options.get("inputs_embeds"))}

        def keep(value: Tensor, hook: HookPoint) -> None:
            # One tensor can bear two names (resid_post, then resid_pre) or be the caller's, an
            # expanded one (stride 0, as q_input over heads) is a view of another, and a hook
            # function may hold on to the one it returned: each name gets its own memory.
            own = value.detach()
            if _memory(own) in seen or hook.editors or 0 in value.stride():
                own = own.clone()
            kept[hook.name] = own if device is None else own.to(device)
            seen.add(_memory(kept[hook.name]))

        def keep_gradient(value: Tensor, hook: HookPoint) -> None:
            gradients[f"{hook.name}_grad"] = value.detach().to(device or value.device, copy=True)

        points = self.match_hooks(names_filter)
        with self.recorders(points, keep, keep_gradient if incl_bwd else None):
            result = self._run(
                input,
                return_type,
                prepend_bos,
                attention_mask,
                points if device is None else [],
                stop_at_layer=stop_at_layer,
                **forward_options,
            )
            if incl_bwd:
                result.backward()
        self._check_all_fired(points, kept, names_filter, stop_at_layer)
        cache = ActivationCache({**kept, **gradients}, n_layers=self._config.n_layers)
        return result, cache.remove_batch_dim() if remove_batch_dim else cache

    def _run(
        self,
        input: Prompt,
        return_type: str | None,
        prepend_bos: bool,
        attention_mask: Tensor | None,
        keeping: Sequence[HookPoint] = (),
        **forward_options: Any,
    ) -> Any:
        check_return_type(return_type)
        if return_type in ("loss", "both") and not self.takes_return_type:
            raise checks.InputError(_no_logits(self, f"return_type={return_type!r}"))
        if input is not None and not isinstance(input, Tensor):
            past = forward_options.get("past_key_values")
            input, attention_mask = self.prepare_inputs(
                input, attention_mask, past_key_values=past, prepend_bos=prepend_bos
            )
        if isinstance(input, Tensor) and input.ndim and self.device.type == "cpu":
            batch, pos = input.shape[:2] if input.ndim > 1 else (1, len(input))
            shapes = [shape_of(point.name, self._config, batch, pos) for point in keeping]
            allocator.reserve(sum(map(math.prod, shapes)) * self.dtype.itemsize)
        if return_type in ("loss", "both"):
            forward_options["return_type"] = return_type
        result = self(input, attention_mask=attention_mask, **forward_options)
        plain = return_type == "logits" and isinstance(result, ModelOutput)
        return result.main if plain else result

    def _check_reached(self, names: NameFilter, start: int | None, stop: int | None) -> None:
        """Refuse hooks that a run of some blocks would pass by in silence."""
        blocks = checks.layer_range(start, stop, self._config.n_layers)

        def is_reached(name: str) -> bool:
            if name.startswith("blocks."):
                return int(name.split(".")[1]) in blocks
            return stop is None if name.startswith("ln_final") else start is None

        points = self.match_hooks(names)
        missed = [point.name for point in points if not is_reached(point.name)]
        spelt_out = names is not None and not callable(names)
        if missed and (spelt_out or len(missed) == len(points)):
            raise UnknownHookError(
                f"A hook on {', '.join(map(repr, missed[:3]))} would not act with "
                f"start_at_layer={start}, stop_at_layer={stop}; run the layers that compute it, or "
                "hook other names."
            )

    @staticmethod
    def _check_all_fired(
        points: list[HookPoint],
        kept: dict[str, Tensor],
        names_filter: NameFilter,
        stop_at_layer: int | None,
    ) -> None:
        silent = [point.name for point in points if point.name not in kept]
        spelt_out = names_filter is not None and not callable(names_filter)
        if silent and (spelt_out or not kept):
            why = f" with stop_at_layer={stop_at_layer}" if stop_at_layer is not None else ""
            raise UnknownHookError(
                f"Nothing was computed at {', '.join(map(repr, silent[:3]))}{why}; "
                "run the layers that compute it, or ask for other names."
            )


def _memory(value: Any) -> int | None:
    """Return what is equal for two tensors in one piece of memory; None for what has no memory."""
    if not isinstance(value, Tensor) or value.is_meta or hasattr(value, "fake_mode"):
        return None
    return value.untyped_storage().data_ptr()


def _no_logits(model: OPTBase, request: str) -> str:
    return (
        f"{request} needs logits, but an {type(model).__name__} has no unembedding; use an "
        "OPTForCausalLM, such as optlens.load gives."
    )
