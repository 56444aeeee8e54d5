"""Placing on several devices: rehearsed on fake GPUs, which have a device but no data, and run with "disk"."""

from pathlib import Path

import pytest
import torch
from checkpoint_folders import IDS, make
from conftest import tiny_config
from fake_gpus import FakeGpus, needs_cuda_build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import optlens
from optlens import capture, demo, neurons
from optlens.checkpoints import CheckpointError, load_model, placement
from optlens.checkpoints.arrangement import Demand, balanced, spell_out
from optlens.checkpoints.device_map import (
    Placement,
    check_device_map,
    check_together,
    dispatch,
    resolve,
    units_of,
)
from optlens.checkpoints.empty import empty_model
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.matching import places_of
from optlens.checkpoints.read import Weights
from optlens.config import OPTConfig
from optlens.footprint import module_bytes
from optlens.interventions import Ablate, Patch, Scale, Steer
from optlens.model import OPTForCausalLM
from optlens.patching.sites import SITES
from optlens.recorder import Recorder
from optlens.recording import fingerprint

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
TOKENS = torch.tensor([[2, 5, 6, 9], [2, 5, 7, 9]]), torch.tensor([[2, 8, 6, 9], [2, 8, 7, 9]])
METRIC = optlens.metrics.logit_diff(" Mary", " John")
METRIC_OF_IDS = optlens.metrics.logit_diff(7, 8)


def load(folder: Path, **options) -> OPTForCausalLM:
    return load_model(OPTForCausalLM, folder, **options)


# ------------------------------------------------------------------ dividing


