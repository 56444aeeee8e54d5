import os
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoint_folders import IDS, needs_proc, peak_over_weights
from conftest import VARIANTS, random_model, tiny_config
from metaseq_folders import part_of, write_metaseq
from tiny_tokenizer import tiny_backend

from optlens.checkpoints import CheckpointError, load_model
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.metaseq import MetaseqFile
from optlens.checkpoints.read import Weights
from optlens.config import OPTConfig
from optlens.model import OPTForCausalLM, OPTModel
from optlens.tokenizer import OPTTokenizer

# what float32 weights need not lose on the way through a file
EXACT = {"rtol": 0, "atol": 0}


def load(folder: Path, **options) -> OPTForCausalLM:
    return load_model(OPTForCausalLM, folder, device="cpu", **options)


def assert_same_weights(model, other) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name].to(parameter.dtype), **EXACT)
    assert set(theirs) == {name for name, _ in model.named_parameters()}


# ------------------------------------------------------------------ the same model comes back


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fused", [True, False])
def test_parts_are_merged_to_the_model_they_were_made_of(tmp_path: Path, ranks: int, fused: bool):
    model = random_model(tiny_config(vocab_size=104))
    write_metaseq(tmp_path, model, ranks, fused=fused)
    loaded = load(tmp_path)
    assert_same_weights(loaded, model)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_every_variant_and_its_config_come_back(tmp_path: Path, variant: dict):
    model = random_model(tiny_config(**variant))
    write_metaseq(tmp_path, model)
    loaded = load(tmp_path)
    assert_same_weights(loaded, model)
    mine, theirs = loaded.config.to_dict(), model.config.to_dict()
    different = {key for key in theirs if mine[key] != theirs[key]}
    # a norm without weights leaves no trace, and gains of its own settings are not in the file
    assert different <= {"torch_dtype"}


def test_opt_350m_is_one_file_with_names_of_its_own(tmp_path: Path):
    model = random_model(tiny_config(**VARIANTS["post_ln_350m"]))
    (path,) = write_metaseq(tmp_path, model, name="reshard.pt")
    names = part_of(model, 0, 1)
    assert {"decoder.project_in_dim.weight", "decoder.project_out_dim.weight"} < set(names)
    assert "decoder.layer_norm.weight" not in names
    assert find_layout(tmp_path).files == (path,)
    assert_same_weights(load(tmp_path), model)


def test_rows_are_keys_values_queries(tmp_path: Path):
    """The order that the name gets wrong, on numbers that can be read off."""
    model = random_model(tiny_config())
    attention = model.decoder.layers[0].self_attn
    with torch.no_grad():
        for value, projection in enumerate(
            (attention.k_proj, attention.v_proj, attention.q_proj), start=1
        ):
            projection.weight.fill_(value)
    (path,) = write_metaseq(tmp_path, model)
    stored = torch.load(path, weights_only=False)["model"]
    fused = stored["decoder.layers.0.self_attn.qkv_proj.weight"]
    assert fused[:, 0].unique_consecutive().tolist() == [1, 2, 3]
    loaded = load(tmp_path).decoder.layers[0].self_attn
    values = [loaded.q_proj, loaded.k_proj, loaded.v_proj]
    assert [projection.weight[0, 0].item() for projection in values] == [3, 1, 2]


def test_config_of_a_published_size_needs_no_settings(tmp_path: Path):
    config = tiny_config(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=8)
    model = OPTForCausalLM(config).to(torch.float16)
    write_metaseq(tmp_path, model, ranks=1, settings={})
    found = Weights(find_layout(tmp_path))
    assert found.specs["decoder.layers.11.fc1.weight"] == ((8, 768), torch.float16)
    loaded = load_model(OPTModel, tmp_path, device="cpu")
    assert (loaded.config.n_heads, loaded.config.extra["torch_dtype"]) == (12, "float16")


def test_number_of_heads_is_asked_for_where_nothing_says_it(tmp_path: Path):
    write_metaseq(tmp_path, random_model(tiny_config()), settings={})
    with pytest.raises(CheckpointError, match="does not say how many attention heads.*config.json"):
        load(tmp_path)


