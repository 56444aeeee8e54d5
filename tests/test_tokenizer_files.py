"""A tokenizer's files: read as transformers reads them, written so that it can, refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_tokenizer import (
    OPT_SETTINGS,
    TRUE_FILES,
    needs_true_files,
    oracle_tokenizer,
    tiny_backend,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer

from optlens.tokenizer import OPTTokenizer


@pytest.fixture
def tiny() -> OPTTokenizer:
    return OPTTokenizer.from_tokenizers(tiny_backend())


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder with vocab.json and merges.txt alone, as in most opt checkpoints."""
    OPTTokenizer.from_tokenizers(tiny_backend()).save(tmp_path / "saved")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tmp_path / "saved" / name, folder)
    return folder


def write_json(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


# --- reading and writing -------------------------------------------------------------------------


def test_vocab_and_merges_alone(tiny, tiny_folder):
    for read in (
        OPTTokenizer.from_folder(tiny_folder),
        OPTTokenizer.from_files(tiny_folder / "vocab.json", tiny_folder / "merges.txt"),
    ):
        assert read.encode("the cat <pad></s>") == tiny.encode("the cat <pad></s>")
        assert read.bos_token_id == 2 and read.add_bos_token


def test_tokenizer_json_alone(tiny, tmp_path):
    backend = tiny_backend()
    backend.save(str(tmp_path / "tokenizer.json"))
    read = OPTTokenizer.from_folder(tmp_path)
    assert read.encode("the cat <pad></s>") == tiny.encode("the cat <pad></s>")
    assert (read.bos_token_id, read.pad_token_id) == (2, 1)


def test_tokenizer_json_comes_first(tiny_folder):
    tiny_backend(split=pre_tokenizers.ByteLevel(add_prefix_space=True)).save(
        str(tiny_folder / "tokenizer.json")
    )
    read = OPTTokenizer.from_folder(tiny_folder)
    assert read.decode(read.encode("cat")) == "</s> cat"


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "plain": PLAIN,
    "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    # cuts " cat" in two, though the vocabulary has it as one token
    "own": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", behavior="isolated"), PLAIN]),
}


@pytest.mark.parametrize("model_type", [None, "opt"])
@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_transformers_reads_what_we_save(tmp_path, model_type, add_bos, split):
    tokenizer = OPTTokenizer.from_tokenizers(tiny_backend(SPLITS[split]), add_bos_token=add_bos)
    tokenizer.save(tmp_path / "new" / "folder")
    if model_type:
        write_json(tmp_path / "new" / "folder", "config.json", {"model_type": model_type})
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    again = OPTTokenizer.from_folder(tmp_path / "new" / "folder")
    for text in ("the cat", " 12the 345 cat", "漢</s>x <pad>", "", "\n\n  the"):
        assert loaded(text)["input_ids"] == tokenizer.encode(text) == again.encode(text)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (2, 2, 1)
    assert again.add_bos_token is add_bos


def test_a_template_is_not_saved_where_nothing_goes_in_front(tmp_path):
    backend = tiny_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    tokenizer = OPTTokenizer.from_tokenizers(backend, add_bos_token=False)
    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the cat")["input_ids"] == tokenizer.encode("the cat")
    assert tokenizer.encode("the cat")[0] != 2


def test_a_space_in_front_if_the_settings_ask_for_it(tiny_folder):
    write_json(tiny_folder, "tokenizer_config.json", {**OPT_SETTINGS, "add_prefix_space": True})
    read, loaded = both(tiny_folder)
    assert read.encode("cat") == loaded("cat")["input_ids"] == [2, read.single_token(" cat")]


def test_settings_that_mean_nothing_to_us_are_written_back(tiny_folder, tmp_path):
    write_json(
        tiny_folder,
        "tokenizer_config.json",
        {**OPT_SETTINGS, "model_max_length": 2048, "name_or_path": "/somewhere/else"},
    )
    OPTTokenizer.from_folder(tiny_folder).save(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["model_max_length"] == 2048 and "name_or_path" not in written


def test_a_failed_save_leaves_the_old_files(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    true_write = Path.write_text

    def full_disk(path: Path, text: str, **options):
        if path.name == "merges.txt":
            raise OSError(28, "No space left on device", str(path))
        return true_write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full_disk)
    other = OPTTokenizer.from_tokenizers(tiny_backend(), add_bos_token=False)
    with pytest.raises(OSError, match=f"Cannot write .* to {tmp_path}: No space left"):
        other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_save_that_fails_between_two_files_leaves_the_old_ones(
    tiny, tmp_path, monkeypatch, number
):
    tiny.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rename, renames = os.replace, []

    def replace(source: Path, destination: Path) -> None:
        renames.append(source)
        if len(renames) == number:
            raise OSError(5, "Input/output error")
        rename(source, destination)

    other = OPTTokenizer.from_tokenizers(tiny_backend(), add_bos_token=False)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=f"to {tmp_path}: Input/output error. Nothing was changed"):
        other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_with_the_name_of_a_file_stays(tiny, tmp_path):
    (tmp_path / "vocab.json").mkdir()
    (tmp_path / "vocab.json" / "mine").touch()
    with pytest.raises(IsADirectoryError, match="its vocab.json is a folder"):
        tiny.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.json"]
    assert (tmp_path / "vocab.json" / "mine").exists()


