import copy
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoint_folders import IDS, make
from conftest import TOL, random_model, tiny_config
from metaseq_folders import write_metaseq

import optlens
from optlens import demo
from optlens.checkpoints import (
    CheckpointError,
    convert,
    load_model,
    placement,
    stored_tensors,
    streaming,
)
from optlens.checkpoints.on_disk import OnDisk, StreamError
from optlens.interventions import Ablate
from optlens.model import OPTForCausalLM, OPTModel
from optlens.recording import fingerprint
from optlens.weights import effective_bias, effective_weight

WEIGHTS = "W_E W_U W_pos W_Q W_K W_V W_O W_in W_out b_U b_Q b_K b_V b_O b_in b_out".split()
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
METRIC = optlens.metrics.logit_diff(" Mary", " John")


def streamed(folder: Path, **options) -> OPTForCausalLM:
    return load_model(OPTForCausalLM, folder, device="cpu", device_map="stream", **options)


def resident(folder: Path, **options) -> OPTForCausalLM:
    """Load a model whose weights lie at multiples of 64 bytes, as streaming lays them."""
    model = load_model(OPTForCausalLM, folder, device="cpu", **options)
    for parameter in model.parameters():
        parameter.data = stored_tensors.aligned(tuple(parameter.shape), parameter.dtype).copy_(
            parameter.data
        )
    return model


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("optlens-read-block")]


def shown(model: OPTForCausalLM) -> list[int]:
    """Return the blocks whose weights are in place."""
    layers = enumerate(model.decoder.layers)
    return [n for n, layer in layers if not isinstance(layer.fc1.weight, OnDisk)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, tiny_config(num_hidden_layers=5), layout="sharded")


@pytest.fixture(scope="module")
def demo_pair() -> tuple[OPTForCausalLM, OPTForCausalLM]:
    return resident(demo.path()), streamed(demo.path())


# ------------------------------------------------------------------ equal to a resident model


@torch.no_grad()
def test_every_variant_is_bitwise_equal(tmp_path: Path, variant: dict):
    folder = make(tmp_path, tiny_config(num_hidden_layers=3, **variant), layout="sharded")
    ours, expected = streamed(folder), resident(folder)
    for _ in range(2):  # the second run finds buffers that hold other blocks
        logits, cache = ours.run_with_cache(IDS)
        expected_logits, expected_cache = expected.run_with_cache(IDS)
        assert torch.equal(logits, expected_logits)
        assert all(torch.equal(cache[name], expected_cache[name]) for name in expected_cache)
    mapped = load_model(OPTForCausalLM, folder, device="cpu")(IDS).logits
    torch.testing.assert_close(logits, mapped, **TOL[torch.float32])


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_dtypes_are_converted_while_reading(tmp_path: Path, monkeypatch, stored, wanted):
    monkeypatch.setattr(stored_tensors, "PIECE_BYTES", 1000)  # several pieces for each matrix
    monkeypatch.setattr(stored_tensors, "_ONE_THREAD", 77)
    folder = make(tmp_path, dtype=stored)
    ours = streamed(folder, dtype=wanted)
    assert ours.dtype == wanted and ours.config.dtype == wanted
    assert torch.equal(ours(IDS).logits, resident(folder, dtype=wanted)(IDS).logits)


@torch.no_grad()
def test_one_layer_and_a_base_model(tmp_path: Path):
    folder = make(tmp_path, tiny_config(num_hidden_layers=1))
    assert torch.equal(streamed(folder)(IDS).logits, resident(folder)(IDS).logits)
    base = load_model(OPTModel, folder, device="cpu", device_map="stream")
    expected = resident(folder).model(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, expected)


def test_demo_records_and_reads_the_lens_alike(demo_pair):
    expected, ours = (model.record([CLEAN, "The cat"]) for model in demo_pair)
    for name, value in expected._tensors.items():
        assert torch.equal(ours._tensors[name], value), name
    assert ours.metadata["fingerprint"] == expected.metadata["fingerprint"]
    lenses = [rec.logit_lens(top_k=20, sublayers=False) for rec in (ours, expected)]
    assert torch.equal(lenses[0].kl, lenses[1].kl)


