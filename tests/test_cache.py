"""A cache answers to full and short names, keeps the order of the run, and comes back from a file as it was."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config
from safetensors.torch import save_file

from optlens.cache import ActivationCache
from optlens.names import UnknownHookError

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))


@pytest.fixture(scope="module")
def cache() -> ActivationCache:
    with torch.no_grad():
        return random_model(tiny_config(num_hidden_layers=3)).run_with_cache(IDS)[1]


@pytest.mark.parametrize(
    "key, full",
    [
        ("blocks.2.attn.hook_pattern", "blocks.2.attn.hook_pattern"),
        (("pattern", 2), "blocks.2.attn.hook_pattern"),
        (("attn", 2), "blocks.2.attn.hook_pattern"),
        (("pattern", 2, "attn"), "blocks.2.attn.hook_pattern"),
        (("pattern", -1), "blocks.2.attn.hook_pattern"),
        (("resid_pre", -3), "blocks.0.hook_resid_pre"),
        ("k2", "blocks.2.attn.hook_k"),
        ("embed", "hook_embed"),
        ("hook_embed", "hook_embed"),
        (("hook_embed",), "hook_embed"),
        ("pos_embed", "hook_pos_embed"),
        ("scale", "ln_final.hook_scale"),
        ("normalized", "ln_final.hook_normalized"),
        (("scale", 1, "ln1"), "blocks.1.ln1.hook_scale"),
        (("normalized", -1, "ln2"), "blocks.2.ln2.hook_normalized"),
        ("scale1ln2", "blocks.1.ln2.hook_scale"),
        (("post", 0), "blocks.0.mlp.hook_post"),
        (("mlp_out", 0), "blocks.0.hook_mlp_out"),
    ],
    ids=str,
)
def test_names_for_one_value(cache, key, full):
    assert cache[key] is cache[full]
    assert key in cache and cache.full_name(key) == full


@pytest.mark.parametrize(
    "key, message",
    [
        (
            "blocks.2.attn.hook_patern",
            "Nothing was kept under 'blocks.2.attn.hook_patern'. Did you mean .*pattern",
        ),
        (("pattern", 3), "'blocks.3.attn.hook_pattern'. Did you mean"),
        (("pattern", -4), "Nothing was kept"),
        (("result", 0), "'blocks.0.attn.hook_result'"),  # not computed unless asked for
        (("scale", 1), "'blocks.1.hook_scale'. Did you mean"),
        (("blocks.0.hook_resid_pre", 1), "Nothing was kept"),  # a full name has its layer already
        ("zzz", "Nothing was kept under 'hook_zzz'"),
    ],
    ids=str,
)
def test_a_name_that_is_not_there_suggests_others(cache, key, message):
    with pytest.raises(UnknownHookError, match=message):
        cache[key]
    with pytest.raises(KeyError):
        cache[key]
    assert key not in cache
    assert cache.get(key) is None


def test_it_is_a_mapping_in_the_order_of_the_run(cache):
    names = list(cache)
    assert names[:3] == ["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre"]
    assert names[-1] == "ln_final.hook_normalized"
    assert len(cache) == len(names) == len(cache.items())
    assert dict(cache).keys() == cache.keys()
    assert 3 not in cache
    megabytes = sum(value.nbytes for value in cache.values()) / 1e6
    assert repr(cache) == f"ActivationCache({len(cache)} tensors, {megabytes:.1f} MB)"
    assert "empty" in str(
        pytest.raises(KeyError, ActivationCache({}, 1).__getitem__, "embed").value
    )


def test_one_name_of_all_layers_is_stacked(cache):
    stacked = cache.stack("resid_post")
    assert stacked.shape == (3, 2, 7, 32)
    torch.testing.assert_close(stacked[1], cache["resid_post", 1])
    torch.testing.assert_close(cache.stack("scale", "ln2")[2], cache["scale", 2, "ln2"])
    with pytest.raises(UnknownHookError, match="'blocks.0.hook_embed'"):
        cache.stack("embed")


def test_the_batch_axis_goes_once():
    with torch.no_grad():
        _, cache = random_model(tiny_config()).run_with_cache(IDS[:1])
    pattern = cache["pattern", 0][0]
    assert cache.remove_batch_dim() is cache and not cache.has_batch_dim
    torch.testing.assert_close(cache["pattern", 0], pattern)
    assert cache.remove_batch_dim()["pattern", 0].shape == (4, 7, 7)


def test_a_batch_of_two_keeps_its_axis(cache):
    with pytest.raises(ValueError, match=r"one prompt, but 'hook_embed' has shape \(2, 7, 32\)"):
        cache.remove_batch_dim()
    assert cache.has_batch_dim and cache["embed"].shape == (2, 7, 32)


def test_it_moves_as_one(cache):
    copy = ActivationCache(dict(cache), cache.n_layers)
    assert copy.to("meta") is copy
    assert {value.device.type for value in copy.values()} == {"meta"}
    assert cache["embed"].device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_file_gives_back_what_was_saved(dtype, tmp_path):
    """Names, order, values, dtypes, also of values that are views, and of gradients."""
    model = random_model(tiny_config(), dtype)
    _, cache = model.run_with_cache(
        IDS[:1], list(model.hook_dict), remove_batch_dim=True, return_type="loss", incl_bwd=True
    )
    cache.save(tmp_path / "cache.safetensors")
    again = ActivationCache.load(tmp_path / "cache.safetensors")
    assert list(again) == list(cache)
    assert (again.n_layers, again.has_batch_dim) == (2, False)
    for name, value in cache.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    torch.testing.assert_close(again["resid_post", -1], cache["resid_post", 1])
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no optlens data, not a ActivationCache"):
        ActivationCache.load(path)
