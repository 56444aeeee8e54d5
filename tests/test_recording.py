"""A recording as a thing to keep: saved, loaded without its model, attached to it again."""

import pytest
import torch
from conftest import random_model, tiny_config

import optlens
from optlens.checks import InputError
from optlens.recording import NotRecordedError, fingerprint
from optlens.weight_sample import weight_sample

TOKENS = torch.tensor([2, 10, 20, 30, 40, 50, 60])


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A recording and the file it was saved to."""
    rec = tiny_model.record(TOKENS, what=("attention", "residual", "logit_lens", "z"))
    rec.save(tmp_path / "rec.safetensors")
    return rec, tmp_path / "rec.safetensors"


def test_round_trip(saved, tiny_model):
    rec, path = saved
    loaded = optlens.Recording.load(path)
    for value in ("attention", "residual", "tokens", "mask"):
        torch.testing.assert_close(getattr(loaded, value), getattr(rec, value), rtol=0, atol=0)
    torch.testing.assert_close(loaded["z"], rec["z"], rtol=0, atol=0)
    assert loaded.str_tokens == rec.str_tokens
    assert loaded.prompt == rec.prompt
    assert (loaded.layers, loaded.heads, loaded.positions) == (rec.layers, rec.heads, rec.positions)
    assert loaded.metadata == rec.metadata
    assert loaded.metadata["config"] == tiny_model.config.to_dict()
    assert loaded.metadata["model_dtype"] == "torch.float32"
    assert set(loaded.metadata["versions"]) == {"optlens", "torch"}
    assert repr(loaded) == repr(rec)


def test_loaded_lens_answers_what_was_stored_and_the_model_the_rest(saved, tiny_model):
    rec, path = saved
    loaded, lens = optlens.Recording.load(path), rec.logit_lens()
    stored = loaded.logit_lens()
    torch.testing.assert_close(stored.top_tokens, lens.top_tokens)
    torch.testing.assert_close(stored.kl, lens.kl)
    with pytest.raises(NotRecordedError, match="top 10 .* top_k=11"):
        loaded.logit_lens(top_k=11)
    with pytest.raises(NotRecordedError, match="attach"):
        _ = loaded.logits
    rare = int(set(range(101)).difference(lens.top_tokens.flatten().tolist()).pop())
    with pytest.raises(NotRecordedError, match="needs the model"):
        stored.rank(rare)
    full = loaded.logit_lens(top_k=11, model=tiny_model)
    assert full.top_tokens.shape[-1] == 11
    torch.testing.assert_close(loaded.logits, rec.logits)


def test_stored_lens_ranks_a_token_that_it_holds(tiny_model, tmp_path):
    model = random_model(tiny_config(vocab_size=8))  # the stored top k is the whole vocabulary
    rec = model.record(torch.tensor([2, 3, 4, 5]))
    rec.save(tmp_path / "rec")
    lens, stored = rec.logit_lens(), optlens.Recording.load(tmp_path / "rec").logit_lens(top_k=1)
    torch.testing.assert_close(stored.rank(6), lens.rank(6), check_dtype=False)
    torch.testing.assert_close(stored.prob(6), lens.prob(6))


def test_another_model_is_refused(saved):
    _, path = saved
    with pytest.raises(ValueError, match="not the model that was recorded"):
        optlens.Recording.load(path).attach(random_model(tiny_config(), seed=1))


def test_the_same_model_is_recognised_after_saving_and_in_a_wider_dtype(saved, tmp_path):
    rec, path = saved
    rec.model.save_pretrained(tmp_path / "model")
    again = optlens.load(tmp_path / "model")
    again.config.use_cache = not again.config.use_cache
    assert fingerprint(again) == rec.metadata["fingerprint"]
    optlens.Recording.load(path).attach(again.double())
    with pytest.raises(ValueError, match=r"torch\.float32.*torch\.bfloat16.*rounded"):
        optlens.Recording.load(path).attach(again.to(torch.bfloat16))


@pytest.mark.parametrize("axis", [0, 1], ids=["row", "column"])
@pytest.mark.parametrize("name", ["q_proj", "out_proj", "fc1", "fc2", "embed_tokens"])
def test_fingerprint_sees_a_change_to_any_row_or_column(tiny_model, name, axis):
    before = fingerprint(tiny_model)
    modules = dict(tiny_model.named_modules())
    weight = next(m for full, m in modules.items() if full.endswith(name)).weight
    for index in range(weight.shape[axis]):
        with torch.no_grad():
            kept = weight.select(axis, index).clone()
            weight.select(axis, index).zero_()
            changed = fingerprint(tiny_model)
            weight.select(axis, index).copy_(kept)
        assert changed != before or kept.abs().max() == 0, index


@pytest.mark.parametrize("rows", range(1, 14))
@pytest.mark.parametrize("columns", range(1, 14))
@pytest.mark.parametrize("transposed", [False, True])
def test_a_sample_meetsweight_sample(rows, columns, transposed):
    places = torch.arange(rows * columns)
    places = places.view(columns, rows).t() if transposed else places.view(rows, columns)
    flat = weight_sample(places).flatten()
    where = [(places == place).nonzero()[0].tolist() for place in flat]
    met_rows, met_columns = (set(numbers) for numbers in zip(*where, strict=True))
    assert (len(met_rows), len(met_columns)) == (rows, columns)
    assert len(flat) == max(rows, columns)  # and no more


def test_fingerprint_follows_weights_and_config_not_dtype(tiny_model):
    before = fingerprint(tiny_model)
    assert fingerprint(random_model(tiny_config())) == before
    assert fingerprint(tiny_model.double()) == before
    assert fingerprint(random_model(tiny_config(activation_function="gelu"))) != before
    with torch.no_grad():
        tiny_model.decoder.layers[0].fc1.bias += 1
    assert fingerprint(tiny_model) != before


@pytest.mark.parametrize("attribute", ["attention", "residual", "logits"])
def test_what_was_not_recorded_names_the_what_to_add(tiny_model, attribute):
    rec = tiny_model.record(TOKENS, what="z")
    needed = "residual" if attribute == "logits" else attribute
    with pytest.raises(
        NotRecordedError, match=rf"holds z but not '{needed}'.*what=\('z', '{needed}'\)"
    ):
        getattr(rec, attribute)


@pytest.mark.parametrize("layer", [2, 99, -3, 1.5, "x", None], ids=repr)
def test_a_layer_that_is_not_there_is_refused(saved, layer):
    rec, _ = saved
    for name in ("z", "attention", "resid_post"):
        with pytest.raises(InputError, match="no layer .* has layers 0 to 1, or -1 to -2"):
            rec[name, layer]


def test_layers_are_found_by_any_number(tiny_model):
    rec = tiny_model.record(TOKENS, what=("attention", "z", "blocks.0.mlp.hook_post"), layers=1)
    for layer in (1, -1, "1", torch.tensor(1)):
        torch.testing.assert_close(rec["z", layer], rec["z"][0], rtol=0, atol=0)
        torch.testing.assert_close(rec["attention", layer], rec.attention[0], rtol=0, atol=0)
    assert rec["post", -2].equal(rec["blocks.0.mlp.hook_post"])
    with pytest.raises(NotRecordedError, match=r"but not 'blocks\.0\.attn\.hook_z'"):
        rec["z", 0]
    with pytest.raises(NotRecordedError, match=r"but not 'blocks\.1\.mlp\.hook_post'"):
        rec["post", 1]


def test_what_is_not_stacked_by_layer_takes_no_layer(saved):
    rec, _ = saved
    with pytest.raises(InputError, match="rows embed, 0, 1.*resid_post"):
        rec["residual", 1]
    assert rec["residual"].equal(rec.residual)
    with pytest.raises(InputError, match=r"rec\.logit_lens\(\) has top_tokens"):
        rec["logit_lens"]


def test_a_hook_that_was_not_recorded_is_named(saved):
    rec, _ = saved
    with pytest.raises(NotRecordedError, match="but not 'resid_mid'"):
        rec["resid_mid"]
    with pytest.raises(NotRecordedError, match=r"but not 'blocks\.0\.attn\.hook_q'"):
        rec["q", 0]


def test_damaged_and_foreign_files_are_refused(saved, tiny_model, tmp_path):
    _, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        optlens.Recording.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        optlens.Recording.load(tmp_path / "nothing")
    _, cache = tiny_model.run_with_cache(TOKENS)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds ActivationCache, not a Recording"):
        optlens.Recording.load(tmp_path / "cache")


def test_saving_where_it_cannot_leaves_the_old_file(saved, monkeypatch, tmp_path):
    rec, path = saved
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="Nothing was changed"):
        rec.save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rec.safetensors"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        rec.save(tmp_path / "missing" / "rec")
