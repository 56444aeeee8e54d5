"""Everything that touches a device, done on one: on the CPU in every test run, on a GPU by `pytest -m gpu`.

The bodies are the same, so what a GPU will be asked is known to be right before there is one. What
comes out is compared with float64 on the CPU, or with the slow way of doing the same on the device.
"""

from pathlib import Path

import pytest
import torch
from conftest import padded, random_model, tiny_config
from patching.naive import naive_sweep
from torch import Tensor
from twins import twin_of

import optlens
from optlens import OPTForCausalLM, checks, demo
from optlens.interventions import Ablate, Knockout, Steer
from optlens.metrics import kl, logit_diff

ON_GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
TOKENS, MASK = padded([9, 5, 7], left=True, seed=3)
METRIC = logit_diff(5, 6)
# Roundings of 2**-53, 2**-24, 2**-11 and 2**-8 that add up over three blocks, in any order of sums.
NEAR = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and under `-m gpu` the first GPU."""
    return torch.device(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU, for what has no meaning elsewhere."""
    return torch.device("cuda")


def model_on(device: torch.device, dtype=torch.float32, **changes) -> OPTForCausalLM:
    """Return a random model on a device, the same one in every dtype."""
    return random_model(tiny_config(num_hidden_layers=3, **changes), dtype).to(device)


def near(found: Tensor, expected: Tensor, dtype=torch.float32) -> None:
    """Compare with what another device or a wider dtype gave, relative to the largest number."""
    found, expected = found.cpu().double(), expected.cpu().double()
    largest = float(expected.nan_to_num(neginf=0.0).abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=NEAR[dtype] * largest)


# ---------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_are_those_of_float64(device, variant, dtype):
    """Products in TF32, which torch leaves off unless asked, would be off by 1e-3."""
    with torch.no_grad():
        expected = model_on(torch.device("cpu"), torch.float64, **variant)(TOKENS, MASK).logits
        found = model_on(device, dtype, **variant)(TOKENS, MASK).logits
    assert found.device.type == device.type and found.dtype == dtype
    near(found[MASK.bool().to(device)], expected[MASK.bool()], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_near_and_finite_where_every_key_is_hidden(device, dtype):
    with torch.no_grad():
        expected = model_on(torch.device("cpu"), torch.float64)(TOKENS, MASK).logits
        found = model_on(device, dtype)(TOKENS, MASK, output_attentions=True)
    assert bool(found.logits.isfinite().all())
    assert not found.attentions[0][1, :, 0].any()  # a query that is padding on the left
    near(found.logits[MASK.bool().to(device)], expected[MASK.bool()], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits_are_those_of_transformers_on_this_device(device, dtype):
    ours = model_on(device, dtype)
    theirs = twin_of(ours).to(device)
    with torch.no_grad():
        expected = theirs(TOKENS.to(device), attention_mask=MASK.to(device)).logits
        found = ours(TOKENS, MASK).logits
    real = MASK.bool().to(device)
    near(found[real], expected[real], dtype)


def test_text_and_loss_of_a_loaded_checkpoint(device):
    model, expected = optlens.load(device=device), optlens.load(device="cpu")
    texts = ["The capital of France is Paris.", "One two three one two"]
    near(model.loss(texts), expected.loss(texts))
    assert model.device.type == device.type


def test_gradients(device):
    loss = []
    for place in (device, torch.device("cpu")):
        model = model_on(place)
        model.loss(TOKENS, attention_mask=MASK).backward()
        loss.append(model.decoder.layers[0].fc1.weight.grad)
    near(*loss)


# -------------------------------------------------------------------------------- recording


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pos": [0, -1], "heads": [1, 3], "layers": [0, 2]},
        {"dtype": torch.float16},
        {"device": "where it ran"},
    ],
    ids=["all", "part", "narrower", "kept there"],
)
def test_a_recording_holds_what_the_hooks_gave(device, options):
    model = model_on(device)
    kept_on = device if options.get("device") else torch.device("cpu")
    options = options | ({"device": device} if options.get("device") else {})
    what = ("attention", "residual", "z", "mlp_post")
    recording = model.record(TOKENS, what=what, attention_mask=MASK, **options)
    whole = model_on(torch.device("cpu")).record(TOKENS, what=what, attention_mask=MASK, **options)
    for name in ("attention", "residual", "z", "mlp_post"):
        found = getattr(recording, name) if name in what[:2] else recording[name]
        expected = getattr(whole, name) if name in what[:2] else whole[name]
        assert found.device.type == kept_on.type
        near(found, expected, torch.float16 if "dtype" in options else torch.float32)
    near(recording.logits, whole.logits, torch.float16 if "dtype" in options else torch.float32)