def test_config_json_beside_the_parts_is_used(tmp_path: Path):
    model = random_model(tiny_config())
    write_metaseq(tmp_path, model, settings={})
    model.save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / "config.json", tmp_path / "config.json")
    assert_same_weights(load(tmp_path), model)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"no_scale_embedding": False}, "scaled by the root"),
        ({"decoder_learned_pos": False}, "fixed position embeddings"),
        ({"layernorm_embedding": True}, "a LayerNorm after the embedding"),
        ({"alibi": True}, "ALiBi"),
    ],
)
def test_what_no_opt_has_is_refused(tmp_path: Path, setting: dict, message: str):
    settings = {"args": {"decoder_attention_heads": 4, **setting}}
    write_metaseq(tmp_path, random_model(tiny_config()), settings=settings)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


# ------------------------------------------------------------------ settings of any kind


def test_settings_of_omegaconf_are_read_without_it(tmp_path: Path, monkeypatch):
    """Pickled classes of a package that is gone when the file is read."""
    with monkeypatch.context() as there:
        classes = {}
        for module, name in (("nodes", "AnyNode"), ("dictconfig", "DictConfig")):
            full = f"omegaconf.{module}"
            classes[name] = type(name, (), {"__module__": full})
            there.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
            there.setitem(sys.modules, full, ModuleType(full))
            setattr(sys.modules[full], name, classes[name])
        heads, table = classes["AnyNode"](), classes["DictConfig"]()
        heads._val, table._content = 4, {"decoder_attention_heads": heads}
        model = random_model(tiny_config())
        settings = {"cfg": {"model": table, "task": Namespace(seed=1)}}
        write_metaseq(tmp_path, model, settings=settings)
    file = MetaseqFile(find_layout(tmp_path).files, verify=True)
    assert file.settings == {"model": {"decoder_attention_heads": 4}, "task": {"seed": 1}}
    assert_same_weights(load(tmp_path), model)


class RunsCode:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_the_file_is_run(tmp_path: Path, legacy: bool):
    target = tmp_path / "was run"
    settings = {"args": RunsCode(target)}
    write_metaseq(tmp_path, random_model(tiny_config()), settings=settings, legacy=legacy)
    with pytest.raises(CheckpointError, match="refused, as loading it would run code"):
        load(tmp_path)
    assert not target.exists()


def test_file_from_before_pytorch_1_6(tmp_path: Path):
    model = random_model(tiny_config())
    settings = {"cfg": {"model": {"decoder_attention_heads": 4}}}
    write_metaseq(tmp_path, model, settings=settings, legacy=True)
    assert_same_weights(load(tmp_path), model)


# ------------------------------------------------------------------ memory


def test_a_single_part_stays_mapped(tmp_path: Path):
    write_metaseq(tmp_path, random_model(tiny_config()))
    weights = Weights(find_layout(tmp_path))
    name = "decoder.layers.1.self_attn.q_proj.weight"
    fused = (
        weights._file(weights.layout.files[0])
        .parts[0]
        .tensor("decoder.layers.1.self_attn.qkv_proj.weight")
    )
    start = fused.untyped_storage().data_ptr()
    assert weights.tensor(name).data_ptr() == start + 2 * fused.nbytes // 3


@needs_proc
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_are_merged_one_tensor_at_a_time(tmp_path: Path, dtype: str):
    """150 MB in float32, stored in float16 in four parts; the allowance is for the merged tensor."""
    config = OPTConfig.from_name(
        "125m", vocab_size=12000, num_hidden_layers=4, max_position_embeddings=64
    )
    small = tiny_config(vocab_size=104)
    for name, shape in (("big", config), ("small", small)):
        write_metaseq(tmp_path / name, OPTForCausalLM(shape).half(), ranks=4)
    assert peak_over_weights(tmp_path / "small", tmp_path / "big", dtype) <= 1.25


def test_tokenizer_beside_the_parts_is_read(tmp_path: Path):
    write_metaseq(tmp_path, random_model(tiny_config(vocab_size=272)))
    tokenizer = OPTTokenizer.from_tokenizers(tiny_backend())
    tokenizer.save(tmp_path / "tokenizer")
    os.replace(tmp_path / "tokenizer" / "vocab.json", tmp_path / "gpt2-vocab.json")
    assert load(tmp_path).tokenizer is None
    os.replace(tmp_path / "tokenizer" / "merges.txt", tmp_path / "gpt2-merges.txt")
    assert load(tmp_path).tokenizer.encode("the cat") == tokenizer.encode("the cat")


# ------------------------------------------------------------------ bad input


