"""What every test shares: tolerances with their reasons, tiny configurations of every variant, random models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from browser_pages import browser  # noqa: F401  (a fixture of all tests of pages)

if TYPE_CHECKING:
    from optlens.base import OPTBase
    from optlens.config import OPTConfig
    from optlens.model import OPTForCausalLM

# Test models are tiny: waking a second thread for a product costs more than it saves.
torch.set_num_threads(1)

# The one table of tolerances. Use as `torch.testing.assert_close(ours, theirs, **TOL[dtype])`. Values compared are of
# order 1 to 10 (tiny models with all parameters random), so atol is relative to the largest value in effect.
TOL: dict[torch.dtype, dict[str, float]] = {
    # 2**-53 rounding over a few hundred operations leaves about 1e-14; a wrong formula shows far above 1e-10.
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    # 2**-24 rounding; other orders of summation in fused attention and matrix products reach a few 1e-6.
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # 11 significant bits, 2**-11 = 5e-4 for each rounding, some ten roundings in a row in two layers.
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    # 8 significant bits, 2**-8 = 4e-3 for each rounding, likewise.
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
}

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
}

# Every architectural switch of OPT that a published checkpoint uses, one at a time.
VARIANTS: dict[str, dict[str, Any]] = {
    "pre_ln": {},
    "post_ln_350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "no_final_ln": {"_remove_final_layer_norm": True},
    "no_bias": {"enable_bias": False},
    "no_affine": {"layer_norm_elementwise_affine": False},
    "gelu": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
    "pre_ln_proj": {"word_embed_proj_dim": 16},
}


def tiny_config(**overrides: Any) -> OPTConfig:
    """Return a configuration small enough for hundreds of models in one test run."""
    from optlens.config import OPTConfig

    return OPTConfig(**{**TINY, **overrides})


def random_model(
    config: OPTConfig,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    kind: type[OPTBase] | None = None,
) -> OPTForCausalLM:
    """Build a model (an `OPTForCausalLM`, or of a kind) in eval mode in which no parameter is trivially 0 or 1.

    Fresh models have biases of 0 and LayerNorm gains of 1, which hides an omitted bias or gain. The numbers are drawn in
    float64 and then rounded, so one seed gives the same model in every dtype.
    """
    from optlens.model import OPTForCausalLM

    model = (kind or OPTForCausalLM)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("bias"):
                noise = 0.2 * noise
            elif parameter.dim() == 1:  # a LayerNorm gain
                noise = 1 + 0.3 * noise
            elif "embed_tokens" in name or "embed_positions" in name:
                noise = 0.5 * noise
            else:
                noise = noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(noise)
    return model.to(dtype).eval()


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every entry of VARIANTS in turn, as overrides for `tiny_config`."""
    return VARIANTS[request.param]


@pytest.fixture
def tiny_model() -> OPTForCausalLM:
    """A random pre-LN model of two layers in float32."""
    return random_model(tiny_config())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def padded(lengths: list[int], left: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random prompts of some lengths as one batch, `[prompt, pos]`, and its mask."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 101, (len(lengths), longest), generator=generator)
    place = torch.arange(longest)
    mask = torch.stack([place >= longest - n if left else place < n for n in lengths])
    return tokens, mask.long()
