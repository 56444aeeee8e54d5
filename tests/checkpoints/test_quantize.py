import copy
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import IDS, make
from conftest import tiny_config
from torch import nn

import optlens
from optlens import demo, logit_math
from optlens.checkpoints import CheckpointError, load_model
from optlens.model import OPTForCausalLM
from optlens.quantized import is_quantized
from optlens.recording import fingerprint
from optlens.weights import effective_weight

KINDS = ["int8", "nf4"]
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
# int8 rounds a row's weights to half a step of 1/127 of the largest. The levels of NF4 are at most
# 0.304 of a block's largest weight apart (-1 and -0.696), so it rounds by 0.152 of that.
WEIGHT_ERROR = {"int8": 0.5 / 127, "nf4": 0.153}
# The divergence from float32 on the demo's own kind of prompts, in nats, with a margin of three.
MOST_KL = {"int8": 0.01, "nf4": 0.1}


def load(folder: Path, **options) -> OPTForCausalLM:
    return load_model(OPTForCausalLM, folder, device="cpu", **options)


@pytest.fixture(scope="module")
def full() -> OPTForCausalLM:
    return load(demo.path())


@pytest.fixture(scope="module", params=KINDS)
def quantized(request) -> OPTForCausalLM:
    model = load(demo.path(), quantize=request.param)
    model.kind = request.param
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_the_blocks_matrices_are_replaced_and_nothing_else(tmp_path: Path, kind, dtype, variant):
    folder = make(tmp_path, tiny_config(**variant), layout="sharded")
    ours, plain = load(folder, quantize=kind, dtype=dtype), load(folder, dtype=dtype)
    for name, module in plain.named_modules():
        found = ours.get_submodule(name)
        in_block = ".layers." in name and isinstance(module, nn.Linear)
        assert is_quantized(found) == in_block, name
        if not in_block:
            assert type(found) is type(module)
            for parameter, own in module.named_parameters(recurse=False):
                assert torch.equal(own, getattr(found, parameter))
        elif module.bias is not None:
            assert torch.equal(found.bias, module.bias) and found.bias.dtype == dtype
    logits = ours(IDS).logits
    assert logits.dtype == dtype and logits.isfinite().all()


@torch.no_grad()
def test_logits_are_near_those_of_float32(quantized, full):
    reference, logits = (model(CLEAN).logits for model in (full, quantized))
    assert 0 < logit_math.kl_divergence(reference, logits).mean() < MOST_KL[quantized.kind]


def test_weights_read_as_what_their_codes_stand_for(quantized, full):
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"):
        ours, expected = getattr(quantized, name), getattr(full, name)
        assert ours.shape == expected.shape and ours.dtype == torch.float32
        error = (ours - expected).abs().max() / expected.abs().max()
        assert 0 < error <= WEIGHT_ERROR[quantized.kind] * 1.01, name
    assert torch.equal(quantized.W_E, full.W_E) and torch.equal(quantized.b_in, full.b_in)


@torch.no_grad()
def test_modules_multiply_by_what_is_read(quantized):
    """Also after a run, when bitsandbytes may have moved or rearranged its codes."""
    torch.manual_seed(0)
    quantized(CLEAN)
    fc2 = quantized.decoder.layers[1].fc2
    weight = effective_weight(fc2)
    x = torch.randn(3, 9, weight.shape[1])
    expected = nn.functional.linear(x, weight, fc2.bias)
    error = (fc2(x) - expected).abs().max() / expected.abs().max()
    # int8 rounds its inputs, too
    assert error < (0.02 if quantized.kind == "int8" else 1e-5)
    assert torch.equal(effective_weight(fc2), weight)


@torch.no_grad()
def test_every_hook_fires_and_edits(quantized):
    names = list(quantized.hook_dict)
    logits, cache = quantized.run_with_cache(CLEAN, names_filter=names)
    assert set(cache) == set(names)
    for site in ("attn.hook_q", "attn.hook_z", "attn.hook_result", "hook_q_input", "mlp.hook_post"):
        edited = quantized.run_with_hooks(
            CLEAN, fwd_hooks=[(f"blocks.2.{site}", lambda x, hook: x.roll(1, -1))]
        )
        assert (edited - logits).abs().max() > 0.01, site
    total = cache["result", 1].sum(2) + quantized.b_O[1]
    error = (total - cache["attn_out", 1]).abs().max() / total.abs().max()
    assert error < (0.03 if quantized.kind == "int8" else 1e-5)  # int8 rounds z, too


