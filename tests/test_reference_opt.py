"""The oracle is checked itself: `reference_opt.py` against transformers' OPT in float64.

transformers' sdpa path is the one to trust there: its eager path casts the softmax to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, VARIANTS
from reference_opt import ACTIVATIONS, reference_forward
from transformers import OPTConfig, OPTForCausalLM
from transformers.activations import ACT2CLS, ACT2FN

PADDINGS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]],
    "both": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],
}
IDS = np.random.default_rng(5).integers(3, TINY["vocab_size"], size=(2, 7))


def peer(overrides: dict[str, Any], seed: int = 0) -> OPTForCausalLM:
    """Build an OPT of transformers in float64 with no gain of 1 and no bias of 0."""
    config = OPTConfig(**{**TINY, **overrides}, attn_implementation="sdpa")
    model = OPTForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise)
    return model


def reference(model: OPTForCausalLM, *args: Any, **kwargs: Any):
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return reference_forward(weights, model.config.to_dict(), *args, **kwargs)


def run(model: OPTForCausalLM, **inputs: Any) -> Any:
    given = {k: torch.as_tensor(v) for k, v in inputs.items() if v is not None}
    with torch.no_grad():
        return model(**given, output_hidden_states=True, use_cache=False)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-12) -> None:
    """Equal up to a fraction of the largest value: float64 rounding over a hundred additions is near 1e-14."""
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_residual_stream_equal_transformers(variant, padding):
    model = peer(VARIANTS[variant])
    mask = PADDINGS[padding]
    theirs = run(model, input_ids=IDS, attention_mask=mask)
    logits, values = reference(model, IDS, attention_mask=mask)

    real = np.ones(IDS.shape, bool) if mask is None else np.array(mask, bool)
    close(logits[real], theirs.logits.numpy()[real])
    # padding stands at position -1, and that is part of what is recorded
    close(values["blocks.0.hook_resid_pre"], theirs.hidden_states[0].numpy())
    for layer in range(TINY["num_hidden_layers"]):
        resid_pre = theirs.hidden_states[layer].numpy()
        close(values[f"blocks.{layer}.hook_resid_pre"][real], resid_pre[real])


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m"])
def test_position_ids_and_inputs_embeds_equal_transformers(variant):
    model = peer(VARIANTS[variant])
    positions = np.array([[0, 5, 6, 7, 20, 21, 63], [9, 8, 7, 6, 5, 4, 3]])
    embeds = np.random.default_rng(1).normal(size=(*IDS.shape, model.config.word_embed_proj_dim))

    theirs = run(model, input_ids=IDS, position_ids=positions)
    close(reference(model, IDS, position_ids=positions)[0], theirs.logits.numpy())
    theirs = run(model, inputs_embeds=embeds)
    close(reference(model, inputs_embeds=embeds)[0], theirs.logits.numpy())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_equal_transformers(name):
    model = peer({"activation_function": name})
    theirs = run(model, input_ids=IDS)
    close(reference(model, IDS)[0], theirs.logits.numpy())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_equal_transformers_far_from_zero(name):
    """Where the clipped ones clip and the exponentials would overflow."""
    x = torch.linspace(-40, 40, 1601, dtype=torch.float64)
    theirs = ACT2FN[name](x).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](x.numpy()), theirs, rtol=1e-12, atol=1e-13)


def test_every_parameterless_activation_of_transformers_is_here():
    with_parameters = {"prelu", "xielu"}
    assert set(ACTIVATIONS) == set(ACT2CLS) - with_parameters


def test_names_depend_on_the_final_layer_norm():
    _, pre_ln = reference(peer({}), IDS)
    _, bare = reference(peer(VARIANTS["no_final_ln"]), IDS)
    final = {"ln_final.hook_scale", "ln_final.hook_normalized"}
    assert final <= set(pre_ln) and set(bare) == set(pre_ln) - final


def test_values_at_the_hooks_fit_together():
    """What the names promise: parts that add up, rows that sum to 1, scales that divide."""
    _, v = reference(peer({}), IDS, attention_mask=PADDINGS["left"])
    close(v["blocks.0.hook_resid_pre"], v["hook_embed"] + v["hook_pos_embed"])
    for layer in range(TINY["num_hidden_layers"]):
        at = {name.removeprefix(f"blocks.{layer}."): value for name, value in v.items()}
        close(at["hook_resid_mid"], at["hook_resid_pre"] + at["hook_attn_out"])
        close(at["hook_resid_post"], at["hook_resid_mid"] + at["hook_mlp_out"])
        # the empty rows are the two padded queries of the first prompt
        assert (at["attn.hook_pattern"][0, :, :2] == 0).all()
        assert (at["attn.hook_z"][0, :2] == 0).all()
        close(at["attn.hook_pattern"][0, :, 2:].sum(-1), np.ones((4, 5)))
        assert (at["attn.hook_pattern"][np.isneginf(at["attn.hook_attn_scores"])] == 0).all()
        for norm, read in {"ln1": "hook_resid_pre", "ln2": "hook_resid_mid"}.items():
            centred = at[read] - at[read].mean(-1, keepdims=True)
            close(at[f"{norm}.hook_normalized"] * at[f"{norm}.hook_scale"], centred)


# --- interventions: an edit in the reference against a module hook in transformers -----------------------------------


def shake(value: np.ndarray) -> np.ndarray:
    """An edit that treats every entry differently."""
    flat = np.arange(value.size, dtype=np.float64).reshape(value.shape)
    return value * 1.3 + 0.1 * np.cos(flat)


def shake_output(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (shake_output(module, inputs, output[0]), *output[1:])
    return torch.from_numpy(shake(output.numpy()))


LAYER = "model.decoder.layers.1"
PRE_LN_SITES = {
    "hook_embed": "model.decoder.embed_tokens",
    "hook_pos_embed": "model.decoder.embed_positions",
    "blocks.0.hook_resid_post": "model.decoder.layers.0",
    "blocks.1.hook_resid_post": LAYER,
    "blocks.1.attn.hook_q": f"{LAYER}.self_attn.q_proj",
    "blocks.1.attn.hook_k": f"{LAYER}.self_attn.k_proj",
    "blocks.1.attn.hook_v": f"{LAYER}.self_attn.v_proj",
    "blocks.1.hook_attn_out": f"{LAYER}.self_attn.out_proj",
    "blocks.1.mlp.hook_pre": f"{LAYER}.fc1",
    "blocks.1.mlp.hook_post": f"{LAYER}.activation_fn",
    "blocks.1.hook_mlp_out": f"{LAYER}.fc2",
}
POST_LN_SITES = {
    **PRE_LN_SITES,
    "hook_embed": "model.decoder.project_in",
    "blocks.1.hook_resid_mid": f"{LAYER}.self_attn_layer_norm",
}


@pytest.mark.parametrize(
    ("variant", "name", "module"),
    [("pre_ln", *site) for site in PRE_LN_SITES.items()]
    + [("post_ln_350m", *site) for site in POST_LN_SITES.items()],
)
def test_edits_equal_transformers_with_a_module_hook(variant, name, module):
    model = peer(VARIANTS[variant])
    handle = model.get_submodule(module).register_forward_hook(shake_output)
    theirs = run(model, input_ids=IDS).logits.numpy()
    handle.remove()
    logits, values = reference(model, IDS, edits={name: shake})
    close(logits, theirs)
    assert np.abs(logits - reference(model, IDS)[0]).max() > 1e-3
    close(values[name], shake(reference(model, IDS)[1][name]))


def shake_input(module: torch.nn.Module, inputs: tuple) -> tuple:
    return (torch.from_numpy(shake(inputs[0].numpy())), *inputs[1:])


@pytest.mark.parametrize(
    ("variant", "name", "module"),
    [
        ("pre_ln", "blocks.1.attn.hook_z", f"{LAYER}.self_attn.out_proj"),
        ("pre_ln", "blocks.1.hook_mlp_in", f"{LAYER}.final_layer_norm"),
        ("post_ln_350m", "blocks.1.attn.hook_z", f"{LAYER}.self_attn.out_proj"),
        ("post_ln_350m", "blocks.1.hook_mlp_in", f"{LAYER}.fc1"),
    ],
)
def test_edits_of_what_a_module_reads_equal_transformers(variant, name, module):
    model = peer(VARIANTS[variant])
    handle = model.get_submodule(module).register_forward_pre_hook(shake_input)
    theirs = run(model, input_ids=IDS).logits.numpy()
    handle.remove()
    logits, _ = reference(model, IDS, edits={name: shake})
    close(logits, theirs)


@pytest.mark.parametrize(
    ("norm", "module"), [("ln1", "self_attn_layer_norm"), ("ln2", "final_layer_norm")]
)
@pytest.mark.parametrize("part", ["hook_scale", "hook_normalized"])
@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m"])
def test_edits_inside_a_layer_norm_equal_transformers(variant, norm, module, part):
    """An edited scale divides what came in; an edited normalised value is what gain and bias act on."""

    def edited_norm(layer: torch.nn.LayerNorm, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].numpy().reshape(*IDS.shape, -1)
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt(x.var(-1, keepdims=True) + layer.eps)
        if part == "hook_scale":
            normalized = centred / shake(scale)
        else:
            normalized = shake(centred / scale)
        affine = normalized * layer.weight.detach().numpy() + layer.bias.detach().numpy()
        return torch.from_numpy(affine.reshape(output.shape))

    model = peer(VARIANTS[variant])
    handle = model.get_submodule(f"{LAYER}.{module}").register_forward_hook(edited_norm)
    theirs = run(model, input_ids=IDS).logits.numpy()
    handle.remove()
    logits, _ = reference(model, IDS, edits={f"blocks.1.{norm}.{part}": shake})
    close(logits, theirs)


# --- the sites that transformers has no module for, against a site that it has --------------------------------------


def edit_of(source: str, target: str, recompute: Callable[[np.ndarray], np.ndarray]) -> None:
    """Editing `source` must equal putting at `target` what follows from the edited value there."""
    model = peer({})
    _, clean = reference(model, IDS, attention_mask=PADDINGS["both"])
    edited, _ = reference(model, IDS, attention_mask=PADDINGS["both"], edits={source: shake})
    put = recompute(shake(clean[source]))
    other, _ = reference(model, IDS, attention_mask=PADDINGS["both"], edits={target: lambda _: put})
    close(edited, other)
    assert np.abs(edited - reference(model, IDS, attention_mask=PADDINGS["both"])[0]).max() > 1e-3


def test_edit_of_scores_is_an_edit_of_their_softmax():
    def softmax(scores: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(scores).softmax(-1).numpy()
        return np.nan_to_num(rows, nan=0.0)

    edit_of("blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", softmax)


def test_edit_of_the_pattern_is_an_edit_of_z():
    _, clean = reference(peer({}), IDS, attention_mask=PADDINGS["both"])
    v = clean["blocks.1.attn.hook_v"]
    edit_of(
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_z",
        lambda pattern: np.einsum("bhqk,bkhe->bqhe", pattern, v),
    )


def test_edit_of_head_results_is_an_edit_of_attn_out():
    bias = peer({}).get_submodule(LAYER).self_attn.out_proj.bias.detach().numpy()
    edit_of(
        "blocks.1.attn.hook_result",
        "blocks.1.hook_attn_out",
        lambda result: result.sum(2) + bias,
    )


@pytest.mark.parametrize("role", "qkv")
@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m", "no_bias", "no_affine"])
def test_edit_of_a_projection_input_reaches_one_role_only(variant, role):
    """Every head projects its own edited stream; queries, keys and values not asked for stay as they were."""
    model = peer(VARIANTS[variant])
    layer = model.get_submodule(LAYER)
    _, clean = reference(model, IDS)
    source, target = f"blocks.1.hook_{role}_input", f"blocks.1.attn.hook_{role}"
    heads = []
    for head in range(TINY["num_attention_heads"]):
        own = torch.from_numpy(shake(clean[source])[:, :, head])
        with torch.no_grad():
            read = layer.self_attn_layer_norm(own) if model.config.do_layer_norm_before else own
            heads.append(
                getattr(layer.self_attn, f"{role}_proj")(read)[..., 8 * head : 8 * head + 8]
            )
    put = torch.stack(heads, dim=2).numpy()

    edited, values = reference(model, IDS, edits={source: shake})
    other, _ = reference(model, IDS, edits={target: lambda _: put})
    close(edited, other)
    for same in set("qkv") - {role}:
        close(values[f"blocks.1.attn.hook_{same}"], clean[f"blocks.1.attn.hook_{same}"])
    close(values["blocks.1.hook_resid_pre"], clean["blocks.1.hook_resid_pre"])


def test_an_edit_sees_its_own_copy():
    """Changing the argument without returning it must not leak into the run."""

    def vandal(value: np.ndarray) -> np.ndarray:
        kept = value.copy()
        value[:] = 0
        return kept

    model = peer({})
    logits, _ = reference(model, IDS)
    for name in reference(model, IDS)[1]:
        if name.endswith("_input"):
            continue  # an edit there computes each head by itself, in another order of additions
        np.testing.assert_array_equal(reference(model, IDS, edits={name: vandal})[0], logits)
