import json

import pytest
import torch
from conftest import VARIANTS, random_model, tiny_config
from live_bytes import LiveBytes

import optlens
from optlens import OPTConfig, plan
from optlens.capture import estimate_bytes
from optlens.checkpoints import CheckpointError
from optlens.config import SIZES
from optlens.patching.forecast import sweep_bytes

# What a plan promises: its numbers are this near to a run's.
SHARE = 0.05
SMALL = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 3}
SMALL |= {"vocab_size": 2000, "max_position_embeddings": 256}
ROOM = {"cpu": "1TB"}
TWO_GPUS = {"cuda:0": "24GiB", "cuda:1": "24GiB", "cpu": "64GiB"}


def tokens_of(batch: int, pos: int) -> torch.Tensor:
    return torch.arange(batch * pos).remainder(1900).add(3).view(batch, pos)


def measured(run) -> int:
    """Return the most bytes that a function's tensors take while it runs."""
    with torch.no_grad(), LiveBytes() as counter:
        kept = run()
    del kept
    return counter.peak


# ------------------------------------------------------------------ what a run then takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("batch", "pos"), [(1, 200), (4, 30)])
def test_forward_pass_takes_what_was_planned(dtype, name: str, batch: int, pos: int):
    variant = VARIANTS[name] | (
        {"word_embed_proj_dim": 32} if "proj" in str(VARIANTS[name]) else {}
    )
    model = random_model(tiny_config(**SMALL | variant), dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    made = plan(model, device=ROOM, batch=batch, prompt_length=pos)
    assert made.weights == weights
    total = weights + measured(lambda: model(tokens_of(batch, pos)))
    assert made.per_device == {"cpu": made.total}
    assert made.total == pytest.approx(total, rel=SHARE)
    # weights are exact: what is left must be near, too
    assert made.total - weights == pytest.approx(total - weights, rel=SHARE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "pos"), [(1, 200), (4, 30)])
@pytest.mark.parametrize(
    "record",
    [
        True,
        "attention",
        ("residual", "z"),
        {"what": "attention", "layers": [0], "heads": [1]},
        {"what": ("residual", "logit_lens"), "dtype": "float64"},
        "blocks.1.attn.hook_pattern",
        "result",
    ],
)
def test_recording_takes_what_was_planned(dtype, batch: int, pos: int, record):
    model = random_model(tiny_config(**SMALL), dtype)
    made = plan(model, device=ROOM, batch=batch, prompt_length=pos, record=record)
    options = dict(record) if isinstance(record, dict) else {"what": record}
    if record is True:
        options = {}
    if "dtype" in options:
        options["dtype"] = torch.float64
    kept = model.record(tokens_of(batch, pos), **options)
    assert made.recording == sum(tensor.nbytes for tensor in kept._tensors.values())
    del kept
    taken = measured(lambda: model.record(tokens_of(batch, pos), **options))
    assert made.recording + made.recording_run == pytest.approx(taken, rel=SHARE)
    assert made.total == made.weights + made.recording + made.recording_run


def test_sweep_is_what_the_sweep_itself_expects():
    config = tiny_config()
    options = {"site": "z", "over": ("layer", "head"), "memory_budget": 500_000}
    made = plan(config, device=ROOM, prompt_length=20, sweep=options)
    assert (made.sweep, made.heap) == sweep_bytes(config, 20, 1, 4, **options)
    assert made.total == made.weights + made.sweep + made.heap
    made = plan(config, device=ROOM, prompt_length=20, sweep=True)
    assert (made.sweep, made.heap) == sweep_bytes(config, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "pos"), [(1, 24), (3, 17)])
@pytest.mark.parametrize(
    ("site", "over"),
    [
        ("resid_pre", ("layer", "pos")),
        ("z", ("layer", "head")),
        ("pattern", ("layer", "head")),
        ("attn_scores", ("layer", "head")),
        ("k", ("layer", "pos")),
        ("mlp_post", ("layer", "pos")),
        ("attn_out", ("layer", "pos")),
    ],
)
def test_sweep_takes_what_was_planned(dtype, batch: int, pos: int, site: str, over: tuple):
    model = random_model(tiny_config(**SMALL | {"num_hidden_layers": 4}), dtype)
    made = plan(
        model, device=ROOM, batch=batch, prompt_length=pos, sweep={"site": site, "over": over}
    )
    clean = tokens_of(batch, pos)
    corrupt = torch.cat([clean[:, :1], clean[:, 1:] + 1], dim=1)
    metric = optlens.metrics.logit_diff(5, 6)
    taken = measured(
        lambda: optlens.patch_sweep(model, clean, corrupt, site, over, metric, progress=False)
    )
    assert made.sweep == pytest.approx(taken, rel=SHARE)