def test_a_lens_is_that_of_the_cpu(device):
    lens = model_on(device).record(TOKENS[:1], what="logit_lens").logit_lens(top_k=3)
    expected = model_on(torch.device("cpu")).record(TOKENS[:1], what="logit_lens").logit_lens(3)
    near(lens.top_probs, expected.top_probs)
    near(lens.kl, expected.kl)


def test_what_is_not_finite_is_named(device):
    model = model_on(device)
    with torch.no_grad():
        model.decoder.layers[1].fc2.weight[0, 0] = torch.inf
    with pytest.raises(checks.NonFiniteError, match="block 1"):
        model.record(TOKENS, attention_mask=MASK)


@ON_GPU
def test_recording_waits_for_nothing_while_the_model_runs(gpu, monkeypatch):
    """With one prompt or several, with all or some positions, in the model's dtype or a narrower."""
    from optlens.recorder import Recorder

    model, keep = model_on(gpu), Recorder.keep

    def watched(self, value, hook):
        torch.cuda.set_sync_debug_mode("error")
        try:
            keep(self, value, hook)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model.record(TOKENS, pos=[0, -1], heads=[1])  # small tables move to the GPU when first used
    monkeypatch.setattr(Recorder, "keep", watched)
    for tokens in (TOKENS, TOKENS[0]):
        for dtype in (None, torch.float16):
            assert model.record(tokens, dtype=dtype).residual.is_pinned()


@ON_GPU
def test_pinned_copies_hold_what_was_computed_before_it_was_overwritten(gpu):
    """A hook function that edits in place comes after the copy was ordered, not after it was made."""
    model = random_model(tiny_config(hidden_size=512, ffn_dim=2048, num_hidden_layers=6)).to(gpu)
    tokens = torch.randint(3, 101, (8, 60))
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(6)]
    _, cache = model.run_with_cache(tokens, names)
    for _ in range(5):
        recording = model.record(tokens, what=("residual",))
        for layer, name in enumerate(names):
            assert torch.equal(recording.residual[:, layer], cache[name].cpu())


# ---------------------------------------------------------------- interventions and sweeps


