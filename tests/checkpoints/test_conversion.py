import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from checkpoint_folders import IDS, contents, file_system, make, maker, our_logits, their_logits
from conftest import TOL, random_model, tiny_config
from metaseq_folders import write_metaseq
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_backend

from optlens.checkpoints import CheckpointError, conversion, convert, load_model, manifest, shards
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.read import Weights
from optlens.model import OPTForCausalLM, OPTModel
from optlens.tokenizer import OPTTokenizer

# The tiny checkpoint has 100 kB in float32: six shards.
OPTIONS = {"shard_size": 20_000, "progress": False}
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source", layout="sharded-bin", dialect="decoder-version")


def assert_same(folder: Path, original: Path, dtype: torch.dtype = torch.float32) -> None:
    """Check that a folder holds the tensors of another, rounded to a dtype."""
    new, old = Weights(find_layout(folder)), Weights(find_layout(original))
    wanted = set(old.specs) - {"lm_head.weight"} | {"decoder.embed_tokens.weight"}
    assert set(new.specs) - {"lm_head.weight"} == wanted
    for name in wanted:
        stored = name if name in old.specs else "lm_head.weight"
        torch.testing.assert_close(new.tensor(name), old.tensor(stored).to(dtype), **EXACT)


def stop_after(monkeypatch, files: int, error: BaseException) -> None:
    """Let writing raise after so many finished files, when half of the next is written."""
    write, calls = conversion.write_safetensors, []

    def breaking(path, specs, tensor, digest):
        calls.append(path)
        if len(calls) > files:
            path.write_bytes(b"half of it")
            raise error
        write(path, specs, tensor, digest)

    monkeypatch.setattr(conversion, "write_safetensors", breaking)


# ------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("layout", maker.LAYOUTS)
@pytest.mark.parametrize("dialect", maker.DIALECTS)
def test_every_layout_becomes_sharded_safetensors(tmp_path: Path, layout: str, dialect: str):
    folder = make(tmp_path / "source", layout=layout, dialect=dialect)
    made = convert(folder, tmp_path / "new", **OPTIONS)
    assert len(made.checksums) > 3
    assert (made.kept, made.dtype) == (0, torch.float32)
    assert_same(tmp_path / "new", folder)
    torch.testing.assert_close(our_logits(tmp_path / "new"), our_logits(folder), **EXACT)


def test_result_equals_transformers(tmp_path: Path, source: Path):
    convert(source, tmp_path / "new", **OPTIONS)
    expected = their_logits(tmp_path / "new")
    torch.testing.assert_close(our_logits(source), expected, **TOL[torch.float32])


def test_every_variant(tmp_path: Path, variant: dict):
    folder = make(tmp_path / "source", tiny_config(**variant), layout="bin")
    convert(folder, tmp_path / "new", **OPTIONS)
    torch.testing.assert_close(our_logits(tmp_path / "new"), our_logits(folder), **EXACT)


@pytest.mark.parametrize("ranks", [1, 4])
def test_original_files_of_metaseq(tmp_path: Path, ranks: int):
    model = random_model(tiny_config(vocab_size=104), dtype=torch.float16)
    write_metaseq(tmp_path / "source", model, ranks)
    made = convert(tmp_path / "source", tmp_path / "new", **OPTIONS)
    assert made.dtype == torch.float16
    loaded = load_model(OPTForCausalLM, tmp_path / "new", device="cpu", dtype="float16")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, **EXACT)


