"""A rehearsal of the GPU: runs on fake CUDA tensors, which have a device but no data.

Fake tensors raise when two devices meet and when code asks for values, so a mask or an index left
on the CPU, or a check that would wait for the device, is caught on a machine without a GPU.

Sweeps and generation plan on the host what they run, from tokens and masks that come from there:
they are rehearsed with a real CPU beside the fake GPU.
"""

import pytest
import torch
from conftest import tiny_config
from fake_gpus import FakeGpus, needs_cuda_build, on_fake_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

import optlens
from optlens import checks
from optlens.interventions import Ablate, Knockout, Patch, Scale, Steer
from optlens.metrics import cross_entropy, kl, logit_diff
from optlens.patching.sites import SITES

GPU = torch.device("cuda:0")


@pytest.fixture
def fake_gpu_model(variant):
    """A tiny model on a fake GPU, in the mode that it needs."""
    with FakeTensorMode(), torch.no_grad():
        yield on_fake_gpu(tiny_config(**variant))


def test_forward_and_everything_recorded_stay_on_the_device(fake_gpu_model):
    model = fake_gpu_model
    tokens = torch.ones(2, 7, dtype=torch.long, device="cuda:0")
    mask = torch.ones(2, 7, dtype=torch.long, device="cuda:0")
    for attention_mask in (None, mask):
        out = model(tokens, attention_mask=attention_mask)
        assert out.logits.device == torch.device("cuda:0")
        assert out.logits.shape == (2, 7, 101)
        logits, cache = model.run_with_cache(tokens, attention_mask=attention_mask)
        assert {value.device for value in cache.values()} == {torch.device("cuda:0")}
    assert model.config.device == torch.device("cuda:0")


def test_a_misplaced_weight_is_caught(fake_gpu_model):
    model = fake_gpu_model
    layer = model.decoder.layers[1]
    layer.fc1.weight = torch.nn.Parameter(torch.empty(layer.fc1.weight.shape, device="cpu"))
    with pytest.raises(RuntimeError, match=r"two different devices|cuda:0"):
        model(torch.ones(1, 5, dtype=torch.long, device="cuda:0"))


def test_half_precision_keeps_its_dtype():
    with FakeTensorMode(), torch.no_grad():
        model = on_fake_gpu(tiny_config(), torch.float16)
        tokens = torch.ones(1, 5, dtype=torch.long, device="cuda:0")
        logits, cache = model.run_with_cache(tokens)
    assert (
        logits.dtype == cache["pattern", 0].dtype == cache["resid_post", 1].dtype == torch.float16
    )
    assert cache["scale", 0, "ln1"].dtype == cache["normalized", 0, "ln1"].dtype == torch.float32


def test_checks_of_values_leave_fake_tensors_alone():
    with FakeTensorMode(), torch.no_grad():
        assert checks.on_host(torch.ones(3)) is None
    assert checks.on_host(torch.ones(3, device="meta")) is None
    assert checks.on_host(torch.ones(3)).tolist() == [1, 1, 1]


# ------------------------------------------------- sweeps and generation, beside a real CPU

CLEAN = torch.tensor([[2, 5, 6, 7, 8], [2, 9, 10, 11, 12]])
CORRUPT = torch.tensor([[2, 5, 20, 7, 8], [2, 9, 20, 11, 12]])
METRIC = logit_diff(5, 6)


@pytest.fixture
def fakes(monkeypatch):
    """Fake GPUs, of whose memory no driver is asked."""
    for user in ("optlens.recorder", "optlens.patching.budget"):
        monkeypatch.setattr(f"{user}.available_bytes", lambda device: None)
    with FakeGpus(), torch.no_grad():
        yield


def test_host_tensors_have_values_and_those_of_a_gpu_have_none(fakes):
    assert torch.tensor([3, 4]).cumsum(0).tolist() == [3, 7]
    there = torch.tensor([3, 4]).to(GPU)
    for value in (there, there + 1, there.cpu(), there.cpu().flip(0)):
        with pytest.raises(RuntimeError):
            bool(value[0] == 3)
    with pytest.raises(RuntimeError, match="same device|different devices"):
        there + torch.tensor([3, 4])