@pytest.mark.parametrize("ffn_dim", [64, 256])
@pytest.mark.parametrize(
    ("site", "batch", "pos", "too_high"),
    [
        ("mlp_post", 1, 33, SHARE),
        ("q", 3, 17, SHARE),
        ("z", 1, 33, SHARE),
        ("attn_out", 2, 33, SHARE),
        # short ones are recorded in one run, of whose last block some values are counted twice
        ("mlp_post", 1, 24, 0.25),
        ("z", 2, 10, 0.25),
    ],
)
def test_small_sweep_takes_what_was_planned(
    ffn_dim: int, site: str, batch: int, pos: int, too_high: float
):
    """With few patches the recorded runs are most of it, and every small term shows."""
    shape = SMALL | {"num_hidden_layers": 2, "ffn_dim": ffn_dim}
    model = random_model(tiny_config(**shape))
    sweep = {"site": site, "over": ("layer",)}
    made = plan(model, device=ROOM, batch=batch, prompt_length=pos, sweep=sweep)
    clean = tokens_of(batch, pos)
    corrupt = torch.cat([clean[:, :1], clean[:, 1:] + 1], dim=1)
    metric = optlens.metrics.logit_diff(5, 6)
    taken = measured(
        lambda: optlens.patch_sweep(model, clean, corrupt, **sweep, metric=metric, progress=False)
    )
    assert (1 - SHARE) * taken <= made.sweep <= (1 + too_high) * taken


# ------------------------------------------------------------------ beside the tensors


def test_what_blocks_have_freed_stays_in_the_process_on_a_cpu():
    """Tensors of less than 32 MiB are on the heap, and logits of more are not."""
    config = OPTConfig.from_name("opt-125m")
    on_cpu = plan(config, device=ROOM, prompt_length=512)
    assert on_cpu.heap == 512 * 4 * (7 * 768 + 2 * 3072)
    assert on_cpu.total == on_cpu.weights + on_cpu.kv_cache + on_cpu.activations + on_cpu.heap
    assert "heap               23.6 MB" in str(on_cpu)
    assert on_cpu.to_dict()["heap"] == on_cpu.heap
    few = plan(config, device=ROOM, prompt_length=100)  # logits of 20 MB find room there
    assert few.heap == 0
    many = plan(config, device=ROOM, prompt_length=512, batch=8)  # neurons of 50 MB are no part
    assert many.heap == 8 * 512 * 4 * 7 * 768
    assert plan(config, device={"cuda:0": "24GiB"}, prompt_length=512).heap == 0
    streamed = plan(config, device=ROOM, prompt_length=512, device_map="stream")
    assert streamed.heap == on_cpu.heap
    assert streamed.total == streamed.arrangement.weights["cpu"] + on_cpu.total - on_cpu.weights


def test_half_precision_logits_of_the_lens_stay_in_the_process_on_a_cpu():
    options = {"device": ROOM, "prompt_length": 512, "record": True}
    narrow = plan("opt-125m", dtype="bfloat16", **options)
    assert narrow.heap == 318 * 50272 * 2  # as many positions as a table of 64 MB has
    assert narrow.total == narrow.weights + narrow.recording + narrow.recording_run + narrow.heap
    assert plan("opt-125m", dtype="float32", **options).heap == 0
    few = plan("opt-125m", dtype="bfloat16", **options | {"prompt_length": 64})
    assert few.heap == 0  # the widened table is small, too


def test_recording_that_leaves_a_gpu_is_in_buffers_of_powers_of_two():
    """Computed from PyTorch's source; there is nothing to measure without a GPU."""
    memory = {"cuda:0": "24GiB", "cpu": "64GiB"}
    options = {"prompt_length": 512, "dtype": "float32"}
    made = plan("opt-125m", device=memory, record=("attention", "residual"), **options)
    sizes = [12 * 12 * 512 * 512 * 4, 13 * 512 * 768 * 4, 512 * 768 * 4]
    assert made.recording == sum(sizes) + 9 * 512
    assert made.pinned == 2**28 + 2**25 + 2**21 - sum(sizes)
    assert made.per_device["cpu"] == made.recording + made.pinned
    assert "pinned memory are powers of two" in str(made)
    assert made.to_dict()["pinned"] == made.pinned
    streamed = plan("opt-125m", device=memory, record=True, device_map="stream", **options)
    assert streamed.per_device["cpu"] == streamed.recording + streamed.pinned > streamed.recording
    here = {"what": "attention", "device": "cuda:0"}
    assert plan("opt-125m", device=memory, record=here, **options).pinned == 0
    assert plan("opt-125m", device={"cpu": "64GiB"}, record=True, **options).pinned == 0