def test_auto_follows_the_plan(tmp_path: Path, monkeypatch):
    """The same parts on the same devices, in the same dtype, as `optlens.plan` says beforehand."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = make(tmp_path, tiny_config(num_hidden_layers=6), dtype=torch.float16)
    config = tiny_config(num_hidden_layers=6)
    places = places_of(empty_model(OPTForCausalLM, config))
    weights = Weights(find_layout(folder))
    pos = config.n_ctx
    full = optlens.plan(folder, device={"cpu": "1GB"}, dtype="float16", prompt_length=pos)
    run, blocks = full.total - full.weights, full.weights
    for rooms in (
        {"cuda:0": 2 * full.total, "cpu": 1000},
        {"cuda:0": run + blocks, "cuda:1": run + blocks, "cpu": 1000},
        {"cuda:0": run + 2 * blocks // 3, "cpu": 10 * full.total},
        {"cpu": 10 * full.total},
        {"cpu": int(1.2 * full.total)},
        {"cpu": run + 3 * blocks // 4},
    ):
        gpus = [device for device in rooms if device != "cpu"]
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: len(gpus))
        monkeypatch.setattr(placement, "available_bytes", rooms.__getitem__)
        stored = {name: name for name in places}
        found = resolve("auto", places, stored, weights, config, None)
        planned = optlens.plan(folder, device=rooms, prompt_length=pos)
        assert found.dtype == planned.dtype
        if planned.arrangement.kind == "stream":
            assert found.devices is None and str(found.device) in planned.arrangement.weights
        else:
            parts = [f"model.{unit}" if "decoder" in unit else unit for unit in found.devices]
            expected = spell_out(planned.arrangement.device_map, parts)
            assert list(found.devices.values()) == list(expected.values())


def test_what_fits_nowhere_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(placement, "available_bytes", lambda device: 10_000)
    with pytest.raises(CheckpointError, match="fit nowhere: they need .* more on cpu"):
        load(make(tmp_path), device_map="auto")


def test_the_parts_of_350m_whose_outputs_are_added_stay_together():
    config = OPTConfig.from_name("350m")
    modules = module_bytes(config, 2)
    gpus = {f"cuda:{n}": 2**40 for n in range(4)}
    found = balanced(Demand(modules, 0, 0, 0, tied=True), list(gpus), gpus)
    check_together(spell_out(found.device_map, [n.removeprefix("model.") for n in modules]), True)


def test_the_longest_prefix_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    units = list(units_of(places_of(empty_model(OPTForCausalLM, tiny_config()))))
    found = spell_out(
        {"": "cpu", "model.decoder.layers": 1, "decoder.layers.1": "cuda:0", "lm_head": "disk"},
        units,
    )
    assert found["decoder.layers.0"] == "cuda:1" and found["decoder.layers.1"] == "cuda:0"
    assert found["lm_head"] == "disk" and found["decoder.final_layer_norm"] == "cpu"
    eleven = {"": "cpu", "decoder.layers.1": 1}
    units = list(
        units_of(places_of(empty_model(OPTForCausalLM, tiny_config(num_hidden_layers=12))))
    )
    assert spell_out(eleven, units)["decoder.layers.11"] == "cpu"  # 11 does not begin with block 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decoder.layers": "cpu"}, "says nothing of 'decoder.embed_tokens'"),
        ({"": "cpu", "decoder.layers.7": "disk"}, "'decoder.layers.7', which is no part"),
        ({"": "cpu", "decoder.layers.0.fc1": "disk"}, "no part that is placed whole"),
        ({"": "cpu", "decoder.layers.0": "cuda:9"}, "PyTorch sees 0 CUDA devices"),
        ({"": "cpu", "decoder.embed_positions": "disk"}, "divides the embeddings"),
        ({"": "disk"}, "puts the embeddings on .disk."),
        ({"": "cpu", "lm_head": "disk"}, "lm_head is the embedding itself"),
        ({"": "cpu", 3: "cpu"}, "places 3, which is no part"),
        (
            {"": "cpu", "decoder.layers": "disk", "model.decoder.layers": "cpu"},
            "'model.decoder.layers' on cpu, and on disk by another spelling",
        ),
        ("everywhere", "none of 'auto', 'balanced', 'stream'"),
        (7, "none of 'auto'"),
    ],
)
def test_maps_that_do_not_suit_the_model_are_refused(tmp_path: Path, given, message: str):
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path), device_map=given)


def test_one_device_or_several(tmp_path: Path):
    with pytest.raises(ValueError, match="give one of the two"):
        load(make(tmp_path), device_map="auto", device="cpu")


def test_a_missing_accelerate_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(
        CheckpointError, match=r"needs the package accelerate.*optlens\[multi-gpu\]"
    ):
        load(Path("nowhere"), device_map="auto")
    check_device_map("stream", "auto")  # which needs nothing


# ------------------------------------------------------------------ running, with parts on the disk


@pytest.fixture(scope="module")
def demo_pair() -> tuple[OPTForCausalLM, OPTForCausalLM]:
    places = {"": "cpu", "decoder.layers.1": "disk", "model.decoder.layers.3": "disk"}
    return optlens.load(device="cpu"), optlens.load(device_map=places)


def test_offloaded_parts_run_and_record(demo_pair):
    expected, ours = demo_pair
    first, second = (model.record(CLEAN) for model in (ours, expected))
    for name, value in second._tensors.items():
        torch.testing.assert_close(first._tensors[name], value)
    assert first.metadata["fingerprint"] == second.metadata["fingerprint"] == fingerprint(ours)

    def double(value, hook):
        return 2 * value

    for name in ("blocks.1.hook_q_input", "blocks.3.attn.hook_result", "blocks.1.ln1.hook_scale"):
        logits = [model.run_with_hooks(CLEAN, fwd_hooks=[(name, double)]) for model in demo_pair]
        torch.testing.assert_close(logits[1], logits[0])


def test_offloaded_weights_can_be_read_and_swept(demo_pair):
    expected, ours = demo_pair
    for name in ("W_Q", "W_O", "W_in", "b_K", "b_out"):
        assert torch.equal(getattr(ours, name), getattr(expected, name))
    values = [
        optlens.patch_sweep(
            m, CLEAN, CORRUPT, "z", ("layer", "head"), METRIC, progress=False
        ).values
        for m in demo_pair
    ]
    torch.testing.assert_close(*values)


def test_where_parts_are_is_said_and_saving_refused(demo_pair, capsys, tmp_path: Path):
    ours = demo_pair[1]
    ours.summary()
    line = "weights: embeddings on cpu, blocks 0, 2, 4 on cpu, blocks 1, 3 on disk"
    assert line in capsys.readouterr().out.splitlines()
    with pytest.raises(CheckpointError, match="Copy the checkpoint"):
        ours.save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("rule", ["auto", "balanced"])
def test_without_a_gpu_all_goes_to_the_cpu_or_is_streamed(tmp_path: Path, monkeypatch, rule: str):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    folder = make(tmp_path, tiny_config(num_hidden_layers=4), dtype=torch.float16)
    whole = load(folder, device_map=rule)
    assert str(whole.placement) == "embeddings on cpu, blocks 0-3 on cpu"
    assert whole.dtype == torch.float32
    whole.save_pretrained(tmp_path / "copy")
    half = optlens.plan(folder, dtype="float16", prompt_length=whole.config.n_ctx)
    monkeypatch.setattr(placement, "available_bytes", lambda device: int(1.2 * half.total))
    assert load(folder, device_map=rule).dtype == torch.float16  # which fits
    monkeypatch.setattr(placement, "available_bytes", lambda device: half.total)
    assert "streamed from disk" in str(load(folder, device_map=rule).placement)


def test_dtypes_and_an_untied_head_on_the_disk(tmp_path: Path):
    config = tiny_config(num_hidden_layers=3, tie_word_embeddings=False)
    folder = make(tmp_path, config, layout="sharded", dtype=torch.float16)
    places = {"": "cpu", "decoder.layers.2": "disk", "lm_head": "disk"}
    ours = load(folder, device_map=places, dtype="float32")
    with torch.no_grad():
        expected = load(folder, device="cpu", dtype="float32")(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_parts_on_the_disk_compute_in_the_dtype_asked_for(tmp_path: Path, stored, dtype: str):
    folder = make(tmp_path, tiny_config(num_hidden_layers=3), dtype=stored)
    ours = load(folder, device_map={"": "cpu", "decoder.layers.1": "disk"}, dtype=dtype)
    resident = load(folder, device="cpu", dtype=dtype)
    assert ours.W_Q.dtype == ours.dtype == getattr(torch, dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, resident(IDS).logits)


def test_analyses_read_layernorms_on_the_disk():
    places = {"": "disk", "decoder.embed_tokens": "cpu", "decoder.embed_positions": "cpu"}
    models = optlens.load(device_map=places | {"lm_head": "cpu"}), optlens.load(device="cpu")
    logit = [optlens.direct_logit_attribution(m, CLEAN, " Mary", " John").heads for m in models]
    edges = [optlens.edge_attribution(m, CLEAN, CORRUPT, METRIC).scores for m in models]
    effect = [neurons.vocabulary_effect(m, layers=1, neurons=[0, 9]).promoted for m in models]
    for found, expected in (logit, edges, effect):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32, other offsets


def test_bin_files_have_no_parts_on_the_disk(tmp_path: Path):
    folder = make(tmp_path, layout="bin")
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        load(folder, device_map={"": "cpu", "decoder.layers.1": "disk"})


# ------------------------------------------------------------------ rehearsed on fake GPUs


def on_fake_gpus(
    monkeypatch: pytest.MonkeyPatch,
    config: OPTConfig,
    n_gpus: int,
    dtype: torch.dtype,
    device_map: dict[str, str] | None = None,
) -> OPTForCausalLM:
    """Return a model divided among fake GPUs, evenly or as told; call it in a FakeTensorMode."""
    # fake tensors all have the address 0, by which accelerate knows tied weights
    monkeypatch.setattr("accelerate.big_modeling.find_tied_parameters", lambda model: [])
    model = empty_model(OPTForCausalLM, config).eval()
    places = places_of(model)
    gpus = {f"cuda:{n}": None for n in range(n_gpus)}
    modules = module_bytes(config, dtype.itemsize)
    found = balanced(Demand(modules, 0, 0, 0, tied=config.tie_word_embeddings), list(gpus), gpus)
    devices = spell_out(device_map or found.device_map, units_of(places))
    assert set(devices.values()) == set(gpus)
    for unit, names in units_of(places).items():
        for name in names:
            shape = getattr(*places[name][0]).shape
            weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=devices[unit]), False)
            for module, attribute in places[name]:
                setattr(module, attribute, weight)
    model.placement = dispatch(model, devices, places, {}, None, dtype)
    return model


def device_of_block(model: OPTForCausalLM, hook: str) -> torch.device:
    return torch.device(model.placement.devices[f"decoder.layers.{hook.split('.')[1]}"])


@pytest.mark.parametrize(("n_gpus", "padded"), [(2, False), (3, False), (4, True)])
def test_66bs_widths_run_and_every_hook_gets_its_tensor_on_its_blocks_device(
    monkeypatch, n_gpus, padded
):
    with FakeTensorMode(), torch.no_grad():
        model = on_fake_gpus(
            monkeypatch, OPTConfig.from_name("66b", num_hidden_layers=8), n_gpus, torch.float16
        )
        tokens = torch.ones(2, 9, dtype=torch.long)
        mask = torch.ones(2, 9, dtype=torch.long) if padded else None
        out = model(tokens, attention_mask=mask, use_cache=True)
        assert out.logits.shape == (2, 9, 50272)
        assert out.logits.device == model.device == torch.device("cuda:0")
        last = model.placement.devices["decoder.layers.7"]
        assert out.past_key_values[7][0].device == torch.device(last) != torch.device("cuda:0")
        _, cache = model.run_with_cache(tokens, attention_mask=mask, return_type=None)
        blocks = [name for name in cache if name.startswith("blocks.")]
        assert len(blocks) == 8 * 17
        assert [n for n in blocks if cache[n].device != device_of_block(model, n)] == []


def record_rehearsed(model: OPTForCausalLM, device: str, tokens: torch.Tensor) -> dict:
    """Do what `record` does with tensors, without the facts that it reads from their values."""
    what = ("attention", "residual", "z", "mlp_out")
    recorder = Recorder(model, what, None, None, tuple(tokens.shape), device=device)
    capture._run(model, tokens, None, recorder)
    return recorder._tensors


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda:1", marks=[pytest.mark.placement, needs_cuda_build])],
)
def test_66b_is_recorded_on_one_declared_device(monkeypatch, device: str):
    # a driver would be asked how much memory a GPU has, and the GPUs here are fakes
    monkeypatch.setattr("optlens.recorder.available_bytes", lambda device: None)
    with FakeTensorMode(), torch.no_grad():
        model = on_fake_gpus(
            monkeypatch, OPTConfig.from_name("66b", num_hidden_layers=8), 4, torch.float16
        )
        kept = record_rehearsed(model, device, torch.ones(1, 32, dtype=torch.long))
    assert {value.device for value in kept.values()} == {torch.device(device)}
    assert kept["attention"].shape == (1, 8, 72, 32, 32)


@pytest.mark.placement
@needs_cuda_build
def test_66b_decodes_a_fixed_number_of_tokens_and_computes_the_loss(monkeypatch):
    with FakeTensorMode(), torch.no_grad():
        model = on_fake_gpus(
            monkeypatch, OPTConfig.from_name("66b", num_hidden_layers=8), 4, torch.float16
        )
        tokens, past = torch.ones(2, 5, dtype=torch.long), None
        assert model.loss(tokens).device == torch.device("cuda:0")
        for step in range(4):
            out = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            assert past.get_seq_length() == 5 + step


@pytest.mark.placement
@needs_cuda_build
@pytest.mark.parametrize("n_gpus", [2, 3, 4])
def test_66b_is_patched_and_generates_on_several(monkeypatch, n_gpus: int):
    """Beside a real CPU: what is done where is decided by tokens and masks, which come from there."""
    monkeypatch.setattr("optlens.recorder.available_bytes", lambda device: None)
    with FakeGpus(), torch.no_grad():
        config = OPTConfig.from_name("66b", num_hidden_layers=8)
        model = on_fake_gpus(monkeypatch, config, n_gpus, torch.float16)
        tokens = torch.tensor([[2, 5, 6, 7], [1, 2, 8, 9]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
        edits = [
            Patch("resid_post", layer=7, pos=-1, value=torch.zeros(9216)),
            Ablate("z", layer=range(8), head=3, mode="mean", reference=tokens[:1]),
            Steer(layer=4, vector=torch.ones(9216), scale=2.0),
        ]
        recording = model.record(tokens, what="z", attention_mask=mask, interventions=edits)
        assert recording["z"].shape == (2, 8, 4, 72, 128)
        options = {"stop_at_eos": False, "attention_mask": mask, "interventions": edits}
        written = model.generate(tokens, 3, **options)
        assert written.shape == (2, 7) and written.device == torch.device("cuda:0")


def test_350m_with_its_projections_runs_on_two(monkeypatch):
    with FakeTensorMode(), torch.no_grad():
        model = on_fake_gpus(monkeypatch, OPTConfig.from_name("350m"), 2, torch.float16)
        out = model(torch.ones(1, 5, dtype=torch.long), return_type="logits", use_cache=False)
        assert out.device == torch.device("cuda:0")
        assert model.W_Q.device == model.W_E.device == model.W_U.device == torch.device("cuda:0")


def test_a_misplaced_tensor_is_caught(monkeypatch):
    with FakeTensorMode(), torch.no_grad():
        config = tiny_config(num_hidden_layers=4)
        model = on_fake_gpus(monkeypatch, config, 2, torch.float32)
        tokens = torch.ones(1, 5, dtype=torch.long)
        model(tokens)
        misplaced = model.decoder.layers[3].fc1
        misplaced.weight = nn.Parameter(misplaced.weight.to("cuda:0"))
        with pytest.raises(RuntimeError, match=r"cuda:0.*cuda:1|cuda:1.*cuda:0|different devices"):
            model(tokens)


def test_without_accelerates_hooks_the_rehearsal_fails(monkeypatch):
    """The rehearsal would see a stream that stays behind."""
    monkeypatch.setattr("accelerate.dispatch_model", lambda model, *args, **options: model)
    with FakeTensorMode(), torch.no_grad():
        config = tiny_config(num_hidden_layers=4)
        with pytest.raises(AttributeError, match="_hf_hook"):
            on_fake_gpus(monkeypatch, config, 2, torch.float32)


@pytest.mark.placement
@needs_cuda_build
@pytest.mark.parametrize("n_gpus", [2, 3, 4])
@pytest.mark.parametrize("site", [*SITES])
def test_66b_is_swept_on_several(monkeypatch, n_gpus: int, site: str):
    monkeypatch.setattr("optlens.patching.budget.available_bytes", lambda device: None)
    with FakeGpus(), torch.no_grad():
        config = OPTConfig.from_name("66b", num_hidden_layers=8)
        model = on_fake_gpus(monkeypatch, config, n_gpus, torch.float16)
        over = ("pos",) if site == "embed" else ("layer", "pos")
        options = {"metric": optlens.metrics.logit_diff(7, 8), "progress": False}
        result = optlens.patch_sweep(model, *TOKENS, site, over, **options)
        assert result.values.shape == ((4,) if site == "embed" else (8, 4))


@pytest.mark.placement
@needs_cuda_build
def test_every_kind_of_sweep_runs_on_several(monkeypatch):
    monkeypatch.setattr("optlens.patching.budget.available_bytes", lambda device: None)
    with FakeGpus(), torch.no_grad():
        config = tiny_config(num_hidden_layers=4)
        model = on_fake_gpus(monkeypatch, config, 3, torch.float32)
        clean, corrupt = TOKENS
        edits = [Ablate("z", layer=3, head=1), Scale("mlp_out", layer=1, factor=0.5)]
        for metric in (optlens.metrics.logit_diff(7, 8), optlens.metrics.kl(), lambda x: x.mean()):
            options = {"metric": metric, "progress": False}
            for more in ({}, {"window": 3}, {"interventions": edits}, {"memory_budget": 10**6}):
                result = optlens.patch_sweep(
                    model, clean, corrupt, "z", ("layer", "head"), **options, **more
                )
                assert result.values.shape == (4, 4)
            for mode in ("zero", "mean", "resample"):
                reference = None if mode == "zero" else corrupt
                result = optlens.ablate_sweep(
                    model, clean, mode=mode, reference=reference, **options
                )
                assert result.values.shape == (4, 4)
        cut = optlens.knockout_sweep(model, clean, METRIC_OF_IDS, progress=False)
        assert cut.values.shape == (4, 4)
        # noise is measured in the spread of embeddings, of which fakes have none
        monkeypatch.setattr("optlens.patching.tracing.embedding_std", lambda *given: 1.0)
        traced = optlens.causal_trace(
            model, clean[:1], [1], METRIC_OF_IDS, samples=2, progress=False
        )
        assert traced.values.shape[0] == 4


@pytest.mark.placement
@needs_cuda_build
def test_embeddings_apart_from_all_blocks_are_swept(monkeypatch):
    monkeypatch.setattr("optlens.patching.budget.available_bytes", lambda device: None)
    with FakeGpus(), torch.no_grad():
        apart = {
            "decoder.embed_tokens": "cuda:0",
            "decoder.embed_positions": "cuda:0",
            "decoder.final_layer_norm": "cuda:1",
            "decoder.layers": "cuda:1",
            "lm_head": "cuda:0",
        }
        config = tiny_config(num_hidden_layers=2)
        model = on_fake_gpus(monkeypatch, config, 2, torch.float32, apart)
        for metric in (METRIC_OF_IDS, optlens.metrics.kl()):
            result = optlens.patch_sweep(
                model, *TOKENS, "embed", ("pos",), metric=metric, progress=False
            )
            assert result.values.shape == (4,)


def test_attribution_in_a_divided_model_is_refused():
    placement = Placement({"decoder.embed_tokens": "cuda:0", "decoder.layers.0": "cuda:1"})
    model = optlens.load(demo.path(), device="cpu")
    model.placement = placement
    for run in (
        lambda: optlens.attribution_patch(model, CLEAN, CORRUPT, "z", ("layer", "head"), METRIC),
        lambda: optlens.path_patch(model, CLEAN, CORRUPT, metric=METRIC),
        lambda: optlens.edge_attribution(model, CLEAN, CORRUPT, METRIC),
        lambda: optlens.faithfulness(model, CLEAN, CORRUPT, [], METRIC),
    ):
        with pytest.raises(
            optlens.checks.InputError, match="need all blocks on one device.*stream"
        ):
            run()
    lent = Placement({"decoder.embed_tokens": "cuda:0", "decoder.layers.0": "cpu"})
    assert lent.no_attribution is None and lent.no_saving is not None  # computed on the GPU
    apart = Placement({"decoder.embed_tokens": "cpu", "decoder.layers.0": "cuda:0"})
    assert apart.no_attribution is not None and apart.no_saving is None