def test_tokenizer_of_metaseq_becomes_one_that_is_loaded(tmp_path: Path):
    write_metaseq(tmp_path / "source", random_model(tiny_config(vocab_size=272)))
    OPTTokenizer.from_tokenizers(tiny_backend()).save(tmp_path / "tokenizer")
    for ours, theirs in (("vocab.json", "gpt2-vocab.json"), ("merges.txt", "gpt2-merges.txt")):
        shutil.copy(tmp_path / "tokenizer" / ours, tmp_path / "source" / theirs)
    convert(tmp_path / "source", tmp_path / "new", **OPTIONS)
    expected = OPTTokenizer.from_folder(tmp_path / "tokenizer").encode("the cat")
    assert load_model(OPTForCausalLM, tmp_path / "new").tokenizer.encode("the cat") == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_changed_on_the_way(tmp_path: Path, source: Path, dtype: torch.dtype):
    made = convert(source, tmp_path / "new", dtype=dtype, **OPTIONS)
    assert made.dtype == dtype
    assert made.bytes == tiny_config().parameter_count() * dtype.itemsize
    assert_same(tmp_path / "new", source, dtype)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert config["prefix"] == "</s>"  # a key that optlens has no use for


def test_small_files_come_along(tmp_path: Path, source: Path):
    OPTTokenizer.from_tokenizers(tiny_backend()).save(source)
    (source / "generation_config.json").write_text('{"max_length": 7}')
    convert(source, tmp_path / "new", **OPTIONS)
    old, new = contents(source), contents(tmp_path / "new")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "generation_config.json"):
        assert new[name] == old[name]


def test_checksums_are_those_of_the_files(tmp_path: Path, source: Path):
    made = convert(source, tmp_path / "new", **OPTIONS)
    files = contents(tmp_path / "new")
    kept = json.loads(files["conversion.json"])
    assert kept["done"] == made.checksums
    for name, digest in made.checksums.items():
        assert hashlib.sha256(files[name]).hexdigest() == digest


def test_files_are_no_larger_than_asked_for(tmp_path: Path, source: Path):
    made = convert(source, tmp_path / "new", shard_size="20kB", progress=False)
    header = 1000
    sizes = [(tmp_path / "new" / name).stat().st_size for name in made.checksums]
    assert max(sizes) < 20_000 + header
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == made.bytes


def test_heads_of_other_tasks_are_kept(tmp_path: Path):
    folder = make(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors") | {"score.weight": torch.ones(3, 32)}
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "new", **OPTIONS)
    assert Weights(find_layout(tmp_path / "new")).tensor("score.weight").shape == (3, 32)
    load_model(OPTModel, tmp_path / "new")


def test_an_untied_head_is_kept(tmp_path: Path):
    folder = make(tmp_path / "source", tiny_config(tie_word_embeddings=False))
    convert(folder, tmp_path / "new", **OPTIONS)
    torch.testing.assert_close(our_logits(tmp_path / "new"), our_logits(folder), **EXACT)
    base = {n: t for n, t in load_file(folder / "model.safetensors").items() if "lm_head" not in n}
    save_file(base, folder / "model.safetensors")  # what OPTModel saves
    convert(folder, tmp_path / "base", **OPTIONS)
    assert load_model(OPTModel, tmp_path / "base")(IDS).last_hidden_state.shape == (2, 7, 32)


def test_at_most_one_tensor_is_in_memory(tmp_path: Path, source: Path, monkeypatch):
    take, alive, most = conversion._Tensors.take, [], []

    def watched(self, name):
        most.append(sum(ref() is not None for ref in alive))
        tensor = take(self, name)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(conversion._Tensors, "take", watched)
    convert(source, tmp_path / "new", dtype="bfloat16", **OPTIONS)
    assert len(most) > 20
    assert max(most) <= 1


# ------------------------------------------------------------------ going on


