import gc
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import (
    IDS,
    ROOT,
    make,
    maker,
    needs_proc,
    our_logits,
    peak_over_weights,
    their_logits,
)
from conftest import TOL, VARIANTS, tiny_config
from safetensors.torch import load_file, save_file
from tiny_tokenizer import TRUE_FILES, needs_true_files

from optlens.checkpoints import CheckpointError, load, load_model
from optlens.config import OPTConfig
from optlens.model import OPTForCausalLM, OPTModel


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ------------------------------------------------------------------ equal to transformers


@pytest.mark.parametrize("layout", maker.LAYOUTS)
@pytest.mark.parametrize("dialect", maker.DIALECTS)
def test_logits_equal_transformers_for_every_layout_and_spelling(
    tmp_path: Path, layout: str, dialect: str
):
    folder = make(tmp_path, layout=layout, dialect=dialect)
    ours = our_logits(folder)
    assert relative_error(ours, their_logits(folder)) < TOL[torch.float32]["rtol"]
    # and layout and spelling change nothing at all
    torch.testing.assert_close(ours, our_logits(make(tmp_path / "plain")), rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dialect", ["model", "decoder"])
def test_logits_equal_transformers_for_every_variant(tmp_path: Path, name: str, dialect: str):
    folder = make(tmp_path, tiny_config(**VARIANTS[name]), layout="sharded", dialect=dialect)
    assert relative_error(our_logits(folder), their_logits(folder)) < TOL[torch.float32]["rtol"]


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_of_the_dtype_equals_transformers(
    tmp_path: Path, layout: str, stored: torch.dtype
):
    folder = make(tmp_path, layout=layout, dtype=stored)
    ours = our_logits(folder)
    assert ours.dtype == torch.float32
    assert relative_error(ours, their_logits(folder)) < TOL[torch.float32]["rtol"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dialect", maker.DIALECTS)
@torch.no_grad()
def test_base_model_leaves_the_head_aside(tmp_path: Path, dialect: str, tied: bool):
    config = tiny_config(tie_word_embeddings=tied)
    base = load_model(OPTModel, make(tmp_path, config, dialect=dialect), device="cpu")
    whole = load_model(OPTForCausalLM, tmp_path, device="cpu")
    expected = whole.model(IDS).last_hidden_state
    torch.testing.assert_close(base(IDS).last_hidden_state, expected, rtol=0, atol=0)


def test_file_from_before_pytorch_1_6_equals_transformers(tmp_path: Path):
    folder = make(tmp_path, layout="bin", legacy=True)
    assert relative_error(our_logits(folder), their_logits(folder)) < TOL[torch.float32]["rtol"]


# ------------------------------------------------------------------ the unembedding


@pytest.mark.parametrize("dialect", maker.DIALECTS)
def test_tied_embeddings_are_one_parameter(tmp_path: Path, dialect: str):
    model = load_model(OPTForCausalLM, make(tmp_path, dialect=dialect))
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_head_that_contradicts_the_config_is_used_with_a_warning(tmp_path: Path, layout: str):
    """As transformers 5 does; the config then says what the model is."""
    folder = make(tmp_path, tiny_config(tie_word_embeddings=False), layout=layout)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="'lm_head.weight' differs from the embedding"):
        model = load_model(OPTForCausalLM, folder, device="cpu")
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.decoder.embed_tokens.weight
    assert relative_error(model(IDS).logits, their_logits(folder)) < TOL[torch.float32]["rtol"]


def test_nan_in_a_tied_embedding_does_not_untie_it(tmp_path: Path):
    path = make(tmp_path, dialect="model") / "model.safetensors"
    tensors = load_file(path)
    for name in ("lm_head.weight", "model.decoder.embed_tokens.weight"):
        tensors[name] = tensors[name].clone()
        tensors[name][50] = torch.nan
    save_file(tensors, path)
    assert load_model(OPTForCausalLM, tmp_path).config.tie_word_embeddings


def test_untied_head_must_be_there(tmp_path: Path):
    path = make(tmp_path, tiny_config(tie_word_embeddings=False)) / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor .*\(lm_head.weight\).*tie_word_emb"):
        load_model(OPTForCausalLM, tmp_path)


# ------------------------------------------------------------------ what comes back


def test_model_is_ready_to_use(tmp_path: Path):
    random_state = torch.get_rng_state()
    model = load_model(OPTForCausalLM, make(tmp_path))
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.tokenizer is None
    assert torch.equal(torch.get_rng_state(), random_state), "loading drew random numbers"


def test_loaded_weights_can_be_trained(tmp_path: Path):
    """Mapped weights are the process's own: an optimiser writes into them, not into the file."""
    folder = make(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(OPTForCausalLM, folder, device="cpu").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(IDS, labels=IDS).loss
    first.backward()
    optimizer.step()
    assert model(IDS, labels=IDS).loss < first
    assert (folder / "model.safetensors").read_bytes() == before


def test_tokenizer_that_is_a_dangling_link_is_not_left_out_in_silence(tmp_path: Path):
    folder = make(tmp_path)
    (folder / "tokenizer.json").symlink_to("blob")
    with pytest.raises(
        CheckpointError, match="tokenizer in .* cannot be read: .*json .* a link to blob, which"
    ):
        load_model(OPTForCausalLM, folder)


@needs_true_files
def test_tokenizer_comes_with_the_model(tmp_path: Path):
    make(tmp_path, tiny_config(vocab_size=50272, hidden_size=4, word_embed_proj_dim=4))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((TRUE_FILES / name).read_bytes())
    model = load_model(OPTForCausalLM, tmp_path)
    assert model.to_tokens("I like you.").tolist() == [[2, 100, 101, 47, 4]]
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be read: .*merges\.txt"):
        load_model(OPTForCausalLM, tmp_path)


@needs_true_files
def test_tokenizer_of_another_model_is_refused(tmp_path: Path):
    make(tmp_path)  # 101 rows
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((TRUE_FILES / name).read_bytes())
    with pytest.raises(CheckpointError, match="ids up to 50264.* only 101 rows"):
        load_model(OPTForCausalLM, tmp_path)


# ------------------------------------------------------------------ memory and bars


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the maps of /proc")
@pytest.mark.parametrize("layout", maker.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_in_the_wanted_dtype_stay_mapped(tmp_path: Path, layout: str, dtype: str):
    model = load_model(OPTForCausalLM, make(tmp_path, layout=layout), device="cpu", dtype=dtype)
    ranges = mapped_ranges(tmp_path)
    inside = [
        any(start <= parameter.data_ptr() < end for start, end in ranges)
        for parameter in model.parameters()
    ]
    assert set(inside) == {dtype == "float32"}


def mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """Return the addresses at which files of a folder are mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if f"{folder}/" in line]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


@needs_proc
@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_peak_memory_is_the_weights_and_one_tensor(tmp_path: Path, layout: str, dtype: str):
    """150 MB in float32, stored in float16; the allowance of 5 % is the allocator's."""
    config = OPTConfig.from_name(
        "125m", vocab_size=12000, num_hidden_layers=4, max_position_embeddings=64
    )
    big = make(
        tmp_path / "big", config, layout=layout, dtype=torch.float16, max_shard_bytes=3 * 10**7
    )
    small = make(tmp_path / "small", layout=layout, dtype=torch.float16)
    assert peak_over_weights(small, big, dtype) <= 1.05


def test_loading_does_not_import_the_compiler(tmp_path: Path):
    """Drawing random weights on the meta device would, which takes longer than the loading."""
    code = (
        "import sys; from optlens.model import OPTForCausalLM as M; early = set(sys.modules);"
        "M.from_pretrained(sys.argv[1], device='cpu').save_pretrained(sys.argv[1]);"
        "late = set(sys.modules) - early; print(sorted({'torch._dynamo', 'sympy'} & late))"
    )
    command = [sys.executable, "-c", code, str(make(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_rests_while_loading(tmp_path: Path, monkeypatch, enabled: bool):
    during = []
    whole = load._fill
    monkeypatch.setattr(load, "_fill", lambda *a: (during.append(gc.isenabled()), whole(*a)))
    monkeypatch.setattr(gc, "isenabled", lambda: bool(states[-1]))
    states = [enabled]
    monkeypatch.setattr(gc, "disable", lambda: states.append(False))
    monkeypatch.setattr(gc, "enable", lambda: states.append(True))
    load_model(OPTForCausalLM, make(tmp_path))
    assert during == [False]
    assert states[-1] is enabled
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_model(OPTForCausalLM, tmp_path)
    assert states[-1] is enabled


def test_bar_of_a_long_load_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr("tqdm.auto.tqdm", recording_bar(shown))
    folder = make(tmp_path)
    load_model(OPTForCausalLM, folder)
    load_model(OPTForCausalLM, folder, progress=False)
    assert shown == [True, False]


def recording_bar(shown: list[bool]) -> type:
    import tqdm

    class Bar(tqdm.tqdm):
        def __init__(self, *args, disable=False, **options):
            shown.append(not disable)
            super().__init__(*args, disable=True, **options)

    return Bar


@pytest.mark.gpu
def test_loading_to_the_gpu_keeps_the_stored_dtype(tmp_path: Path):
    folder = make(tmp_path, dtype=torch.float16)
    model = load_model(OPTForCausalLM, folder)
    assert model.device.type == "cuda"
    assert model.dtype == torch.float16
    theirs = their_logits(folder).double()
    ours = load_model(OPTForCausalLM, folder, dtype="float32")(IDS.cuda()).logits.cpu().double()
    assert relative_error(ours, theirs) < TOL[torch.float32]["rtol"]


def test_bar_counts_the_bytes_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"delay": 0, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    model = load_model(OPTForCausalLM, make(tmp_path, dtype=torch.float16), dtype="float32")
    stored = sum(parameter.numel() * 2 for parameter in model.parameters())
    assert (bars[0].n, bars[0].total, bars[0].unit) == (stored, stored, "B")
