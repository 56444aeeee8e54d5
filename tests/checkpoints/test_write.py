import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_folders import IDS, contents, file_system, make, our_logits, their_logits
from conftest import TOL, VARIANTS, random_model, tiny_config
from safetensors import safe_open
from tiny_tokenizer import TRUE_FILES, needs_true_files, tiny_backend

from optlens.checkpoints import CheckpointError, load_model, save_model, shards, write
from optlens.model import OPTForCausalLM, OPTModel
from optlens.tokenizer import OPTTokenizer


@torch.no_grad()
def logits_of(model: OPTForCausalLM) -> torch.Tensor:
    return model(IDS).logits


def stored_keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys |= set(file.keys())
    return keys


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize("size", ["5GB", 20_000])
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_loads_it_with_the_same_logits(tmp_path: Path, name: str, size: int | str):
    model = random_model(tiny_config(**VARIANTS[name]))
    save_model(model, tmp_path / "out", max_shard_size=size)
    ours, theirs = logits_of(model), their_logits(tmp_path / "out")
    assert (ours - theirs).abs().max() < TOL[torch.float32]["rtol"] * theirs.abs().max()
    torch.testing.assert_close(our_logits(tmp_path / "out"), ours, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype):
    import transformers

    model = random_model(tiny_config(), dtype)
    save_model(model, tmp_path)
    ours = load_model(OPTForCausalLM, tmp_path, dtype=dtype).state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0)
        torch.testing.assert_close(theirs[name], expected, rtol=0, atol=0)


@torch.no_grad()
def test_base_model_comes_back(tmp_path: Path):
    import transformers

    model = random_model(tiny_config()).model
    save_model(model, tmp_path)
    expected = model(IDS).last_hidden_state
    ours = load_model(OPTModel, tmp_path)(IDS).last_hidden_state
    theirs = transformers.AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(theirs, expected, **TOL[torch.float32])
    assert not (tmp_path / "generation_config.json").exists()
    # the embedding is all that a language model adds, if they are tied
    whole = load_model(OPTForCausalLM, tmp_path)
    assert whole.lm_head.weight is whole.decoder.embed_tokens.weight