def test_saving_over_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "taken").write_text("precious", encoding="utf-8")
    with pytest.raises(FileExistsError, match="Cannot write the tokenizer to .*taken"):
        tiny.save(tmp_path / "taken")
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "precious"


def test_saving_keeps_the_folders_other_files(tiny, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    tiny.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.json", "merges.txt", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    ]


@needs_true_files
def test_true_files_survive_saving(tmp_path):
    opt = OPTTokenizer.from_folder(TRUE_FILES)
    opt.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        saved, original = (folder / name for folder in (tmp_path, TRUE_FILES))
        assert saved.stat().st_size > 400_000
        assert read_entries(saved) == read_entries(original)
    text = "Paris is the capital of </s> 漢字 <pad> 👍🏽"
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), oracle_tokenizer()):
        assert loaded(text)["input_ids"] == opt.encode(text)


def read_entries(path: Path) -> object:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text.split("\n")


# --- special tokens as folders declare them ------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_folder_may_name_another_bos(tiny_folder, file):
    """Early revisions of opt checkpoints did; transformers obeys, so ids must follow."""
    write_json(tiny_folder, file, {"bos_token": {"content": "<s>", "lstrip": False}})
    write_json(tiny_folder, "config.json", {"model_type": "opt", "bos_token_id": 2})
    assert OPTTokenizer.from_folder(tiny_folder).bos_token_id == 0


def test_the_special_tokens_map_overrules_the_config(tiny_folder):
    write_json(tiny_folder, "tokenizer_config.json", {**OPT_SETTINGS, "pad_token": "<unk>"})
    write_json(tiny_folder, "special_tokens_map.json", {"pad_token": "<s>"})
    read, loaded = both(tiny_folder)
    assert read.pad_token_id == loaded.pad_token_id == 0


def both(folder: Path) -> tuple[OPTTokenizer, GPT2Tokenizer]:
    return OPTTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


def test_tokens_added_by_a_fine_tuning(tiny_folder):
    """Tokens that the vocabulary lacks get the ids that transformers gives them."""
    write_json(
        tiny_folder,
        "tokenizer_config.json",
        {
            **OPT_SETTINGS,
            "pad_token": "[PAD]",
            "mask_token": {"content": "[MASK]", "lstrip": True, "__type": "AddedToken"},
            "additional_special_tokens": ["<user>"],
        },
    )
    write_json(tiny_folder, "added_tokens.json", {"<bot>": 266})
    read, loaded = both(tiny_folder)
    added = ("<bot>", "[PAD]", "[MASK]", "<user>")
    assert [read.token_to_id(text) for text in added] == [266, 267, 268, 269]
    for text in ("<user>the cat <bot> 漢", "the [MASK] cat[PAD]"):
        assert read.encode(text) == loaded(text)["input_ids"]
    assert read.decode([2, 266, 267, 268], skip_special=True) == "<bot>"
    assert read.pad([[5], [5, 6]])[0].tolist() == [[267, 5], [5, 6]]


def test_the_table_of_added_tokens(tiny_folder):
    entry = {"content": "<bot>", "special": True, "lstrip": False, "rstrip": False}
    table = {"266": entry | {"normalized": False, "single_word": False}}
    write_json(
        tiny_folder, "tokenizer_config.json", {**OPT_SETTINGS, "added_tokens_decoder": table}
    )
    read, loaded = both(tiny_folder)
    assert read.encode("a<bot>b") == loaded("a<bot>b")["input_ids"]
    write_json(tiny_folder, "tokenizer_config.json", {"added_tokens_decoder": {"300": entry}})
    with pytest.raises(ValueError, match="'<bot>' the id 300, its vocabulary gives it 266"):
        OPTTokenizer.from_folder(tiny_folder)


def galactica_like() -> Tokenizer:
    backend = tiny_backend()
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    return backend


def test_a_vocabulary_without_bos_in_front(tmp_path):
    """Galactica's files name no special tokens; its config.json gives their ids."""
    galactica_like().save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    write_json(tmp_path, "config.json", {"model_type": "opt", **ids})
    read, loaded = both(tmp_path)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (0, 2, 1)
    assert read.encode("the cat") == loaded("the cat")["input_ids"]
    assert read.encode("<s>the cat")[0] == 0 and not read.add_bos_token
    write_json(tmp_path, "tokenizer_config.json", {"add_bos_token": True})
    assert OPTTokenizer.from_folder(tmp_path).encode("the cat")[0] == 0


def test_a_tokenizer_json_that_puts_its_own_token_in_front(tmp_path):
    backend = galactica_like()
    backend.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 3)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    assert OPTTokenizer.from_folder(tmp_path).encode("cat")[0] == 3