def test_gradients_flow_to_activations(quantized, full):
    _, ours = quantized.run_with_cache(CLEAN, return_type="loss", incl_bwd=True)
    _, expected = full.run_with_cache(CLEAN, return_type="loss", incl_bwd=True)
    a, b = (c["blocks.0.hook_resid_pre_grad"].flatten() for c in (ours, expected))
    assert torch.cosine_similarity(a, b, dim=0) > 0.9


def test_recording_sweeps_and_attribution_run(quantized, full):
    metric = optlens.metrics.logit_diff(" Mary", " John")
    results = [
        optlens.patch_sweep(m, CLEAN, CORRUPT, "z", ("layer", "head"), metric, progress=False)
        for m in (full, quantized)
    ]
    pair = torch.stack([result.values.flatten() for result in results])
    assert torch.corrcoef(pair)[0, 1] > 0.97
    rec = quantized.record(CLEAN)
    assert rec.metadata["fingerprint"] == fingerprint(quantized)
    estimate = optlens.attribution_patch(quantized, CLEAN, CORRUPT, metric=metric)
    assert estimate.values.isfinite().all()


def test_gradients_pass_outliers_of_half_precision(tmp_path: Path):
    """On the CPU bitsandbytes writes into a float16 input that has some, and restores it."""
    model = load(make(tmp_path), dtype="float16", quantize="int8")
    linear, x = model.decoder.layers[0].fc1, torch.ones(1, 3, 32, dtype=torch.float16)
    x = x.index_fill(-1, torch.tensor([4]), 50.0).requires_grad_()
    (linear(x.clone().square().sqrt()).sum()).backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_fingerprints_know_the_weights(quantized, full):
    found = fingerprint(quantized)
    again = load(demo.path(), quantize=quantized.kind)
    assert found == fingerprint(again) == fingerprint(copy.deepcopy(again)) != fingerprint(full)
    again(CLEAN)
    assert found == fingerprint(again)  # running it changes nothing
    weight = again.decoder.layers[0].fc1.weight
    weight.data[: len(weight) // 4] = 3
    assert fingerprint(again) != found


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_know_the_scales(tmp_path: Path, kind: str):
    """Doubled weights have the same codes."""
    model = load(make(tmp_path), quantize=kind)
    found = fingerprint(model)
    weight = model.decoder.layers[0].fc1.weight
    scales = weight.SCB if kind == "int8" else weight.quant_state.absmax
    scales.mul_(2)
    assert fingerprint(model) != found


def test_the_summary_says_how_weights_are_kept(quantized, full, capsys):
    quantized.summary()
    printed = capsys.readouterr().out
    bits = {"int8": "8 bits (LLM.int8())", "nf4": "4 bits (NF4)"}[quantized.kind]
    assert f"weights: the blocks' matrices in {bits} by bitsandbytes" in printed
    full.summary()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] in printed  # the same parameters are counted
    size = {"int8": "262.1 kB", "nf4": "131.1 kB"}[quantized.kind]
    assert f"decoder.layers.L.fc1.weight                   1024 x 256  {size}" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_saving_is_refused(tmp_path: Path, kind: str):
    model = load(make(tmp_path), quantize=kind)
    with pytest.raises(CheckpointError, match="Keep the checkpoint that it was loaded from"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "not one of 'int8', 'nf4' or None"),
        ({"quantize": "fp16"}, 'give dtype="bfloat16"'),
        ({"quantize": "int8", "device_map": "stream"}, "Choose one of the two"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options, message: str):
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path), **options)
    with pytest.raises(ValueError, match="Choose one of the two"):
        load_model(
            OPTForCausalLM,
            tmp_path,
            quantize="nf4",
            device_map={"": "cpu", "decoder.layers.1": "disk"},
        )


@torch.no_grad()
def test_a_device_map_may_quantize(tmp_path: Path):
    folder = make(tmp_path)
    model = load_model(OPTForCausalLM, folder, device_map={"": "cpu"}, quantize="int8")
    assert torch.equal(model(IDS).logits, load(folder, quantize="int8")(IDS).logits)
    assert str(model.placement).endswith("8 bits (LLM.int8()) by bitsandbytes")
    with pytest.raises(CheckpointError, match="A quantised model is not saved"):
        model.save_pretrained(tmp_path / "copy")


def test_a_missing_bitsandbytes_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        CheckpointError, match=r"needs the package bitsandbytes.*optlens\[quantize\]"
    ):
        load(Path("nowhere"), quantize="int8")


@torch.no_grad()
def test_bitsandbytes_says_nothing_at_every_product(tmp_path: Path, caplog):
    model = load(make(tmp_path), quantize="int8")
    caplog.clear()
    model(IDS)
    assert caplog.records == []
