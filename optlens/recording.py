"""What a model did on a prompt: the main thing a user holds.

A `Recording` is data: tokens, attention patterns, the residual stream, the logit lens, and where
all that came from. It can be saved, loaded without its model, and shown. Making one is
`optlens.capture.record`; computing on one is the business of `optlens.lens` and its neighbours.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optlens import checks
from optlens.checks import InputError
from optlens.files import read_tensors, write_tensors
from optlens.names import get_act_name, is_full_name
from optlens.quantized import is_quantized, quantized_sample
from optlens.weight_sample import weight_sample
from optlens.weights import values_of

if TYPE_CHECKING:
    from optlens.lens import LogitLens
    from optlens.model import OPTForCausalLM
    from optlens.widgets import Explorer

WHAT = ("attention", "residual", "logit_lens")
FINAL = "final_residual"
LENS = "lens_"
# What decides the computation and does not show in the names and shapes of the weights.
ARCHITECTURE = (
    "num_attention_heads",
    "activation_function",
    "do_layer_norm_before",
    "_remove_final_layer_norm",
)


class NotRecordedError(AttributeError, KeyError):
    """Something that this recording does not hold; the message says how to get it."""

    def __str__(self) -> str:
        """Return the message itself, not its repr as KeyError would."""
        return str(self.args[0])


class Recording:
    """What happened on one prompt, or on a batch of prompts with a leading batch axis everywhere.

    Attributes:
        tokens: Token ids, `[pos]`.
        mask: True at real tokens, `[pos]`; padding is only there in a batch of unequal prompts.
        prompt: The text that was run, with its special tokens.
        str_tokens: The text of each token.
        layers: Which blocks were recorded.
        heads: Which heads of them.
        positions: Which positions; as they were asked for where prompts are padded.
        columns: Where these lie in `tokens` and among the keys of `attention`.
        metadata: Config, model fingerprint, dtype, versions and seed of the run.

    Example:
        >>> rec = optlens.load().record("The cat sat on the")  # doctest: +SKIP
        >>> rec.attention.shape  # [layer, head, query, key]  # doctest: +SKIP
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        metadata: dict[str, Any],
        model: OPTForCausalLM | None = None,
    ) -> None:
        """Wrap what `record` has kept, or `load` has read."""
        self._tensors = tensors
        self._model = model
        self.metadata = metadata
        self.layers: list[int] = metadata["layers"]
        self.heads: list[int] = metadata["heads"]
        self.positions: list[int] = metadata["positions"]

    # ------------------------------------------------------------------------- what it holds

    def _get(self, name: str, what: str) -> Tensor:
        if name not in self._tensors:
            raise NotRecordedError(
                f"This recording holds {', '.join(self.what)} but not {what!r}; record it with "
                f"model.record(prompt, what={(*self.what, what)!r})."
            )
        value = self._tensors[name]
        return value if self.is_batch else value[0]

    @property
    def is_batch(self) -> bool:
        """Whether there is a leading batch axis."""
        return self.metadata["is_batch"]

    @property
    def what(self) -> list[str]:
        """What was asked for: "attention", "residual", "logit_lens", hook names."""
        return self.metadata["what"]

    @property
    def tokens(self) -> Tensor:
        """Token ids, `[pos]`."""
        return self._get("tokens", "tokens")

    @property
    def mask(self) -> Tensor:
        """True at real tokens, `[pos]`."""
        return self._get("mask", "mask")

    @property
    def str_tokens(self) -> list[str] | list[list[str]]:
        """The text of each token; of each prompt's tokens in a batch."""
        texts = self.metadata["str_tokens"]
        return texts if self.is_batch else texts[0]

    @property
    def prompt(self) -> str | list[str]:
        """The text that was run, special tokens included; a list of texts for a batch."""
        return self.metadata["prompts"] if self.is_batch else self.metadata["prompts"][0]

    @property
    def attention(self) -> Tensor:
        """Attention patterns, `[layer, head, query, key]`; rows sum to 1, except in padding."""
        return self._get("attention", "attention")

    @property
    def residual(self) -> Tensor:
        """The residual stream, `[layer + 1, pos, d_model]`.

        Row 0 is what the first block reads (the embedding); row i + 1 is what block `layers[i]`
        leaves behind. `row_labels` names the rows.
        """
        return self._get("residual", "residual")

    @property
    def columns(self) -> list[int] | list[list[int]]:
        """Where the recorded positions lie in `tokens`; a list for each prompt in a batch.

        Equal to `positions` unless prompts are padded: there positions count a prompt's real
        tokens, if some were chosen, and columns count its padding too.
        """
        columns = self.metadata["columns"]
        return columns if self.is_batch else columns[0]

    @property
    def row_labels(self) -> list[str]:
        """Names of the rows of `residual` and of the lens: "embed", "0", "1", ..."""
        return ["embed", *map(str, self.layers)]

    def __getitem__(self, key: str | tuple) -> Tensor:
        """Return what was recorded under a hook name.

        `rec["blocks.3.attn.hook_z"]` or `rec["z", 3]` is one layer's; `rec["z"]` is all recorded
        layers', stacked to `[layer, ...]`. Layers count from the end if negative.

        Raises:
            NotRecordedError: If it was not recorded, naming the `what` to add.
            InputError: If there is no such layer, or what was recorded is not stacked by layer.
        """
        name, *where = (key,) if isinstance(key, str) else key
        if name == "logit_lens" and name in self.what:
            raise InputError(
                "The logit lens is more than one tensor: rec.logit_lens() has top_tokens, "
                "top_probs, entropy and kl."
            )
        if not where:
            held = name in self._tensors
            return self._get(name if held else get_act_name(name), name)
        where[0] = layer = self._layer_number(where[0])
        if name == "residual":
            raise InputError(
                "The residual stream has a row more than there are layers, so a layer's number "
                f"does not say which: rec.residual has rows {', '.join(self.row_labels)}, or "
                f"record what=('resid_pre', 'resid_post')."
            )
        if name in self._tensors and name in self.what and not is_full_name(name):
            if layer in self.layers:
                stacked = self._get(name, name)
                return stacked.select(int(self.is_batch), self.layers.index(layer))
        full = get_act_name(name, *where)
        return self._get(full, full)

    def _layer_number(self, layer: int | str) -> int:
        n_layers = self.metadata["config"]["num_hidden_layers"]
        number = layer.item() if hasattr(layer, "item") else layer  # torch and NumPy
        number = int(number) if isinstance(number, str) and number.isdecimal() else number
        if not isinstance(number, int) or not -n_layers <= number < n_layers:
            raise InputError(
                f"There is no layer {layer!r}: this model has layers 0 to {n_layers - 1}, or -1 to "
                f"-{n_layers} from the end."
            )
        return number % n_layers

    @property
    def logits(self) -> Tensor:
        """Logits at the recorded positions, `[pos, d_vocab]`, computed from the last residual."""
        return self._unembed(self._get(FINAL, "residual"))

    def _unembed(self, resid: Tensor) -> Tensor:
        model = self.model
        with torch.no_grad(), model.paused_hooks():
            return model.unembed(resid.to(model.device, model.dtype))

    def label(self, token: int) -> str:
        """Return a legible name for a token id: `·the`, `↵`, `⟨50265⟩`."""
        known = self.metadata["labels"].get(str(int(token)))
        if known is None and self._model is not None and self._model.tokenizer is not None:
            known = self._model.tokenizer.display(int(token))
        return known or f"⟨{int(token)}⟩"

    # ---------------------------------------------------------------------------- its model

    @property
    def model(self) -> OPTForCausalLM:
        """The model that was recorded.

        Raises:
            NotRecordedError: If the recording was loaded and no model has been attached.
        """
        if self._model is None:
            raise NotRecordedError(
                "This needs the model's weights, and a loaded recording has none: "
                "rec.attach(model), or pass model=."
            )
        return self._model

    def attach(self, model: OPTForCausalLM) -> Recording:
        """Give a loaded recording its model back; returns the recording.

        Raises:
            ValueError: If it is not the model that was recorded, by what `fingerprint` sees; also
                if it is the same in a dtype that has rounded its weights.
        """
        given = fingerprint(model)
        if given != self.metadata["fingerprint"]:
            raise ValueError(
                "This is not the model that was recorded: its architecture or weights differ from "
                f"those of the recording ({self.metadata['config']['num_hidden_layers']} layers, "
                f"{self.metadata['model_dtype']}, fingerprint {self.metadata['fingerprint'][:12]}; "
                f"the given model has {model.config.n_layers} layers, {model.dtype}, fingerprint "
                f"{given[:12]}). Weights rounded to a narrower dtype count as different."
            )
        self._model = model
        return self

    def logit_lens(
        self, top_k: int = 5, sublayers: bool = False, model: OPTForCausalLM | None = None
    ) -> LogitLens:
        """Return what each layer would predict; see `optlens.logit_lens`."""
        from optlens.lens import lens_of_recording

        if model is not None:
            self.attach(model)
        return lens_of_recording(self, top_k, sublayers)

    # ------------------------------------------------------------------ keeping and showing it

    def save(self, path: str | os.PathLike) -> None:
        """Write to a safetensors file; an existing file is replaced only when all is written."""
        facts = {"kind": "Recording", "metadata": self.metadata}
        write_tensors(path, self._tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recording:
        """Read what `save` has written; the model is not needed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or no recording.
        """
        tensors, facts = read_tensors(path, "Recording")
        return cls(tensors, facts["metadata"])

    def to_html(self, path: str | os.PathLike) -> None:
        """Write one self-contained page: no kernel, no network."""
        from optlens.report import write_html

        write_html(self, path)

    def show(self) -> Explorer:
        """Return linked views of all that it holds, which a notebook displays.

        Example:
            >>> optlens.load().record("The cat sat on the").show()  # doctest: +SKIP
        """
        from optlens.widgets import Explorer

        return Explorer(self)

    def __repr__(self) -> str:
        """Describe what is inside."""
        batch, pos = self._tensors["tokens"].shape
        prompts = f"{batch} prompts, " if self.is_batch else ""
        megabytes = sum(t.nbytes for t in self._tensors.values()) / 1e6
        return (
            f"Recording({prompts}{pos} tokens, {len(self.layers)} layers, {len(self.heads)} heads: "
            f"{', '.join(self.what)}; {megabytes:.1f} MB)"
        )


def fingerprint(model: OPTForCausalLM) -> str:
    """Return a hash of what a model computes: its architecture and a sample of every weight.

    At least one number of every row and every column of each weight is read, which takes
    milliseconds: that a neuron, a head or a token's embedding was changed is seen, a change to
    single numbers may not be. A wider dtype changes nothing, one that rounds the weights does.
    Of a model without values, on fake tensors, it is that of its shapes. Config fields on which the
    weights and the computation do not depend, such as `use_cache`, are left out.
    """
    config = model.config.to_dict()
    facts = {name: config[name] for name in ARCHITECTURE}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    weights = _weights_of(model)
    shapes = (f"{name}{_shape(module, attribute)}" for name, module, attribute in weights)
    digest.update("".join(shapes).encode())
    for _, module, attribute in weights:
        sample = checks.on_host(_sample(module, attribute))
        if sample is not None:  # a rehearsal has no values
            digest.update(sample.float().contiguous().numpy())
    return digest.hexdigest()


def _weights_of(model: OPTForCausalLM) -> list[tuple[str, nn.Module, str]]:
    """Return name, module and attribute of each parameter, a tied one once."""
    found, seen = [], set()
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{path}.{attribute}".lstrip("."), module, attribute))
    return found


def _shape(module: nn.Module, attribute: str) -> tuple[int, ...]:
    """Return the shape of a weight; of codes, which share bytes, that of the matrix."""
    if attribute == "weight" and is_quantized(module):
        return module.out_features, module.in_features
    return tuple(getattr(module, attribute).shape)


def _sample(module: nn.Module, attribute: str) -> Tensor:
    """Return the sample of a weight; one that is on the disk has it at hand, without being read."""
    weight = getattr(module, attribute)
    if hasattr(weight, "sample"):
        return weight.sample()
    if attribute == "weight" and is_quantized(module):
        return quantized_sample(module)
    return weight_sample(values_of(module, attribute).detach())