def test_the_models_default_ids_make_no_letter_special():
    """A vocabulary of another kind may hold a letter at id 2, OPT's default for bos."""
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3}, merges=[("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    read = OPTTokenizer(backend, {"bos_token_id": 2, "pad_token_id": 1})
    assert read.encode("abc") == [0, 3]
    assert read.bos_token_id is None and read.pad_token_id is None


# --- bad files -----------------------------------------------------------------------------------


def test_a_folder_that_is_missing_or_no_checkpoint(tmp_path, tiny_folder):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        OPTTokenizer.from_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="vocab.json and merges.txt; found: nothing"):
        OPTTokenizer.from_folder(tmp_path / "empty")
    (tiny_folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="Missing: merges.txt; found: vocab.json"):
        OPTTokenizer.from_folder(tiny_folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", b'{"<s>": 0, "<pad', "not valid JSON"),
        ("vocab.json", b'{"\xff": 0}', "not UTF-8"),
        ("vocab.json", b"[]", "holds a list"),
        ("vocab.json", b"{}", "at least one token"),
        ("vocab.json", b'{"a": 1, "b": 1}', "an id of its own"),
        ("vocab.json", b'{"a": "1"}', "token 'a' has id '1'"),
        ("vocab.json", b'{"a": 0, "b": -1}', "token 'b' has id -1, expected an integer >= 0"),
        ("vocab.json", b'{"a": 0, "b": true}', "token 'b' has id True"),
        ("vocab.json", b'{"a": [0]}', r"token 'a' has id \[0\]"),
        ("merges.txt", b"#version: 0.2\nh e\nhe\n", "line 3: 'he'"),
        ("merges.txt", b"h e\n\nh e r\n", "line 3: 'h e r'"),
        ("merges.txt", b"h e\nq z\n", "does not belong to .*vocab.json"),
        ("tokenizer.json", b'{"model": {', "holds no tokenizer"),
        ("tokenizer_config.json", b"<html>", "not valid JSON"),
        ("special_tokens_map.json", b"", "not valid JSON"),
        ("special_tokens_map.json", b"3", "holds an int"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "bos_token is 5, expected a token's text"),
        ("tokenizer_config.json", b'{"bos_token": {}, "eos_token": {"a": 1}}', "eos_token is {'a'"),
        (
            "tokenizer_config.json",
            b'{"additional_special_tokens": 3}',
            "tokens is an int, expected",
        ),
        ("tokenizer_config.json", b'{"extra_special_tokens": [[1]]}', r"tokens, 0 is \[1\]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "decoder is a list, expected"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"2": {}}}', "added token 2 is {}"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "a"}}', "has the id 'x'"),
        ("added_tokens.json", b'{"<bot>": [1]}', r"has the id '\[1\]'"),
    ],
)
def test_a_damaged_file_is_named(tiny_folder, file, content, message):
    (tiny_folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        OPTTokenizer.from_folder(tiny_folder)


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]
)
def test_a_file_that_is_a_dangling_link_or_a_folder(tiny_folder, file):
    path = tiny_folder / file
    path.unlink(missing_ok=True)
    path.symlink_to("blob")
    with pytest.raises(
        ValueError, match=f"{file} cannot be read: it is a link to blob, which does"
    ):
        OPTTokenizer.from_folder(tiny_folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"{file} cannot be read: it is a folder"):
        OPTTokenizer.from_folder(tiny_folder)


def test_merges_with_windows_line_ends_and_a_blank_line(tiny, tiny_folder):
    merges = (tiny_folder / "merges.txt").read_bytes()
    (tiny_folder / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n") + b"\r\n")
    assert OPTTokenizer.from_folder(tiny_folder).encode("the cat") == tiny.encode("the cat")


def test_a_vocabulary_larger_than_the_embedding(tiny_folder):
    OPTTokenizer.from_folder(tiny_folder, n_rows=266)
    with pytest.raises(ValueError, match="ids up to 265, the model's embedding only 265 rows"):
        OPTTokenizer.from_folder(tiny_folder, n_rows=265)


def test_an_added_token_beyond_the_embedding(tiny_folder):
    write_json(tiny_folder, "added_tokens.json", {"<bot>": 266})
    OPTTokenizer.from_folder(tiny_folder, n_rows=267)
    with pytest.raises(ValueError, match="ids up to 266, the model's embedding only 266 rows"):
        OPTTokenizer.from_folder(tiny_folder, n_rows=266)


def test_another_kind_of_tokenizer_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="byte-level BPE.*WordLevel"):
        OPTTokenizer.from_tokenizers(backend)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(ValueError, match="byte-level BPE.*got WordLevel"):
        OPTTokenizer.from_tokenizers(backend)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(["the cat"], trainers.BpeTrainer(vocab_size=10))
    with pytest.raises(ValueError, match="Whitespace"):
        OPTTokenizer.from_tokenizers(words)
