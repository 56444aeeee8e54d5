import json
from pathlib import Path

import pytest
from checkpoint_folders import make

from optlens.checkpoints import CheckpointError
from optlens.checkpoints.layout import WEIGHT_FILES, canonical, choose_weights, find_layout


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("model.decoder.layers.3.fc1.bias", "decoder.layers.3.fc1.bias"),
        ("decoder.layers.3.fc1.bias", "decoder.layers.3.fc1.bias"),
        ("lm_head.weight", "lm_head.weight"),
        ("decoder.version", None),
        ("model.decoder.version", None),
        ("model.layers.0.mlp.weight", "model.layers.0.mlp.weight"),
    ],
)
def test_canonical_spelling(stored: str, expected: str | None):
    assert canonical(stored) == expected


def test_safetensors_and_single_files_are_preferred():
    names = list(WEIGHT_FILES)
    assert [choose_weights(names[i:]) for i in range(4)] == names
    assert choose_weights({"config.json", "flax_model.msgpack"}) is None


@pytest.mark.parametrize("layout", ["sharded", "sharded-bin"])
def test_shards_stand_in_the_order_of_the_index(tmp_path: Path, layout: str):
    found = find_layout(make(tmp_path, layout=layout))
    assert len(found.files) > 2
    assert [path.name for path in found.files] == sorted(path.name for path in found.files)


@pytest.mark.parametrize("layout", ["sharded", "sharded-bin"])
def test_missing_shard_is_named(tmp_path: Path, layout: str):
    folder = make(tmp_path, layout=layout)
    gone = find_layout(folder).files[1]
    gone.rename(gone.with_name(gone.name + ".incomplete"))
    with pytest.raises(CheckpointError) as caught:
        find_layout(folder)
    message = str(caught.value)
    assert f"1 are missing ({gone.name})" in message
    assert f"A download did not finish ({gone.name}.incomplete)" in message


def test_unfinished_download_of_the_only_file_is_named(tmp_path: Path):
    folder = make(tmp_path)
    (folder / "model.safetensors").unlink()
    downloads = folder / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    (downloads / "abc.incomplete").touch()
    with pytest.raises(CheckpointError, match=r"no weights .* did not finish \(abc.incomplete\)"):
        find_layout(folder)


def test_shards_without_index(tmp_path: Path):
    folder = make(tmp_path, layout="sharded")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="without their index"):
        find_layout(folder)


def test_other_formats_are_listed(tmp_path: Path):
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(CheckpointError, match=r"found: tf_model.h5.* optlens reads .*model.safe"):
        find_layout(tmp_path)


def test_adapter_is_recognised(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        find_layout(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("<!DOCTYPE html><html>", "web page"),
        ('{"weight_map": ', "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "no 'weight_map'"),
        (json.dumps({"weight_map": {"decoder.a": "../secret.bin"}}), "not the name of a file"),
        (json.dumps({"weight_map": {"decoder.a": "/etc/passwd"}}), "not the name of a file"),
        (json.dumps({"weight_map": {"decoder.a": "..\\secret"}}), "not the name of a file"),
        (json.dumps({"weight_map": {"decoder.a": 3}}), "not the name of a file"),
    ],
)
def test_bad_index_is_named(tmp_path: Path, text: str, message: str):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        find_layout(tmp_path)
    assert str(index) in str(caught.value)