@torch.no_grad()
def test_what_transformers_saves_is_read(tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    config = transformers.OPTConfig(**tiny_config().to_dict())
    model = transformers.OPTForCausalLM(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    expected = model(IDS).logits
    assert (our_logits(tmp_path) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_unembedding_is_written_once(tmp_path: Path, tied: bool):
    save_model(random_model(tiny_config(tie_word_embeddings=tied)), tmp_path)
    assert ("lm_head.weight" in stored_keys(tmp_path)) is not tied


def test_unembedding_that_was_untied_by_hand_is_kept(tmp_path: Path):
    model = random_model(tiny_config())
    model.lm_head.weight = torch.nn.Parameter(torch.randn(101, 32))
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings, "saving changes the model"
    torch.testing.assert_close(our_logits(tmp_path), logits_of(model), rtol=0, atol=0)


def test_config_says_what_the_weights_are(tmp_path: Path):
    make(tmp_path / "in", dtype=torch.float16)
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float16"}))
    model = load_model(OPTForCausalLM, tmp_path / "in", dtype="float32")
    save_model(model, tmp_path / "out")
    before = json.loads(path.read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before.pop("torch_dtype") == before.pop("dtype") == "float16"
    assert after.pop("torch_dtype") == "float32"
    assert after == before, "all other keys, stale ones too, are as they were"


def test_generation_config_is_made_but_never_replaced(tmp_path: Path):
    path = tmp_path / "generation_config.json"
    save_model(random_model(tiny_config()), tmp_path)
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    assert json.loads(path.read_text()) == {"_from_model_config": True, **ids}
    path.write_text('{"temperature": 0.7}')
    save_model(random_model(tiny_config()), tmp_path)
    assert path.read_text() == '{"temperature": 0.7}'


@needs_true_files
def test_tokenizer_is_saved_with_the_model(tmp_path: Path):
    model = random_model(tiny_config(vocab_size=50272, hidden_size=4, word_embed_proj_dim=4))
    model.tokenizer = OPTTokenizer.from_folder(TRUE_FILES)
    save_model(model, tmp_path)
    again = load_model(OPTForCausalLM, tmp_path)
    assert again.to_tokens("I like you.").tolist() == [[2, 100, 101, 47, 4]]


@pytest.mark.parametrize("size", ["", "5", "GB", "-1GB", "five GB", 0, -3, "0B", True])
def test_what_is_no_size_is_refused(tmp_path: Path, size: int | str):
    with pytest.raises(ValueError, match="max_shard_size=.* is no size"):
        save_model(random_model(tiny_config()), tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ models that do not fit the format


def test_parameters_that_no_opt_has_are_named(tmp_path: Path):
    model = random_model(tiny_config())
    model.decoder.layers[0].fc1.lora_A = torch.nn.Linear(32, 2, bias=False)
    with pytest.raises(CheckpointError, match="model.decoder.layers.0.fc1.lora_A.weight.*Merge"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_that_contradict_the_config_are_named(tmp_path: Path):
    model = random_model(tiny_config())
    model.decoder.embed_tokens.weight = torch.nn.Parameter(torch.ones(103, 32))
    model.tie_weights()
    with pytest.raises(CheckpointError, match=r"has shape \[103, 32\], .* says \[101, 32\]"):
        save_model(model, tmp_path)


def test_model_without_values_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="has no values"):
        save_model(random_model(tiny_config()).to("meta"), tmp_path)


def test_numbers_that_a_checkpoint_does_not_hold_are_named(tmp_path: Path):
    model = random_model(tiny_config())
    layer = model.decoder.layers[1].fc1
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), False)
    with pytest.raises(
        CheckpointError, match=r"layers.1.fc1.weight is torch.float8_e4m3fn.*model.to"
    ):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value",
    [{1, 2}, torch.float16, [object()], {(1, 2): 3}, "\ud800"],
    ids=["set", "dtype", "object", "pair as key", "half a character"],
)
def test_config_values_that_json_does_not_hold_are_named(tmp_path: Path, value: object):
    model = random_model(tiny_config())
    model.config.extra["note"] = value
    with pytest.raises(
        CheckpointError, match="The config's 'note' cannot be written.*config.extra"
    ):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ saving over an earlier checkpoint


@pytest.mark.parametrize("before", ["5GB", 20_000, 9_000])
@pytest.mark.parametrize("after", ["5GB", 20_000])
@pytest.mark.parametrize("tokenizer", [False, True])
def test_an_earlier_save_leaves_no_trace(
    tmp_path: Path, before: int | str, after: int | str, tokenizer: bool
):
    earlier, model = (random_model(tiny_config(vocab_size=280), seed=seed) for seed in (1, 2))
    earlier.tokenizer = OPTTokenizer.from_tokenizers(tiny_backend())
    if tokenizer:
        model.tokenizer = OPTTokenizer.from_tokenizers(tiny_backend(), add_bos_token=False)
    save_model(earlier, tmp_path / "used", max_shard_size=before)
    (tmp_path / "used" / "added_tokens.json").write_text('{"<bot>": 266}')
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for folder in ("used", "fresh"):
        save_model(model, tmp_path / folder, max_shard_size=after)
    used = contents(tmp_path / "used")
    assert used.pop("notes.txt") == b"mine"
    assert used == contents(tmp_path / "fresh")


def test_a_tokenizer_that_waits_for_its_model_stays(tmp_path: Path):
    OPTTokenizer.from_tokenizers(tiny_backend()).save(tmp_path)
    save_model(random_model(tiny_config(vocab_size=280)), tmp_path)
    assert load_model(OPTForCausalLM, tmp_path).to_tokens("the cat").tolist() == [[2, 87, 260, 265]]


@pytest.mark.parametrize("layout", ["safetensors", "sharded"])
def test_a_model_is_saved_into_the_folder_it_is_mapped_from(tmp_path: Path, layout: str):
    folder = make(tmp_path, layout=layout)
    model = load_model(OPTForCausalLM, folder, device="cpu")
    before = logits_of(model)
    save_model(model, folder, max_shard_size=20_000)
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=0)
    torch.testing.assert_close(our_logits(folder), before, rtol=0, atol=0)
    with torch.no_grad():
        model.decoder.layers[0].fc1.weight.mul_(2)
    changed = logits_of(model)
    save_model(model, folder)
    torch.testing.assert_close(our_logits(folder), changed, rtol=0, atol=0)


def test_weights_of_another_format_stay_with_a_warning(tmp_path: Path):
    folder = make(tmp_path, layout="bin")
    original = (folder / "pytorch_model.bin").read_bytes()
    model = random_model(tiny_config())
    with pytest.warns(UserWarning, match=r"other weights from before \(pytorch_model.bin\)"):
        save_model(model, folder)
    assert (folder / "pytorch_model.bin").read_bytes() == original
    torch.testing.assert_close(our_logits(folder), logits_of(model), rtol=0, atol=0)


# ------------------------------------------------------------------ saving that fails


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an earlier checkpoint in shards."""
    save_model(random_model(tiny_config(), seed=1), tmp_path / "saved", max_shard_size=20_000)
    return tmp_path / "saved"


def break_writing(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """Make the writer of weights raise in the middle of its file number `after + 1`."""
    whole = write.write_safetensors
    written = []

    def failing(path, specs, tensor):
        if len(written) < after:
            written.append(path)
            whole(path, specs, tensor)
            return
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(write, "write_safetensors", failing)


@pytest.mark.parametrize("after", [0, 2])
def test_full_disk_leaves_the_earlier_checkpoint(saved: Path, monkeypatch, after: int):
    before = contents(saved)
    break_writing(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), after)
    model = random_model(tiny_config(), seed=2)
    with pytest.raises(
        CheckpointError, match="No space left.*disk is full; free 0.00 GB.*Nothing was"
    ):
        save_model(model, saved, max_shard_size=20_000)
    assert contents(saved) == before
    with pytest.raises(CheckpointError):
        save_model(model, saved.parent / "new" / "folder")
    assert [entry.name for entry in saved.parent.iterdir()] == ["saved"]


def test_interrupt_leaves_the_earlier_checkpoint(saved: Path, monkeypatch):
    before = contents(saved)
    break_writing(monkeypatch, KeyboardInterrupt(), after=1)
    with pytest.raises(KeyboardInterrupt):
        save_model(random_model(tiny_config(), seed=2), saved, max_shard_size=20_000)
    assert contents(saved) == before


def test_disk_that_is_too_small_is_noticed_before_writing(saved: Path, monkeypatch):
    before = contents(saved)
    usage = type("Usage", (), {"total": 10**9, "free": 1000})
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.delattr(write, "write_safetensors")
    with pytest.raises(
        CheckpointError, match="0.00 GB are needed, 0.00 GB are free. The disk is full"
    ):
        save_model(random_model(tiny_config(), seed=2), saved)
    assert contents(saved) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    with file_system(tmp_path, "1m"):
        yield tmp_path


def test_a_disk_that_is_really_full(small_disk: Path, monkeypatch):
    """It is filled until 20 kB are left; a tiny checkpoint has 100 kB."""
    # the check beforehand would notice; a quota, or another program writing, it would not
    monkeypatch.setattr(write, "check_room", lambda folder, needed: None)
    first, second = (random_model(tiny_config(), seed=seed) for seed in (1, 2))
    save_model(first, small_disk / "a")
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
    before = contents(small_disk)
    with pytest.raises(CheckpointError, match="No space left on device.*disk is full"):
        save_model(second, small_disk / "a")
    assert contents(small_disk) == before


def test_read_only_target(tmp_path: Path):
    """/sys takes no new folder even from root; elsewhere an unwritable folder does."""
    target = Path("/sys/optlens-checkpoint")
    if os.geteuid():
        tmp_path.chmod(0o500)
        target = tmp_path / "out"
    elif not Path("/sys").is_dir():
        pytest.skip("root can write everywhere here")
    message = "could not be saved to .*(not permitted|denied|Read-only).*another folder"
    with pytest.raises(CheckpointError, match=message):
        save_model(random_model(tiny_config()), target)


@pytest.mark.parametrize("inside", [False, True])
def test_target_that_is_a_file(tmp_path: Path, inside: bool):
    path = tmp_path / "model"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="could not be saved.*file"):
        save_model(random_model(tiny_config()), path / "deeper" if inside else path)
    assert contents(tmp_path) == {"model": b"mine"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_folder_with_the_name_of_a_file_stays(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    model = random_model(tiny_config(vocab_size=280))
    model.tokenizer = OPTTokenizer.from_tokenizers(tiny_backend())
    with pytest.raises(
        CheckpointError, match=f"its {name} is a folder. Rename that folder.*Nothing"
    ):
        save_model(model, tmp_path)
    assert contents(tmp_path) == {f"{name}/mine": b"mine"}


def test_target_that_is_a_dangling_link_or_has_no_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(
        CheckpointError, match="link: it is a link to nowhere, which does not exist"
    ):
        save_model(random_model(tiny_config()), "link")
    with pytest.raises(CheckpointError, match='no folder named "".*current folder is "."'):
        save_model(random_model(tiny_config()), "")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_message_without_advice_has_no_gap(tmp_path: Path, monkeypatch):
    break_writing(monkeypatch, OSError(errno.EIO, "I/O error"), after=0)
    with pytest.raises(CheckpointError, match="out: I/O error. Nothing was changed"):
        save_model(random_model(tiny_config()), tmp_path / "out")


def test_save_pretrained_and_from_pretrained_lead_here(tmp_path: Path):
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = OPTForCausalLM.from_pretrained(tmp_path, device="cpu", dtype="float64", progress=False)
    assert again.dtype == torch.float64
    torch.testing.assert_close(again.float()(IDS).logits, logits_of(model), **TOL[torch.float32])