def test_interventions_are_those_of_the_cpu(device):
    edits = [
        Ablate("z", layer=1, head=2, mode="mean", reference=TOKENS[:1]),
        Knockout(layers=0, query=-1, key=1),
        Steer(layer=2, vector=torch.ones(32), scale=2.0),
    ]
    found, expected = (
        model_on(place).record(TOKENS, attention_mask=MASK, interventions=edits).residual
        for place in (device, torch.device("cpu"))
    )
    real = MASK.bool()
    near(found.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@pytest.mark.parametrize(
    ("site", "over"),
    [("resid_pre", ("layer", "pos")), ("z", ("layer", "head")), ("pattern", ("layer", "head"))],
)
def test_sweeps_equal_one_forward_pass_per_patch(device, site, over):
    model = model_on(device)
    clean, corrupt = TOKENS[:1], TOKENS[:1].clone()
    corrupt[:, 4] = 20
    found = optlens.patch_sweep(model, clean, corrupt, site, over, METRIC, progress=False)
    columns = torch.arange(clean.shape[1])[None]
    slow = naive_sweep(
        model, corrupt.to(device), clean.to(device), None, site, over,
        lambda logits: logits[:, -1, 5] - logits[:, -1, 6], columns,
    )  # fmt: skip
    near(found.values, torch.as_tensor(slow).reshape(found.values.shape))


def result_on(device: torch.device, kind: str) -> Tensor:
    """Make one result of each kind of experiment."""
    model, pair = model_on(device), (TOKENS[:1], TOKENS[:1].clone())
    pair[1][:, 4] = 20
    if kind == "ablation":
        return optlens.ablate_sweep(
            model, TOKENS[:1], reference=TOKENS[:1] + 1, metric=METRIC, progress=False
        ).values
    if kind == "kl":
        return optlens.patch_sweep(model, *pair, "mlp_out", "layer", kl(), progress=False).values
    if kind == "knockout":
        return optlens.knockout_sweep(model, TOKENS[:1], METRIC, progress=False).values
    if kind == "path":
        options = {"senders": "heads", "receivers": "final", "progress": False}
        return optlens.path_patch(model, *pair, metric=METRIC, **options).values
    if kind == "trace":
        return optlens.causal_trace(model, TOKENS[:1], (2, 3), METRIC, progress=False).values
    if kind == "attribution":
        return optlens.attribution_patch(model, *pair, "z", ("layer", "head"), METRIC).values
    if kind == "edges":
        return optlens.edge_attribution(model, *pair, METRIC).scores
    return optlens.token_attribution(model, TOKENS[:1], METRIC, steps=4).values


@pytest.mark.parametrize(
    "kind", ["ablation", "kl", "knockout", "path", "trace", "attribution", "edges", "tokens"]
)
def test_experiments_are_those_of_the_cpu(device, kind):
    near(result_on(device, kind), result_on(torch.device("cpu"), kind))


# ------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"stop_at_eos": False}], ids=str)
def test_decoding_writes_what_the_cpu_writes(device, options):
    left, mask = TOKENS, MASK
    found, expected = (
        model_on(place).generate(left, 8, attention_mask=mask, **options)
        for place in (device, torch.device("cpu"))
    )
    assert found.device.type == device.type
    assert found.tolist() == expected.tolist()


def test_decoding_equals_whole_passes(device):
    model, text = model_on(device), TOKENS[:1].to(device)
    written = model.generate(text, 6, stop_at_eos=False)
    with torch.no_grad():
        for _ in range(6):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    assert written.tolist() == text.tolist()


def test_a_seed_draws_the_same_again(device):
    model = model_on(device)
    first, again = (model.generate(TOKENS[:1], 8, temperature=1.0, seed=7) for _ in range(2))
    assert first.tolist() == again.tolist()


def test_a_generation_is_recorded(device):
    model = model_on(device)
    written = model.generate(TOKENS[:1], 5, stop_at_eos=False, record=("residual", "attention"))
    whole = model.record(written.sequences, what=("residual", "attention"))
    near(written.recording.residual, whole.residual)
    near(written.recording.attention, whole.attention)


# ----------------------------------------------------------------------------------- loading


def test_a_streamed_model_is_the_resident_one(device):
    resident = optlens.load(demo.path(), device=device, dtype="float32")
    streamed = optlens.load(demo.path(), device=device, dtype="float32", device_map="stream")
    prompt = "When Mary and John went to the store, John gave a drink to"
    near(streamed.record(prompt).residual, resident.record(prompt).residual)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_models_run_with_every_hook(device, kind):
    model = optlens.load(demo.path(), device=device, dtype="bfloat16", quantize=kind)
    expected = optlens.load(demo.path(), device="cpu", dtype="float32")
    prompt = "When Mary and John went to the store, John gave a drink to"
    logits, cache = model.run_with_cache(prompt)
    assert {value.device.type for value in cache.values()} == {device.type}
    assert logits[0, -1].argmax().item() == expected(prompt).logits[0, -1].argmax().item()


def test_a_model_goes_and_comes_back(device, tmp_path: Path):
    model = model_on(device)
    model.save_pretrained(tmp_path)
    again = optlens.load(tmp_path, device=device)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@ON_GPU
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_plan_covers_what_the_gpu_then_holds(gpu, dtype):
    """Within 5 %, beside what cuBLAS keeps for itself."""
    config = optlens.OPTConfig.from_name("125m")
    model = OPTForCausalLM(config).eval().to(gpu, getattr(torch, dtype))
    tokens = torch.randint(4, 50265, (1, 512), device=gpu)
    with torch.no_grad():
        model(tokens)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(tokens)
    planned = optlens.plan(config, device={"cuda:0": "80GB"}, dtype=dtype, prompt_length=512).total
    held, workspace = torch.cuda.max_memory_allocated(), 64 * 2**20
    assert 0.95 * planned - workspace < held < 1.05 * planned + workspace
