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
from torch import Tensor

from optlens.files import read_tensors, write_tensors
from optlens.names import get_act_name

if TYPE_CHECKING:
    from optlens.lens import LogitLens
    from optlens.model import OPTForCausalLM
    from optlens.report import RecordingView

WHAT = ("attention", "residual", "logit_lens")
FINAL = "final_residual"
LENS = "lens_"


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
        positions: Which positions; as they were asked for where prompts differ in length.
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
        """Attention patterns, `[layer, head, query, key]`; each row sums to 1."""
        return self._get("attention", "attention")

    @property
    def residual(self) -> Tensor:
        """The residual stream, `[layer + 1, pos, d_model]`.

        Row 0 is what the first block reads (the embedding); row i + 1 is what block `layers[i]`
        leaves behind. `row_labels` names the rows.
        """
        return self._get("residual", "residual")

    @property
    def row_labels(self) -> list[str]:
        """Names of the rows of `residual` and of the lens: "embed", "0", "1", ..."""
        return ["embed", *map(str, self.layers)]

    def __getitem__(self, key: str | tuple) -> Tensor:
        """Return what was recorded under a hook name.

        `rec["blocks.3.attn.hook_z"]` or `rec["z", 3]` is one layer's; `rec["z"]` is all recorded
        layers', stacked to `[layer, ...]`.
        """
        key = (key,) if isinstance(key, str) else key
        if key[0] in self.what and key[0] in self._tensors:
            stacked = self._get(key[0], key[0])
            if len(key) == 1:
                return stacked
            layer = key[1] % self.metadata["config"]["num_hidden_layers"]
            if layer in self.layers:
                return stacked.select(int(self.is_batch), self.layers.index(layer))
        name = get_act_name(*key)
        return self._get(name, name if len(key) > 1 else key[0])

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
            ValueError: If it is not the model that was recorded, by config or weights.
        """
        if fingerprint(model) != self.metadata["fingerprint"]:
            raise ValueError(
                "This is not the model that was recorded: its weights or config differ from "
                f"those of the recording ({self.metadata['config']['num_hidden_layers']} layers, "
                f"fingerprint {self.metadata['fingerprint'][:12]}; the given model has "
                f"{model.config.n_layers} layers, fingerprint {fingerprint(model)[:12]})."
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

    def show(self) -> RecordingView:
        """Return a view that a notebook displays."""
        from optlens.report import RecordingView

        return RecordingView(self)

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
    """Return a hash of a model's config and of a sample of every weight, alike in every dtype.

    64 numbers of each tensor are read, so that it takes milliseconds at any size. Weights that
    differ only by rounding to a wider dtype and back have the same fingerprint.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    samples = []
    for name, weight in model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        samples.append(flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32))
    digest.update(torch.cat(samples).numpy().tobytes())
    return digest.hexdigest()