def test_recording_is_what_record_itself_expects():
    config = OPTConfig.from_name("opt-125m")
    made = plan(config, device=ROOM, record="attention", prompt_length=100)
    values = estimate_bytes(config, 100, what="attention")
    assert made.recording == values + 9 * 100  # tokens and mask


# ------------------------------------------------------------------ what is planned for


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str):
    config = OPTConfig.from_name(size)
    made = plan(f"facebook/opt-{size}", device=ROOM, dtype="float16", record=True, sweep=True)
    assert made.weights == 2 * config.parameter_count()
    assert made.kv_cache == 2 * 2 * config.n_layers * 512 * config.d_model
    assert (made.fits, made.placement) == (True, "cpu")


def test_a_model_a_config_a_folder_and_a_name_are_planned_alike(tmp_path):
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path)
    options = {"device": ROOM, "prompt_length": 20}
    plans = [plan(source, **options) for source in (model, model.config, tmp_path, str(tmp_path))]
    assert len({(p.weights, p.kv_cache, p.activations, p.dtype) for p in plans}) == 1


def test_quantised_matrices():
    whole, int8, nf4 = (
        plan("opt-6.7b", device=ROOM, dtype="float16", quantize=kind).weights
        for kind in (None, "int8", "nf4")
    )
    assert 0.5 < int8 / whole < 0.54  # embeddings stay as they are
    assert 0.28 < nf4 / whole < 0.32


# ------------------------------------------------------------------ dtype "auto"


def test_auto_is_float32_on_a_cpu_where_it_fits():
    weights = 4 * OPTConfig.from_name("opt-1.3b").parameter_count()
    fits, tight = ({"cpu": int(weights * share)} for share in (1.5, 0.9))
    assert plan("opt-1.3b", device=fits).dtype == torch.float32
    assert plan("opt-1.3b", device=tight).dtype == torch.float16


def test_auto_is_the_stored_dtype_on_a_gpu(tmp_path):
    assert plan("opt-1.3b", device={"cuda:0": "80GiB"}).dtype == torch.float16
    random_model(tiny_config(), torch.bfloat16).save_pretrained(tmp_path)
    assert plan(tmp_path, device={"cuda": "1GB"}, prompt_length=9).dtype == torch.bfloat16


def test_auto_is_what_load_chooses(tmp_path):
    random_model(tiny_config(), torch.bfloat16).save_pretrained(tmp_path)
    loaded = optlens.load(tmp_path, device="cpu")
    assert plan(tmp_path, device="cpu", prompt_length=9).dtype == loaded.dtype
    half = optlens.load(tmp_path, device="cpu", dtype="bfloat16")
    assert plan(half, device="cpu", prompt_length=9).dtype == torch.bfloat16


# ------------------------------------------------------------------ where it would lie


def test_placement_follows_the_memory():
    def placed(**memory) -> str:
        return plan("opt-30b", device={k.replace("_", ":"): v for k, v in memory.items()}).placement

    assert placed(cuda_0="80GiB", cpu="10GiB") == "cuda:0"
    assert placed(cuda_0="40GiB", cuda_1="40GiB", cpu="10GiB") == "cuda:0, cuda:1"
    assert placed(cuda_0="24GiB", cuda_1="24GiB", cpu="64GiB") == "cuda:0, cuda:1, cpu"
    assert placed(cpu="256GiB") == "cpu"
    assert placed(cpu="16GiB") == "stream on cpu"
    assert placed(cuda_0="8GiB", cpu="16GiB") == "stream on cuda:0"


def test_load_options_say_how_to_get_it():
    assert plan("opt-30b", device={"cpu": "16GiB"}).load_options() == {
        "dtype": "float32",
        "device": "cpu",
        "device_map": "stream",
    }
    options = plan("opt-30b", device=TWO_GPUS, quantize="int8").load_options()
    device_map = options.pop("device_map")
    assert options == {"dtype": "float16", "quantize": "int8"}
    assert set(device_map.values()) == {"cuda:0", "cuda:1"}
    assert device_map["lm_head"] == device_map["model.decoder.embed_tokens"] == "cuda:0"


def test_a_recording_lies_on_its_device():
    options = {"prompt_length": 2048, "dtype": "float16"}
    memory = {"cuda:0": "80GiB", "cpu": "64GiB"}
    on_cpu = plan("opt-13b", device=memory, record="attention", **options)
    assert on_cpu.per_device["cpu"] == on_cpu.recording + on_cpu.pinned
    there = {"what": "attention", "device": "cuda:0"}
    on_gpu = plan("opt-13b", device=memory, record=there, **options)
    assert set(on_gpu.per_device) == {"cuda:0"}
    assert on_gpu.total == on_cpu.total - on_cpu.pinned