def test_missing_part_is_named(tmp_path: Path):
    paths = write_metaseq(tmp_path, random_model(tiny_config(vocab_size=104)), 4)
    paths[1].unlink()
    with pytest.raises(
        CheckpointError, match=r"over 4 parts, of which 1 .*reshard-model_part-1.pt"
    ):
        load(tmp_path)


def test_missing_last_parts_are_named(tmp_path: Path):
    """The numbers of the others do not tell; the shapes do."""
    paths = write_metaseq(tmp_path, random_model(tiny_config(vocab_size=104)), 4)
    paths[2].unlink()
    paths[3].unlink()
    with pytest.raises(CheckpointError, match="of which 2 .*_part-2.pt, reshard-model_part-3.pt"):
        load(tmp_path)


def test_one_part_twice(tmp_path: Path):
    paths = write_metaseq(tmp_path, random_model(tiny_config(vocab_size=104)), 4)
    paths[3].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match="part-3.pt holds the same part as .*part-1.pt"):
        load(tmp_path)


def test_part_too_many(tmp_path: Path):
    paths = write_metaseq(tmp_path, random_model(tiny_config(vocab_size=104)), 2)
    (tmp_path / "reshard-model_part-2.pt").write_bytes(paths[0].read_bytes())
    with pytest.raises(CheckpointError, match="holds 3 parts, but .* split over 2"):
        load(tmp_path)


def test_parts_of_two_sets(tmp_path: Path):
    model = random_model(tiny_config(vocab_size=104))
    write_metaseq(tmp_path, model, 2)
    write_metaseq(tmp_path, model, 2, name="checkpoint-model_part-{}.pt")
    with pytest.raises(CheckpointError, match=r"parts of 2 checkpoints \(checkpoint, reshard\)"):
        load(tmp_path)


def test_parts_of_two_models(tmp_path: Path):
    write_metaseq(tmp_path, random_model(tiny_config(vocab_size=104)), 2)
    second = tmp_path / "reshard-model_part-1.pt"
    longer = random_model(tiny_config(vocab_size=104, num_hidden_layers=3))
    wider = random_model(tiny_config(vocab_size=104, ffn_dim=72))
    for other, message in (
        (longer, "only one of them has decoder.layers.2"),
        (wider, r"\[36, 32\]"),
    ):
        torch.save({"model": part_of(other, 1, 2)}, second)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_ranks_that_disagree_about_a_shared_tensor_give_a_warning(tmp_path: Path):
    paths = write_metaseq(tmp_path, random_model(tiny_config(vocab_size=104)), 2)
    values = torch.load(paths[1], weights_only=False)
    values["model"]["decoder.layer_norm.bias"] += 0.5
    torch.save(values, paths[1])
    with pytest.warns(UserWarning, match=r"'decoder.layer_norm.bias' .* differs by up to 0.5"):
        load(tmp_path)


def test_truncated_part_is_named(tmp_path: Path):
    paths = write_metaseq(tmp_path, random_model(tiny_config(vocab_size=104)), 2)
    os.truncate(paths[1], paths[1].stat().st_size // 2)
    with pytest.raises(CheckpointError, match="part-1.pt cannot be read.*cut short or damaged"):
        load(tmp_path)


def test_corrupted_tensor_of_a_part_is_named(tmp_path: Path):
    (path,) = write_metaseq(tmp_path, random_model(tiny_config()))
    content = bytearray(path.read_bytes())
    name = "decoder.layers.1.fc2.weight"
    wanted = torch.load(path, weights_only=False)["model"][name].numpy().tobytes()
    content[content.index(wanted) + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"'{name}' is corrupted"):
        load(tmp_path)


def test_flattened_shards_of_training_are_refused(tmp_path: Path):
    (tmp_path / "checkpoint_last-model_part-0-shard0.pt").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="flattened shards.*reshard_fsdp"):
        load(tmp_path)


def test_file_that_holds_no_model(tmp_path: Path):
    torch.save({"model": [1, 2]}, tmp_path / "reshard.pt")
    with pytest.raises(CheckpointError, match='no table of tensors under "model"'):
        load(tmp_path)
    torch.save({"model": {"decoder.layers.0.flat_param_0": torch.ones(3)}}, tmp_path / "reshard.pt")
    with pytest.raises(CheckpointError, match="no OPT of metaseq.*reshard_fsdp"):
        load(tmp_path)
