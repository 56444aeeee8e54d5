"""The shape of an OPT: every field of a checkpoint's `config.json`, and the published sizes.

Field names and defaults are Hugging Face's, so a checkpoint's `config.json` is read as it is. The
interpretability field has its own names for the same numbers (`n_layers`, `d_model`, ...); a config
answers to both. Keys that OPT does not use are kept in `extra` and written back unchanged.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from optlens.activations import ACTIVATIONS, WITH_PARAMETERS
from optlens.labels import LabelFields

# name: (layers, d_model, heads, d_mlp, word_embed_proj_dim, pre-LN); from the OPT paper's table 1
# and the released configs.  350m alone is post-LN with 512-wide embeddings.
SIZES: dict[str, tuple[int, int, int, int, int, bool]] = {
    "125m": (12, 768, 12, 3072, 768, True),
    "350m": (24, 1024, 16, 4096, 512, False),
    "1.3b": (24, 2048, 32, 8192, 2048, True),
    "2.7b": (32, 2560, 32, 10240, 2560, True),
    "6.7b": (32, 4096, 32, 16384, 4096, True),
    "13b": (40, 5120, 40, 20480, 5120, True),
    "30b": (48, 7168, 56, 28672, 7168, True),
    "66b": (64, 9216, 72, 36864, 9216, True),
    "175b": (96, 12288, 96, 49152, 12288, True),
}

# The interpretability field's names, which a config answers to but is not made from.
FIELD_OF = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_model": "hidden_size",
    "d_mlp": "ffn_dim",
    "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "act_fn": "activation_function",
}


class ConfigError(ValueError):
    """A config value that no OPT can have."""


@dataclass(init=False)
class OPTConfig(LabelFields):
    """What an OPT looks like, in Hugging Face's field names and with its defaults (opt-125m).

    Unknown keyword arguments are kept in `extra` and written back by `to_dict`, as checkpoints
    carry stale keys; one that looks like a misspelt field warns. A classifier's `num_labels`,
    `id2label` and `problem_type` are kept there too, and read by those names.

    Attributes:
        vocab_size: Rows of the token embedding (`d_vocab`).
        hidden_size: Width of the residual stream (`d_model`).
        num_hidden_layers: Number of blocks (`n_layers`).
        ffn_dim: Neurons of each MLP (`d_mlp`).
        max_position_embeddings: Longest sequence (`n_ctx`); the table has two rows more.
        do_layer_norm_before: True for pre-LN; False for 350m's post-LN.
        word_embed_proj_dim: Width of the token embedding; `hidden_size` unless given.
        extra: Keys of `config.json` that OPT does not use.
        device: Where the model that carries this config has its weights.
        dtype: The dtype of that model's weights.

    Example:
        >>> OPTConfig.from_name("opt-350m").word_embed_proj_dim
        512
        >>> OPTConfig(hidden_size=64, num_attention_heads=4).d_head
        16
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    model_type = "opt"
    device = torch.device("cpu")
    dtype = torch.float32
    normalization_type = "LN"
    attn_only = False

    def __init__(self, /, **values: Any) -> None:
        """Take any of the fields by name; keep what is not a field in `extra`."""
        values = dict(values)
        extra = values.pop("extra", {})
        if not isinstance(extra, dict):
            raise ConfigError(f"extra must be a table of further keys, got {extra!r}.")
        self.extra = dict(extra)
        names = [f.name for f in fields(self) if f.name != "extra"]
        for name in names:
            setattr(self, name, values.pop(name, getattr(type(self), name)))
        for key, value in values.items():
            near = [FIELD_OF[key]] if key in FIELD_OF else None
            near = near or difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if near:
                warnings.warn(
                    f"{key!r} is not an OPT config field and is only kept as an extra key; "
                    f"did you mean {near[0]!r}?",
                    stacklevel=2,
                )
            self.extra[key] = value
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size
        self._check()

    def _check(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "ffn_dim",
            "max_position_embeddings",
            "num_attention_heads",
            "word_embed_proj_dim",
        ):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}.")
        for name in ("dropout", "attention_dropout", "layerdrop"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a probability in [0, 1], got {value!r}.")
        if not isinstance(self.init_std, int | float) or not self.init_std >= 0:
            raise ConfigError(f"init_std must be a number of at least 0, got {self.init_std!r}.")
        for switch in (f for f in fields(self) if isinstance(f.default, bool)):
            value = getattr(self, switch.name)
            if not isinstance(value, bool):
                raise ConfigError(f"{switch.name} must be true or false, got {value!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} "
                "heads; choose num_attention_heads that divides it."
            )
        name = self.activation_function
        if not isinstance(name, str) or name not in ACTIVATIONS:
            why = "has weights of its own" if name in list(WITH_PARAMETERS) else "is not known"
            raise ConfigError(
                f"activation_function {name!r} {why}; optlens has {', '.join(sorted(ACTIVATIONS))}."
            )
        pad = self.pad_token_id
        if pad is not None and not (_is_whole(pad) and -1 <= pad < self.vocab_size):
            raise ConfigError(
                f"pad_token_id must be a row of the vocabulary of {self.vocab_size}, got {pad!r}."
            )

    # ------------------------------------------------------------------ reading and writing

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OPTConfig:
        """Build a config from the contents of a `config.json`.

        Args:
            values: The JSON object. `model_type` may be absent, but if there must be "opt".

        Raises:
            ConfigError: If it is another architecture's config, or a value is impossible.
        """
        values = dict(values)
        model_type = values.pop("model_type", "opt")
        if model_type != "opt":
            raise ConfigError(
                f"This is the config of a {model_type!r} model; optlens reads OPT models only "
                "(model_type 'opt': facebook/opt-*, opt-iml-*, galactica-*)."
            )
        # `dtype`, `device` and `model_type` are facts of a running model, not fields: a stored
        # dtype is kept as an extra key.
        config = cls(**{key: value for key, value in values.items() if key != "extra"})
        if "extra" in values:  # a file's key of that name is one more that OPT does not use
            config.extra["extra"] = values["extra"]
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, `model_type` and the kept extra keys, as `config.json` has them."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**self.extra, **own, "model_type": self.model_type}

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> OPTConfig:
        """Return the config of a published size.

        Args:
            name: A size such as "opt-6.7b", "facebook/opt-6.7b" or "6.7b"; "opt-iml-1.3b" and
                "opt-iml-max-30b" have the shape of their base.
            **overrides: Fields to change.

        Raises:
            ConfigError: If no such size was published; the message lists those that were.
        """
        size = name.lower().rsplit("/", 1)[-1]
        for prefix in ("opt-iml-max-", "opt-iml-", "opt-"):
            size = size.removeprefix(prefix)
        if size not in SIZES:
            raise ConfigError(
                f"No OPT named {name!r} was published; known: "
                f"{', '.join('opt-' + known for known in SIZES)}."
            )
        layers, d_model, heads, d_mlp, embed_dim, pre_ln = SIZES[size]
        shape = {
            "num_hidden_layers": layers,
            "hidden_size": d_model,
            "num_attention_heads": heads,
            "ffn_dim": d_mlp,
            "word_embed_proj_dim": embed_dim,
            "do_layer_norm_before": pre_ln,
        }
        return cls(**{**shape, **overrides})

    # ------------------------------------------------------- the field's names, derived facts

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def n_heads(self) -> int:
        """Attention heads per block."""
        return self.num_attention_heads

    @property
    def n_key_value_heads(self) -> None:
        """None: every head of an OPT has its own keys and values."""
        return None

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.hidden_size

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def d_mlp(self) -> int:
        """Neurons per MLP."""
        return self.ffn_dim

    @property
    def d_vocab(self) -> int:
        """Rows of the token embedding and columns of the logits."""
        return self.vocab_size

    @property
    def n_ctx(self) -> int:
        """Longest sequence, in tokens."""
        return self.max_position_embeddings

    @property
    def act_fn(self) -> str:
        """Name of the MLP's activation function."""
        return self.activation_function

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a LayerNorm stands between the last block and the unembedding."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def has_projection(self) -> bool:
        """Whether embeddings are narrower or wider than the residual stream (350m)."""
        return self.word_embed_proj_dim != self.hidden_size

    def parameter_count(self) -> int:
        """Return the number of parameters; a tied embedding counts once.

        Example:
            >>> OPTConfig.from_name("opt-125m").parameter_count()
            125239296
        """
        d, mlp, embed = self.hidden_size, self.ffn_dim, self.word_embed_proj_dim
        layer_norm = 2 * d * self.layer_norm_elementwise_affine
        biases = (5 * d + mlp) * self.enable_bias
        block = 4 * d * d + 2 * d * mlp + biases + 2 * layer_norm
        embedding = self.vocab_size * embed * (1 if self.tie_word_embeddings else 2)
        total = embedding + (self.max_position_embeddings + 2) * d + self.num_hidden_layers * block
        if self.has_projection:
            total += 2 * embed * d
        return total + layer_norm * self.has_final_layer_norm


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