def test_hooks_and_interventions_act(demo_pair):
    def erase(z, hook):
        z[:, :, 0] = 0.0

    results = []
    for model in demo_pair:
        with torch.no_grad():
            edited = model.run_with_hooks(CLEAN, fwd_hooks=[("blocks.2.attn.hook_z", erase)])
            per_head = model.run_with_hooks(
                CLEAN, fwd_hooks=[("blocks.1.hook_q_input", lambda x, hook: x * 1.5)]
            )
        rec = model.record(CLEAN, interventions=[Ablate("z", layer=3, head=1)], what="result")
        results.append([edited, per_head, rec["result"], model(CLEAN).logits.detach()])
    for expected, ours in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(results[0][0], results[0][3])


@pytest.mark.parametrize(
    ("site", "over"), [("resid_pre", ("layer", "pos")), ("z", ("layer", "head"))]
)
def test_sweeps_work(demo_pair, site: str, over: tuple[str, ...]):
    expected, ours = (
        optlens.patch_sweep(model, CLEAN, CORRUPT, site, over, METRIC, progress=False)
        for model in demo_pair
    )
    assert torch.equal(ours.values, expected.values)


def test_path_patching_works(demo_pair):
    expected, ours = (
        optlens.path_patch(
            model,
            CLEAN,
            CORRUPT,
            senders=[(1, 0), (2, 3)],
            metric=METRIC,
            progress=False,
        )
        for model in demo_pair
    )
    assert torch.equal(ours.values, expected.values)


@torch.no_grad()
def test_parts_of_a_run_and_a_cache_of_keys(folder: Path):
    ours, expected = streamed(folder), resident(folder)
    middle = expected(IDS, stop_at_layer=2)
    begun, start = [], ours.placement._start_reading
    ours.placement._start_reading = lambda layer: (begun.append(layer), start(layer))
    assert torch.equal(ours(IDS, stop_at_layer=2), middle)
    assert begun == [0, 1]  # nothing behind the last block
    assert torch.equal(
        ours(middle, start_at_layer=2).logits, expected(middle, start_at_layer=2).logits
    )
    assert torch.equal(ours(IDS, stop_at_layer=0), expected(IDS, stop_at_layer=0))
    results = []
    for model in (ours, expected):
        out = model(IDS[:, :4], use_cache=True)
        results.append(model(IDS[:, 4:], past_key_values=out.past_key_values).logits)
    assert torch.equal(*results)


@torch.no_grad()
def test_a_run_inside_a_hook_function(folder: Path):
    ours, expected = streamed(folder), resident(folder)

    def run_again(value, hook):
        if hook.ctx.setdefault("inside", False):
            return value
        hook.ctx["inside"] = True
        inner = model(IDS, stop_at_layer=4)
        return value + 0.1 * inner

    results = []
    for model in (ours, expected):
        results.append(model.run_with_hooks(IDS, [("blocks.1.hook_resid_mid", run_again)]))
    assert torch.equal(*results)