def test_a_stopped_conversion_goes_on_where_it_stopped(tmp_path: Path, source: Path, monkeypatch):
    target = tmp_path / "new"
    whole = convert(source, tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as broken:
        stop_after(broken, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, **OPTIONS)
    names = sorted(contents(target))
    assert names == ["conversion.json", *sorted(whole.checksums)[:2]]
    before = {name: os.stat(target / name).st_mtime_ns for name in names[1:]}
    with pytest.raises(CheckpointError, match="a conversion that did not finish.*optlens convert"):
        load_model(OPTForCausalLM, target)
    made = convert(source, target, **OPTIONS)
    assert (made.kept, made.checksums) == (2, whole.checksums)
    assert before == {name: os.stat(target / name).st_mtime_ns for name in before}
    mine, theirs = contents(target), contents(tmp_path / "whole")
    assert mine == theirs


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_one_stopped_before_its_first_file_is_noted_goes_on(
    tmp_path: Path, source: Path, monkeypatch, error
):
    """The file stands under its name already; the next call must not take it for a stranger's."""

    def stop(self, file: str, digest: str) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(manifest.Manifest, "note", stop)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            convert(source, tmp_path / "new", **OPTIONS)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == 1
    convert(source, tmp_path / "new", **OPTIONS)
    assert_same(tmp_path / "new", source)


def test_a_killed_conversion_goes_on(tmp_path: Path, source: Path):
    """No code of the process runs at the end: what it was writing stays as a temporary file."""
    code = f"""
import time, sys
from optlens.checkpoints import conversion
write = conversion.write_safetensors
def slow(path, specs, tensor, digest):
    if len(conversion_done) == 2:
        path.write_bytes(b"half of it"); print("now", flush=True); time.sleep(60)
    write(path, specs, tensor, digest); conversion_done.append(path)
conversion_done = []
conversion.write_safetensors = slow
conversion.convert({str(source)!r}, {str(tmp_path / "new")!r}, shard_size=20_000, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    with pytest.raises(CheckpointError, match="Another conversion is writing"):
        convert(source, tmp_path / "new", **OPTIONS)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list((tmp_path / "new").glob(".optlens-*.tmp"))
    assert convert(source, tmp_path / "new", **OPTIONS).kept == 2
    assert not list((tmp_path / "new").glob(".optlens-*.tmp"))
    assert_same(tmp_path / "new", source)


def test_a_finished_conversion_is_left_as_it_is(tmp_path: Path, source: Path, monkeypatch):
    first = convert(source, tmp_path / "new", **OPTIONS)
    before = contents(tmp_path / "new")
    monkeypatch.delattr(conversion, "write_safetensors")
    again = convert(source, tmp_path / "new", **OPTIONS)
    assert again.kept == len(first.checksums)
    assert contents(tmp_path / "new") == before


def test_a_damaged_file_is_written_again(tmp_path: Path, source: Path):
    made = convert(source, tmp_path / "new", **OPTIONS)
    before = contents(tmp_path / "new")
    first, second = list(made.checksums)[1:3]
    content = bytearray(before[first])
    content[-1] ^= 1
    (tmp_path / "new" / first).write_bytes(content)
    (tmp_path / "new" / second).unlink()
    with pytest.warns(UserWarning) as said:
        again = convert(source, tmp_path / "new", **OPTIONS)
    assert [f"{first} was finished, but is damaged" in str(said[0].message)] == [True]
    assert f"{second} was finished, but is gone" in str(said[1].message)
    assert again.kept == len(made.checksums) - 2
    assert contents(tmp_path / "new") == before


def test_a_lost_config_is_written_again(tmp_path: Path, source: Path):
    convert(source, tmp_path / "new", **OPTIONS)
    before = contents(tmp_path / "new")
    (tmp_path / "new" / "config.json").unlink()
    convert(source, tmp_path / "new", **OPTIONS)
    assert contents(tmp_path / "new") == before


# ------------------------------------------------------------------ something else than before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "begun with dtype torch.float32, not torch.float16"),
        ({"shard_size": 30_000}, "begun with shard_size 20000, not 30000"),
    ],
)
def test_other_options_are_noticed(tmp_path: Path, source: Path, change: dict, message: str):
    convert(source, tmp_path / "new", **OPTIONS)
    before = contents(tmp_path / "new")
    with pytest.raises(CheckpointError, match=f"{message}.*restart=True"):
        convert(source, tmp_path / "new", **OPTIONS | change)
    assert contents(tmp_path / "new") == before
    made = convert(source, tmp_path / "new", **OPTIONS | change, restart=True)
    assert made.kept == 0
    found = {path.name for path in (tmp_path / "new").glob("*.safetensors")}
    assert found == set(made.checksums)
    assert_same(tmp_path / "new", source, made.dtype)


def test_a_changed_source_is_noticed(tmp_path: Path, source: Path, monkeypatch):
    with monkeypatch.context() as broken:
        stop_after(broken, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new", **OPTIONS)
    shutil.rmtree(source)
    make(source, layout="sharded-bin", dialect="decoder-version", seed=2)
    with pytest.raises(CheckpointError, match="its source has changed since .*restart"):
        convert(source, tmp_path / "new", **OPTIONS)
    convert(source, tmp_path / "new", **OPTIONS, restart=True)
    assert_same(tmp_path / "new", source)


def test_a_source_that_changes_under_way_is_noticed(tmp_path: Path, source: Path, monkeypatch):
    write = conversion.write_safetensors
    config = source / "config.json"

    def meddling(*given):
        os.utime(config, ns=(time.time_ns(), time.time_ns() + 10**9))
        write(*given)

    monkeypatch.setattr(conversion, "write_safetensors", meddling)
    with pytest.raises(CheckpointError, match="config.json in .* changed while it was being"):
        convert(source, tmp_path / "new", **OPTIONS)
    assert not (tmp_path / "new" / "config.json").exists()


def test_another_checkpoint_is_left_alone(tmp_path: Path, source: Path):
    other = make(tmp_path / "other")
    before = contents(other)
    with pytest.raises(CheckpointError, match="holds another checkpoint .*left alone"):
        convert(source, other, **OPTIONS, restart=True)
    assert contents(other) == before


def test_source_and_target_are_not_one(source: Path):
    before = contents(source)
    with pytest.raises(CheckpointError, match="are one folder"):
        convert(source, source / ".." / source.name, **OPTIONS)
    assert contents(source) == before


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"kind": "another"}',
        '{"kind": "optlens conversion", "source": {}, "dtype": "torch.float32", "shard_size": 1, '
        '"complete": false, "done": {}, "files": {"../precious.safetensors": []}}',
    ],
)
def test_a_manifest_that_is_none_removes_nothing(tmp_path: Path, source: Path, text: str):
    precious = tmp_path / "precious.safetensors"
    precious.write_text("precious")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "conversion.json").write_text(text)
    with pytest.raises(CheckpointError, match="not the manifest of a conversion"):
        convert(source, tmp_path / "new", **OPTIONS, restart=True)
    assert precious.exists()


# ------------------------------------------------------------------ bad input


def test_mixed_dtypes_need_a_choice(tmp_path: Path):
    folder = make(tmp_path / "source", dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.1.final_layer_norm.weight"
    save_file(tensors | {name: tensors[name].float()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"mixes dtypes .*{name} is torch.float32.*dtype="):
        convert(folder, tmp_path / "new", **OPTIONS)
    assert not (tmp_path / "new").exists()
    convert(folder, tmp_path / "new", dtype="float32", **OPTIONS)
    assert_same(tmp_path / "new", folder)


def test_values_that_do_not_fit_the_dtype_are_named(tmp_path: Path):
    folder = make(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.0.fc2.bias"
    tensors[name][3] = 1e5
    save_file(tensors, folder / "model.safetensors")
    options = OPTIONS | {"shard_size": "1GB"}
    with pytest.raises(CheckpointError, match=f"{name}' holds values up to 1e.05, .*bfloat16"):
        convert(folder, tmp_path / "new", dtype="float16", **options)
    assert not (tmp_path / "new").exists()
    convert(folder, tmp_path / "new", dtype="bfloat16", **options)


def test_infinite_values_are_carried_over(tmp_path: Path):
    folder = make(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layers.0.fc2.bias"][:2] = torch.tensor([torch.inf, torch.nan])
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "new", dtype="float16", **OPTIONS)
    found = Weights(find_layout(tmp_path / "new")).tensor("decoder.layers.0.fc2.bias")
    assert found[:2].isinf().tolist() == [True, False]
    assert found[:2].isnan().tolist() == [False, True]


def test_truncated_shard_is_named_and_nothing_is_written(tmp_path: Path, source: Path):
    path = find_layout(source).files[1]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{path.name} cannot be read"):
        convert(source, tmp_path / "new", **OPTIONS)
    assert not (tmp_path / "new").exists()


def test_wrong_index(tmp_path: Path):
    folder = make(tmp_path / "source", layout="sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = find_layout(folder).files[0].name, find_layout(folder).files[-1].name
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = last
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{last}: '{moved}' is missing, although the index"):
        convert(folder, tmp_path / "new", **OPTIONS)


def test_two_shards_that_claim_one_tensor(tmp_path: Path):
    folder = make(tmp_path / "source", layout="sharded")
    path = folder / "model.safetensors.index.json"
    text = path.read_text()
    first, last = find_layout(folder).files[0].name, find_layout(folder).files[-1].name
    name = "model.decoder.embed_tokens.weight"
    path.write_text(text.replace('"weight_map": {', f'"weight_map": {{ "{name}": "{last}", '))
    with pytest.raises(CheckpointError, match=f"'{name}' twice, as '{last}' and as '{first}'"):
        convert(folder, tmp_path / "new", **OPTIONS)
    path.write_text(text.replace(first, last, 0))
    tensors = load_file(folder / last)
    tensors[name.removeprefix("model.")] = torch.zeros(101, 32)  # the other spelling
    save_file(tensors, folder / last)
    with pytest.raises(CheckpointError, match=f"{last}: .* is the same tensor as '{name}'"):
        convert(folder, tmp_path / "new", **OPTIONS)


@pytest.mark.parametrize("size", ["", 0, "many"])
def test_what_is_no_size(tmp_path: Path, source: Path, size):
    with pytest.raises(ValueError, match="shard_size=.* is no size"):
        convert(source, tmp_path / "new", shard_size=size)


def test_what_is_no_folder(tmp_path: Path, source: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; name a folder"):
        convert(source, tmp_path / "file", **OPTIONS)
    with pytest.raises(CheckpointError, match='no folder named ""'):
        convert(source, "", **OPTIONS)


# ------------------------------------------------------------------ a failing disk


def test_disk_that_is_too_small_is_noticed_before_writing(
    tmp_path: Path, source: Path, monkeypatch
):
    usage = type("Usage", (), {"total": 10**9, "free": 1000})
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        CheckpointError, match="0.00 GB are free. Nothing was finished. The disk is"
    ):
        convert(source, tmp_path / "new" / "folder", **OPTIONS)
    assert not (tmp_path / "new").exists()


def test_disk_that_fills_up_half_way(tmp_path: Path, source: Path, monkeypatch):
    """The check beforehand passes, as when another program writes; room for three files of six."""
    monkeypatch.setattr(conversion, "check_room", lambda folder, needed: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    with file_system(disk, "1m"):
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(free - 80_000))
        with pytest.raises(
            CheckpointError, match="No space left .*of 6 files are finished and kept.*disk is full"
        ):
            convert(source, disk / "new", **OPTIONS)
        done = len(list((disk / "new").glob("*.safetensors")))
        assert 1 <= done <= 4
        assert not list((disk / "new").glob(".optlens*"))
        (disk / "ballast").unlink()
        assert convert(source, disk / "new", **OPTIONS).kept == done
        assert_same(disk / "new", source)


def test_a_disk_that_gives_back_something_else(tmp_path: Path, source: Path, monkeypatch):
    read = conversion.sha256_of
    last = []

    def flipped(path: Path) -> str:
        last[:] = [path]
        return "0" * 64 if path.name.startswith("model-00002") else read(path)

    monkeypatch.setattr(conversion, "sha256_of", flipped)
    with pytest.raises(CheckpointError, match="00002-of.* reads back differently.*check the disk"):
        convert(source, tmp_path / "new", **OPTIONS)
    assert not last[0].exists()
    assert not (tmp_path / "new" / "config.json").exists()
    monkeypatch.setattr(conversion, "sha256_of", read)
    assert convert(source, tmp_path / "new", **OPTIONS).kept == 5


def test_checksum_of_a_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40_000)
    assert manifest.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
