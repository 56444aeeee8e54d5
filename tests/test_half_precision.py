"""float16 and bfloat16 on the CPU, against float32; what is summed over many terms is summed in float32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOL, VARIANTS, random_model, tiny_config

import optlens
from optlens.attention_mask import AttentionMask
from optlens.config import OPTConfig
from optlens.model import LayerNorm, OPTAttention

PACKAGE = Path(optlens.__file__).parent
HALF = [torch.float16, torch.bfloat16]
TOKENS = torch.tensor([[2, 5, 9, 33, 71, 100, 4], [1, 1, 1, 2, 12, 3, 60]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("listened", [False, True])
@torch.no_grad()
def test_layer_norm_is_computed_in_float32(dtype: torch.dtype, listened: bool):
    """In float16 the squares of these inputs would be infinite, and their sum in bfloat16 rough."""
    norm = LayerNorm(OPTConfig(hidden_size=4096, num_attention_heads=64), "ln_final")
    torch.manual_seed(0)
    x = (300 * torch.randn(5, 4096) + 200).to(dtype)
    norm.weight.copy_(1 + 0.1 * torch.randn(4096))
    norm = norm.to(dtype)
    shown = []
    if listened:
        norm.hook_scale.add_recorder(lambda value, hook: shown.append(value))
    found = norm(x)
    if listened:
        scale = x.float().std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(shown[0], scale, rtol=1e-5, atol=0)  # which checks the dtype
    expected = torch.nn.functional.layer_norm(
        x.float(), (4096,), norm.weight.float(), norm.bias.float()
    )
    assert found.dtype == dtype
    # one rounding, of the result
    torch.testing.assert_close(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("listened", [False, True])
@torch.no_grad()
def test_softmax_is_computed_in_float32(dtype: torch.dtype, listened: bool):
    """2,048 equal terms: summed one by one in bfloat16 they make 256, in float16 2,048 by luck alone."""
    attention = OPTAttention(OPTConfig(hidden_size=64, num_attention_heads=1), 0)
    n_key = 2000
    for parameter in attention.parameters():
        parameter.zero_()
    attention.v_proj.bias.fill_(1.0)
    attention = attention.to(dtype).eval()
    patterns = []
    if listened:
        attention.hook_pattern.add_recorder(lambda value, hook: patterns.append(value))
    z = []
    attention.hook_z.add_recorder(lambda value, hook: z.append(value))
    x = torch.zeros(1, n_key, 64, dtype=dtype)
    attention(x, x, x, AttentionMask(None, 1, n_key, n_key, x.device), None, False)
    torch.testing.assert_close(z[0], torch.ones_like(z[0]), rtol=0.01, atol=0)
    if listened:
        last = patterns[0][0, 0, -1].float()
        torch.testing.assert_close(last, torch.full_like(last, 1 / n_key), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_rows_that_see_nothing_are_finite(dtype: torch.dtype, name: str):
    model = random_model(tiny_config(**VARIANTS[name]), dtype)
    plain = model(TOKENS, attention_mask=MASK).logits
    listened, cache = model.run_with_cache(TOKENS, attention_mask=MASK)
    assert plain.isfinite().all() and listened.isfinite().all()
    for layer in range(2):
        assert (cache["pattern", layer][1, :, :3] == 0).all()
        assert (cache["z", layer][1, :3] == 0).all()
    real = MASK.bool()
    difference = (listened[real] - plain[real]).norm() / plain[real].norm()
    assert difference < TOL[dtype]["rtol"]  # the two ways round at other places
    _, fused = model.run_with_cache(
        TOKENS, attention_mask=MASK, names_filter="blocks.0.attn.hook_z"
    )
    assert (fused["z", 0][1, :3] == 0).all()


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_padding_changes_half_precision_by_rounding_only(dtype: torch.dtype):
    model = random_model(tiny_config(), dtype)
    alone = model(TOKENS[1:, 3:]).logits
    padded = model(TOKENS, attention_mask=MASK).logits[1:, 3:]
    torch.testing.assert_close(padded, alone, **TOL[dtype])


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_errors_stay_small_in_every_layer_of_the_demo(dtype: torch.dtype):
    full = optlens.load(device="cpu")
    half = optlens.load(device="cpu", dtype=dtype)
    prompt = "When Mary and John went to the store, John gave a drink to"
    names = [name for name in full.hook_dict if name.endswith(("resid_post", "attn_out", "hook_z"))]
    logits, expected = full.run_with_cache(prompt, names_filter=names)
    half_logits, found = half.run_with_cache(prompt, names_filter=names)
    assert {value.dtype for value in found.values()} == {dtype}
    # some ten roundings in a row in each of five layers, of 2**-11 or 2**-8 each
    for name, value in expected.items():
        error = (found[name].float() - value).norm() / value.norm()
        assert error < TOL[dtype]["rtol"], name
    assert torch.equal(half_logits.argmax(-1), logits.argmax(-1))


def test_tf32_is_left_as_it_is():
    """PyTorch's defaults: full float32 in products. Who wants TF32 asks PyTorch."""
    code = (
        "import torch, optlens; model = optlens.load(); model.record('The cat'); "
        "print(torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["False", "highest"]
    torch.set_float32_matmul_precision("high")
    optlens.load()
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    setters = ("allow_tf32 =", "fp32_precision =", "set_float32_matmul_precision(")
    for file in PACKAGE.rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not any(name in line for name in setters) or line.strip().startswith("`"), file