@torch.no_grad()
def test_runs_of_two_threads_take_turns(folder: Path):
    ours, expected = streamed(folder), resident(folder)(IDS).logits
    found = []

    def run() -> None:
        with torch.no_grad():
            found.extend(ours(IDS).logits for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40 and all(torch.equal(logits, expected) for logits in found)


# ------------------------------------------------------------------ what is in memory


@torch.no_grad()
def test_at_most_two_blocks_are_in_memory_and_each_byte_is_read_once(folder: Path, monkeypatch):
    model = streamed(folder)
    held, read = set(), []
    original = stored_tensors.StoredTensors.fill

    def counted(self, targets, *rest):
        read.extend(targets)
        return original(self, targets, *rest)

    monkeypatch.setattr(stored_tensors.StoredTensors, "fill", counted)
    hooks = [
        (f"blocks.{n}.hook_mlp_out", lambda x, hook: held.add(tuple(shown(model))))
        for n in range(5)
    ]
    model.run_with_hooks(IDS.repeat(3, 1), fwd_hooks=hooks)
    assert all(len(blocks) <= 2 for blocks in held)
    assert {blocks[-1] for blocks in held} == set(range(5))
    n_tensors = len(list(model.decoder.layers.named_parameters()))
    assert len(read) == len(set(read)) == n_tensors
    assert shown(model) == [] and readers() == []
    buffers = model.placement._buffers
    block = sum(p.nbytes for p in model.decoder.layers[0].parameters())
    assert [sum(p.nbytes for p in b.parameters.values()) for b in buffers] == [block, block]
    starts = [p.data_ptr() % 64 for b in buffers for p in b.parameters.values()]
    assert set(starts) == {0}


def test_a_recording_takes_one_pass_over_the_file(folder: Path, monkeypatch):
    model, read = streamed(folder), []
    original = stored_tensors._File.read

    def counted(self, start, target):
        read.append(target.nbytes)
        original(self, start, target)

    monkeypatch.setattr(stored_tensors._File, "read", counted)
    rec = model.record(IDS)  # its fingerprint samples every weight
    blocks = sum(p.nbytes for p in model.decoder.layers.parameters())
    assert sum(read) == blocks
    assert rec.metadata["fingerprint"] == fingerprint(resident(folder))
    assert sum(read) == blocks
    assert fingerprint(streamed(folder)) == rec.metadata["fingerprint"]  # without any run


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_what_was_read_leaves_the_systems_cache(folder: Path, monkeypatch):
    dropped: list[tuple[int, int]] = []
    original = os.posix_fadvise

    def advise(number, start, length, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((start, length))
        original(number, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    model = streamed(folder)
    dropped.clear()
    with torch.no_grad():
        model(IDS)
    blocks = sum(p.nbytes for p in model.decoder.layers.parameters())
    assert sum(length for _, length in dropped) >= blocks


def test_too_little_memory_is_said_before_reading(folder: Path, monkeypatch):
    monkeypatch.setattr(placement, "available_bytes", lambda device: 70_000)
    with pytest.raises(CheckpointError, match="streamed, needs .* only 70.0 kB are free"):
        streamed(folder, dtype="float32")


def test_the_stored_dtype_is_kept_where_float32_does_not_fit(tmp_path: Path, monkeypatch):
    folder = make(tmp_path, tiny_config(num_hidden_layers=5), dtype=torch.float16)
    both = sum(p.nbytes for p in streamed(folder).parameters())
    monkeypatch.setattr(placement, "available_bytes", lambda device: both // 2)
    with pytest.warns(UserWarning, match="keeping its stored dtype"):
        assert streamed(folder).dtype == torch.float16


# ------------------------------------------------------------------ everything else one can ask


def test_weights_read_as_of_a_resident_model(tmp_path: Path, variant: dict):
    folder = make(tmp_path, tiny_config(**variant), dtype=torch.float16)
    ours, expected = (load(folder, dtype=torch.float32) for load in (streamed, resident))
    for name in WEIGHTS:
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    module = ours.decoder.layers[1].fc1
    copied = effective_weight(module)
    with torch.no_grad():
        ours(IDS)
        ours(IDS, stop_at_layer=1)
    assert torch.equal(copied, effective_weight(module))
    assert (effective_bias(module) is None) == (not expected.config.enable_bias)


def test_shapes_are_known_and_the_summary_says_where_weights_are(demo_pair, capsys):
    expected, ours = demo_pair
    shapes = [(n, p.shape, p.dtype, p.nbytes, p.numel()) for n, p in ours.named_parameters()]
    assert shapes == [
        (n, p.shape, p.dtype, p.nbytes, p.numel()) for n, p in expected.named_parameters()
    ]
    assert ours.device == torch.device("cpu")
    ours.summary()
    printed = capsys.readouterr().out.splitlines()
    line = "weights: blocks are streamed from disk to cpu: at most 2 of 5 in memory (6.3 MB)"
    assert line in printed
    expected.summary()
    assert [row for row in printed if row != line] == capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: m(IDS, return_type="loss").backward(), "No gradient flows"),
        (lambda m: m.run_with_cache(IDS, return_type="loss", incl_bwd=True), "No gradient flows"),
        (lambda m: m(inputs_embeds=torch.zeros(1, 3, 32, requires_grad=True)), "No gradient flows"),
        (lambda m: m.to(torch.float16), "stays where it is"),
        (lambda m: m.half(), "stays where it is"),
        (lambda m: m.model.cpu(), "is on the disk and cannot be used"),
        (lambda m: m.decoder.layers[0].half(), "fc1.weight|self_attn.* is on the disk"),
        (lambda m: m.state_dict(), "is on the disk and cannot be used"),
        (lambda m: m.requires_grad_(True), "is on the disk and cannot be used"),
        (lambda m: copy.deepcopy(m), "cannot be copied"),
        (lambda m: pickle.dumps(m), "cannot be pickled"),
        (lambda m: m.decoder.layers[0].fc1.weight * 2, "used .by mul"),
        (lambda m: m.decoder.layers[0].fc1.weight.data.zero_(), "used .by data"),
        (lambda m: copy.deepcopy(m.decoder.layers[0].fc1.weight), "cannot be copied"),
    ],
)
def test_what_a_streamed_model_cannot_do_says_what_can(folder: Path, ask, message: str):
    model = streamed(folder)
    with pytest.raises(StreamError, match=message):
        ask(model)
    with torch.no_grad():  # and nothing was spoilt
        assert torch.equal(model(IDS).logits, resident(folder)(IDS).logits)


def test_attribution_is_refused(demo_pair):
    with pytest.raises(StreamError, match="patch_sweep, path_patch"):
        optlens.attribution_patch(demo_pair[1], CLEAN, CORRUPT, metric=METRIC)


def test_saving_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="Copy that folder"):
        streamed(folder).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_eval_mode_and_frozen_parameters(folder: Path):
    model = streamed(folder)
    assert not model.training
    assert model.requires_grad_(False) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bin_files_are_refused_with_a_way_out(tmp_path: Path):
    with pytest.raises(CheckpointError, match="reads safetensors.*optlens convert"):
        streamed(make(tmp_path, layout="bin"))