def test_a_stated_placement_is_judged():
    memory = {"cpu": "20GiB"}
    assert plan("opt-13b", device=memory).placement == "stream on cpu"
    made = plan("opt-13b", device=memory, device_map="auto")
    assert made.placement == "stream on cpu"
    made = plan("opt-13b", device=memory, device_map={"": "cpu"})
    assert (made.placement, made.fits) == ("cpu", False)
    made = plan("opt-1.3b", device=TWO_GPUS, device_map="balanced")
    assert made.placement == "cuda:0, cuda:1"
    assert plan("opt-125m", device=memory, device_map="stream").placement == "stream on cpu"
    given = {"": "cuda:0", "model.decoder.layers.39": "cpu"}
    made = plan("opt-13b", device=TWO_GPUS, device_map=given)
    assert set(made.per_device) == {"cuda:0", "cpu"}


# ------------------------------------------------------------------ advice


def test_advice_helps():
    """Each proposed change makes it fit."""
    memory, there = {"cpu": "9GiB"}, {"": "cpu"}
    made = plan("opt-2.7b", device=memory, dtype="float32", device_map=there)
    assert not made.fits
    said = "\n".join(made.advice)
    assert 'dtype="bfloat16"' in said
    assert plan("opt-2.7b", device=memory, dtype="bfloat16", device_map=there).fits
    assert 'quantize="int8"' in said
    assert plan("opt-2.7b", device=memory, dtype="float32", quantize="int8", device_map=there).fits
    assert "device_map=None" in said
    assert plan("opt-2.7b", device=memory, dtype="float32").fits
    assert "GB on cpu are missing" in said


def test_advice_leaves_out_what_does_not_help():
    made = plan("opt-350m", device={"cpu": "20GiB"}, batch=100, prompt_length=2048, record=True)
    assert made.advice == ("batch=1", made.advice[-1])
    assert not plan("opt-350m", device={"cpu": "20GiB"}, batch=100, record=True).fits


# ------------------------------------------------------------------ as text and as data


def test_it_prints_as_a_table():
    text = str(plan("opt-30b", device=TWO_GPUS, record=True, sweep=True))
    lines = text.splitlines()
    assert lines[0] == "opt-30b in float16, 1 prompt of 512 tokens"
    for line in (
        "weights            59.9 GB",
        "KV cache          704.6 MB",
        "Placement: cuda:0, cuda",
    ):
        assert line in text
    assert lines[-1] == "It fits."
    text = str(plan("opt-30b", device={"cpu": "1GiB"}, quantize="nf4"))
    assert "matrices in nf4" in text
    assert "too little" in text
    assert "It does not fit." in text


def test_it_goes_into_json():
    made = plan("opt-30b", device=TWO_GPUS)
    facts = json.loads(json.dumps(made.to_dict()))
    assert (facts["weights"], facts["total"]) == (made.weights, made.total)
    assert facts["device_map"]["model.decoder.embed_tokens"] == "cuda:0"


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize='int4': give 'int8' or 'nf4'"),
        ({"prompt_length": 2049}, "prompt of 1 to 2048 tokens"),
        ({"batch": 0}, "at least one prompt"),
        ({"dtype": "int8"}, "is not a dtype for weights"),
        ({"device": {"cpu": "lots"}}, r"device\['cpu'\]='lots' is no size"),
        ({"device": {"gpu": "1GB"}}, "'gpu' is no device"),
        ({"device": {}}, "names no memory"),
        ({"record": {"pos": 3}}, "record has no option 'pos'"),
        ({"record": "mlp_uot"}, "mlp_uot"),
        ({"record": 3}, "give True, names of what to record, or a table"),
        ({"sweep": {"sites": "z"}}, "sweep has no option 'sites'"),
        ({"sweep": "nowhere"}, "No site is called 'nowhere'"),
        ({"device_map": "best"}, "device_map='best'"),
        ({"device_map": "stream", "quantize": "nf4"}, "leave out quantize"),
    ],
)
def test_wrong_arguments_are_explained(options: dict, message: str):
    with pytest.raises((ValueError, KeyError), match=message):
        plan("opt-125m", **{"device": ROOM} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is there")
def test_a_device_that_is_not_there_can_be_stated():
    with pytest.raises(ValueError, match=r'state its memory: device=\{"cuda:0": "24GiB"\}'):
        plan("opt-125m", device="cuda")


def test_what_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder, and no OPT named .* OPTConfig"):
        plan("galactica-6.7b", device=ROOM)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        plan(tmp_path, device=ROOM)