@pytest.mark.placement
@needs_cuda_build
@pytest.mark.parametrize("edits", [(), [Ablate("z", layer=1, head=2, mode="zero")]])
def test_a_recording_is_rehearsed_with_all_that_surrounds_it(fakes, edits):
    model = on_fake_gpu(tiny_config())
    recording = model.record(CLEAN, interventions=edits)
    assert recording.attention.device == torch.device("cpu")
    assert recording.attention.shape == (2, 2, 4, 5, 5)
    assert recording.tokens.tolist() == CLEAN.tolist()


def swept(model, site: str, over: tuple, metric=METRIC, **options):
    """Rehearse a sweep."""
    return optlens.patch_sweep(model, CLEAN, CORRUPT, site, over, metric, progress=False, **options)


@pytest.mark.placement
@needs_cuda_build
@pytest.mark.parametrize("site", [site for site in SITES if site != "embed"])
@pytest.mark.parametrize("at", ["layer", "pos"])
def test_sweeps_plan_on_the_host(fakes, site: str, at: str):
    model = on_fake_gpu(tiny_config(num_hidden_layers=3))
    over = ("layer", "pos") if at == "pos" else ("layer",)
    result = swept(model, site, over)
    assert result.values.shape == ((3, 5) if at == "pos" else (3,))
    assert result.metadata["clean"] == CLEAN.tolist()
    plan = swept(model, site, over, dry_run=True)
    # before the prompts differ nothing changes; what changes behind that, nobody can know here
    assert plan.runs <= 2 * 3 * (3 if at == "pos" else 1)


@pytest.mark.placement
@needs_cuda_build
def test_sweeps_of_other_shapes_plan_on_the_host(fakes, variant):
    model = on_fake_gpu(tiny_config(num_hidden_layers=3, **variant))
    assert swept(model, "embed", ("pos",)).values.shape == (5,)
    assert swept(model, "z", ("layer", "head"), kl(), window=3).values.shape == (3, 4)
    assert swept(model, "mlp_post", ("layer", "neuron"), cross_entropy()).values.shape == (3, 64)
    whole = swept(model, "pattern", ("layer", "head"), lambda logits: logits[:, -1].amax(-1))
    assert whole.values.shape == (3, 4)
    edited = swept(model, "q", ("layer", "pos"), interventions=[Scale("z", layer=1, factor=0.5)])
    assert edited.values.shape == (3, 5)


@pytest.mark.placement
@needs_cuda_build
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_ablations_plan_on_the_host(fakes, mode: str):
    model = on_fake_gpu(tiny_config(num_hidden_layers=3))
    reference = None if mode == "zero" else CORRUPT
    result = optlens.ablate_sweep(
        model, CLEAN, mode=mode, reference=reference, metric=METRIC, progress=False
    )
    assert result.values.shape == (3, 4)


@pytest.mark.placement
@needs_cuda_build
def test_knockouts_plan_on_the_host(fakes):
    model = on_fake_gpu(tiny_config(num_hidden_layers=3))
    assert optlens.knockout_sweep(model, CLEAN, METRIC, progress=False).values.shape == (3, 5)


@pytest.mark.placement
@needs_cuda_build
def test_a_fixed_number_of_steps_is_decoded(fakes):
    model = on_fake_gpu(tiny_config())
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    edits = [
        Knockout(query=-1, key=1),
        Steer(layer=1, vector=torch.ones(32), scale=2.0, start=0),
        Patch("resid_post", layer=0, pos=-1, value=torch.zeros(32)),
    ]
    for options in ({}, {"attention_mask": mask}, {"interventions": edits}):
        written = model.generate(CLEAN, 6, stop_at_eos=False, **options)
        assert written.shape == (2, 11) and written.device == GPU