def test_metas_files_are_streamed_once_they_are_converted(tmp_path: Path):
    model = random_model(tiny_config(vocab_size=104, num_hidden_layers=4))
    write_metaseq(tmp_path / "old", model, ranks=2)
    with pytest.raises(CheckpointError, match="holds reshard-model_part-0.pt.*optlens convert"):
        streamed(tmp_path / "old")
    made = convert(tmp_path / "old", tmp_path / "new", shard_size="40kB", progress=False)
    assert len(made.checksums) > 1
    ours = streamed(tmp_path / "new")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, **TOL[torch.float32])
    assert fingerprint(ours) == fingerprint(model)


# ------------------------------------------------------------------ files that go wrong


@torch.no_grad()
def test_deleted_and_replaced_files_stay_readable(folder: Path, tmp_path: Path):
    model, expected = streamed(folder), resident(folder)(IDS).logits
    for file in folder.glob("*.safetensors"):
        file.rename(tmp_path / f"{file.name}.old")
    assert torch.equal(model(IDS).logits, expected)
    for file in tmp_path.glob("*.old"):
        file.unlink()
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("change", ["shorter", "touched"])
@torch.no_grad()
def test_a_file_that_changes_under_us_is_refused(folder: Path, change: str):
    model = streamed(folder)
    model(IDS)
    file = sorted(folder.glob("*.safetensors"))[2]
    state, content = file.stat(), file.read_bytes()
    with file.open("r+b") as handle:
        handle.truncate(len(content) // 2) if change == "shorter" else handle.write(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + (change == "touched")))
    with pytest.raises(
        CheckpointError, match=f"{file.name} was changed since the model was loaded"
    ):
        model(IDS)
    assert readers() == [] and shown(model) == []
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as it was: nothing is lost
    assert torch.equal(model(IDS).logits, resident(folder)(IDS).logits)


@torch.no_grad()
def test_a_file_that_ends_too_early_is_named(folder: Path, monkeypatch):
    model = streamed(folder)
    file = sorted(folder.glob("*.safetensors"))[2]
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    monkeypatch.setattr(stored_tensors._File, "_now", lambda self: self._stamp)
    with pytest.raises(CheckpointError, match=rf"{file.name} ends \d+ bytes too early"):
        model(IDS)
    assert readers() == []


@torch.no_grad()
def test_a_disk_that_fails_is_named_and_read_again(folder: Path, monkeypatch):
    model, expected = streamed(folder), resident(folder)(IDS).logits

    def fail(self, start, length):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(stored_tensors._File, "_forget", fail)
        with pytest.raises(CheckpointError, match="cannot be read at byte .*Input/output error"):
            model(IDS)
    assert readers() == []
    assert torch.equal(model(IDS).logits, expected)


# ------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("site", ["hook_resid_pre", "attn.hook_z", "hook_resid_post"])
@torch.no_grad()
def test_an_interrupt_while_computing_leaves_nothing_behind(folder: Path, site: str):
    model, expected = streamed(folder), resident(folder)(IDS).logits

    def interrupt(value, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run_with_hooks(IDS, fwd_hooks=[(f"blocks.2.{site}", interrupt)])
    assert readers() == [] and shown(model) == []
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_an_interrupt_while_waiting_stops_the_thread(folder: Path, monkeypatch):
    model, expected = streamed(folder), resident(folder)(IDS).logits
    monkeypatch.setattr(stored_tensors, "PIECE_BYTES", 64)
    original_read, original_wait = stored_tensors._File.read, streaming._Reading.wait
    waited = []

    def slow(self, start, target):
        time.sleep(0.002)
        original_read(self, start, target)

    def wait(self):
        waited.append(self.layer)
        if len(waited) == 3:
            # a signal, as it comes in the middle of what Python waits with, and to this thread
            press = (signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
            threading.Timer(0.05, *press).start()  # a part of the block has been read by then
        original_wait(self)

    with monkeypatch.context() as patched:
        patched.setattr(stored_tensors._File, "read", slow)
        patched.setattr(streaming._Reading, "wait", wait)
        # what a shell starts in the background ignores the signal, and Python then has no handler
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                model(IDS)
        finally:
            signal.signal(signal.SIGINT, before)
    assert waited == [0, 1, 2]
    assert readers() == [] and shown(model) == []
    assert model.placement._buffer_of(2) is None  # half a block counts as none
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_an_interrupt_while_a_thread_begins_gives_its_buffer_up(folder: Path, monkeypatch):
    """Nobody knows whether that thread runs; what it may write must not be another block's weights."""
    model, expected = streamed(folder), resident(folder)(IDS).logits
    start, orphans = streaming._Reading.start, []

    def interrupted(self):
        if self.layer == 2:
            orphans.append(self.buffer)
            raise KeyboardInterrupt
        start(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(streaming._Reading, "start", interrupted)
        model(IDS)
    assert readers() == [] and shown(model) == []
    assert orphans[0] not in model.placement._buffers and len(model.placement._buffers) == 2
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_an_interrupt_while_a_thread_is_stopped_leaves_it_to_the_next_run(
    folder: Path, monkeypatch
):
    model, expected = streamed(folder), resident(folder)(IDS).logits

    def interrupted(self):
        self._stop.set()
        raise KeyboardInterrupt

    def slow(self, start, target, read=stored_tensors._File.read):
        time.sleep(0.01)
        read(self, start, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stored_tensors._File, "read", slow)
        patched.setattr(streaming._Reading, "stop", interrupted)
        model.run_with_hooks(
            IDS, fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: 1 / 0)]
        )
    assert model.placement._reading is not None  # of which the next run can see the end
    assert torch.equal(model(IDS).logits, expected)
    assert readers() == [] and shown(model) == []


@pytest.mark.gpu
@torch.no_grad()
def test_blocks_run_on_a_gpu(folder: Path):
    ours = load_model(OPTForCausalLM, folder, device="cuda", dtype="float32", device_map="stream")
    expected = load_model(OPTForCausalLM, folder, device="cuda", dtype="float32")
    for _ in range(3):
        found, reference = ours(IDS).logits, expected(IDS).logits
        assert found.device.type == "cuda"
        torch.testing.assert_close(found, reference, **TOL[torch.float32])
