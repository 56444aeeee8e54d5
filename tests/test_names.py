"""The table of hooks: every name has one row, one shape, and a short name that leads to it."""

from __future__ import annotations

import pytest
import torch
from conftest import VARIANTS, random_model, tiny_config
from einops import parse_shape

from optlens.config import OPTConfig
from optlens.names import (
    BLOCK,
    EMBEDDING,
    FINAL_NORM,
    OPTIONAL,
    UnknownHookError,
    get_act_name,
    hook_names,
    shape_of,
    spec_of,
)

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
# The names as they are promised.
PROMISED = """
hook_embed hook_pos_embed ln_final.hook_scale ln_final.hook_normalized
blocks.L.hook_resid_pre blocks.L.hook_resid_mid blocks.L.hook_resid_post
blocks.L.ln1.hook_scale blocks.L.ln2.hook_scale blocks.L.ln1.hook_normalized blocks.L.ln2.hook_normalized
blocks.L.hook_q_input blocks.L.hook_k_input blocks.L.hook_v_input blocks.L.hook_mlp_in
blocks.L.attn.hook_q blocks.L.attn.hook_k blocks.L.attn.hook_v blocks.L.attn.hook_z
blocks.L.attn.hook_attn_scores blocks.L.attn.hook_pattern blocks.L.attn.hook_result
blocks.L.hook_attn_out blocks.L.hook_mlp_out blocks.L.mlp.hook_pre blocks.L.mlp.hook_post
""".split()


def test_every_promised_name_is_there_and_no_other():
    config = tiny_config(num_hidden_layers=3)
    expected = {name.replace(".L.", f".{layer}.") for name in PROMISED for layer in range(3)}
    names = hook_names(config)
    assert len(names) == len(set(names))
    assert set(names) == expected
    required = hook_names(config, optional=False)
    assert [name for name in names if name in required] == required
    left_out = {name.split(".", 2)[2] for name in set(names) - set(required)}
    assert left_out == OPTIONAL == {
        "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "attn.hook_result",
    }  # fmt: skip


def test_names_follow_the_config(variant):
    model = random_model(tiny_config(**variant))
    names = hook_names(model.config)
    assert list(model.hook_dict) == names
    assert any(name.startswith("ln_final") for name in names) == model.config.has_final_layer_norm
    assert {name for name, point in model.hook_dict.items() if point.optional} == (
        set(names) - set(hook_names(model.config, optional=False))
    )


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_shape_is_what_the_table_says(variant):
    model = random_model(tiny_config(**VARIANTS[variant]))
    past = model(IDS[:, :2], use_cache=True).past_key_values
    for ids, more, key in ((IDS, {}, 7), (IDS[:, 2:], {"past_key_values": past}, 7)):
        _, cache = model.run_with_cache(ids, list(model.hook_dict), **more)
        for name, value in cache.items():
            assert value.shape == shape_of(name, model.config, 2, ids.shape[1], key), name
            axes = parse_shape(value, spec_of(name).shape.replace(" 1", " one"))
            sizes = {
                "batch": 2,
                "d_model": 32,
                "d_head": 8,
                "d_mlp": 64,
                "head": 4,
                "key": 7,
                "one": 1,
            }
            sizes |= {"pos": ids.shape[1], "query": ids.shape[1]}
            assert axes == {axis: sizes[axis] for axis in axes}, name


@pytest.mark.parametrize("name", [spec.name for spec in EMBEDDING + BLOCK + FINAL_NORM])
def test_short_names_lead_to_full_ones(name):
    in_block = name in {spec.name for spec in BLOCK}
    part, _, short = name.rpartition("hook_")
    part = part.rstrip(".")
    full = f"blocks.3.{name}" if in_block else name
    layer = 3 if in_block else None
    if part in ("ln1", "ln2"):
        assert get_act_name(short, layer, part) == full
        assert get_act_name(f"{short}3{part}") == full
    else:
        assert get_act_name(short, layer) == full
    assert get_act_name(full) == full
    assert spec_of(full).meaning


@pytest.mark.parametrize(
    "key, full",
    [
        (("k6",), "blocks.6.attn.hook_k"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("resid_pre5",), "blocks.5.hook_resid_pre"),
        (("attn", 2), "blocks.2.attn.hook_pattern"),
        (("attn_logits", 2), "blocks.2.attn.hook_attn_scores"),
        (("query", 2, "a"), "blocks.2.attn.hook_q"),
        (("mlp_post", 2), "blocks.2.mlp.hook_post"),
        (("post", 2, "m"), "blocks.2.mlp.hook_post"),
        (("resid_mid", 2, "block"), "blocks.2.hook_resid_mid"),
        (("z", "2"), "blocks.2.attn.hook_z"),
    ],
    ids=str,
)
def test_other_spellings(key, full):
    assert get_act_name(*key) == full


@pytest.mark.parametrize(
    "name", ["hook_z", "blocks.0.hook_z", "blocks.x.hook_resid_pre", "ln1.hook_scale", ""]
)
def test_a_name_that_no_opt_has(name):
    with pytest.raises(UnknownHookError, match=f"No OPT has a hook named '{name}'") as error:
        spec_of(name)
    assert isinstance(error.value, KeyError) and isinstance(error.value, ValueError)
    assert not str(error.value).startswith('"')


def test_shapes_are_known_without_a_model():
    config = OPTConfig.from_name("opt-6.7b")
    assert shape_of("blocks.31.attn.hook_pattern", config, 2, 5) == (2, 32, 5, 5)
    assert shape_of("blocks.0.attn.hook_attn_scores", config, 1, 3, key=9) == (1, 32, 3, 9)
    assert shape_of("blocks.0.attn.hook_result", config, 1, 3) == (1, 3, 32, 4096)
