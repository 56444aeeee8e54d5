"""Means, resampled and frozen activations: from which runs they come, and that those runs are the unedited model's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from conftest import TOL, VARIANTS, random_model, tiny_config
from listening import listeners
from tiny_tokenizer import tiny_backend

from optlens import Ablate, Freeze, OPTTokenizer, Patch, Scale
from optlens.checks import InputError
from optlens.interventions import reference
from optlens.interventions.address import EDGES, SITES
from optlens.names import get_act_name

CLOSE = TOL[torch.float64]
IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
OTHERS = torch.randint(3, 101, (5, 7), generator=torch.manual_seed(6))
TEXTS = ["the cat", "he the cat he", "cat the ca cat he"]
MEAN_SITES = [site for site in SITES if SITES[site] != EDGES]


def build(variant: str = "pre_ln", **more: Any) -> Any:
    model = random_model(tiny_config(**VARIANTS[variant], **more), torch.float64)
    if "vocab_size" in more:
        model.tokenizer = OPTTokenizer.from_tokenizers(tiny_backend(), bos_token="</s>")
    return model


def edited(model: Any, each: Any, ids: torch.Tensor = IDS, mask: Any = None) -> torch.Tensor:
    with torch.no_grad(), model.intervene(each):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    return logits if mask is None else logits[mask.bool()]


def at(model: Any, ids: torch.Tensor, site: str, layer: int = 1) -> torch.Tensor:
    hook = get_act_name(site, None if site == "embed" else layer)
    return model.run_with_cache(ids, names_filter=hook)[1][hook]


def layer_of(site: str) -> dict[str, int]:
    return {} if site == "embed" else {"layer": 1}


# ------------------------------------------------------------------------------------- means


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m"])
@pytest.mark.parametrize("site", MEAN_SITES)
def test_mean_over_prompts_and_positions(site, variant, monkeypatch):
    """Texts of unequal length, run two at a time: padding counts nowhere."""
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 14)
    model = build(variant, vocab_size=300)
    alone = [at(model, model.to_tokens(text), site)[0] for text in TEXTS]
    mean = torch.cat(alone).mean(0)
    ours = edited(model, Ablate(site, **layer_of(site), mode="mean", reference=TEXTS, pos=[0, -1]))
    patch = Patch(site, **layer_of(site), pos=[0, -1], value=mean)
    torch.testing.assert_close(ours, edited(model, patch), **CLOSE)


def test_means_in_half_precision_are_summed_in_float64():
    """Many values of one sign, added up in float16, would soon be infinite."""
    model = random_model(tiny_config(), torch.float16)
    hooks = ["blocks.1.hook_resid_post"]
    many = torch.randint(3, 101, (40, 20), generator=torch.manual_seed(7))
    values = at(model, many, "resid_post").double()
    found = reference.mean_over_all(model, many, hooks)["blocks.1.hook_resid_post"]
    torch.testing.assert_close(found, values.mean((0, 1)), rtol=1e-12, atol=1e-12)
    by_position = reference.mean_of_positions(model, many, hooks).values
    found = by_position["blocks.1.hook_resid_post"][0]
    torch.testing.assert_close(found, values.mean(0), rtol=1e-12, atol=1e-12)


def test_mean_of_chosen_heads_and_neurons():
    model = build()
    z, post = at(model, OTHERS, "z").mean((0, 1)), at(model, OTHERS, "mlp_post").mean((0, 1))
    ours = [
        Ablate("z", layer=1, head=[3, 1], mode="mean", reference=OTHERS),
        Ablate("mlp_post", layer=1, neuron=7, pos=2, mode="mean", reference=OTHERS),
    ]
    by_hand = [
        Patch("z", layer=1, head=[3, 1], value=z[[3, 1]]),
        Patch("mlp_post", layer=1, neuron=7, pos=2, value=post[7]),
    ]
    torch.testing.assert_close(edited(model, ours), edited(model, by_hand), **CLOSE)


@pytest.mark.parametrize("site", SITES)
def test_mean_of_each_position(site):
    model = build()
    mean = at(model, OTHERS, site).mean(0)
    each = Ablate(site, **layer_of(site), mode="mean", reference=OTHERS, per_position=True)
    ours = edited(model, each)
    torch.testing.assert_close(
        ours, edited(model, Patch(site, **layer_of(site), value=mean)), **CLOSE
    )


def test_mean_of_each_position_counts_real_tokens():
    model = build()
    each = Ablate("z", layer=1, head=2, mode="mean", reference=OTHERS, per_position=True)
    together = edited(model, each, mask=LEFT)
    alone = torch.cat([edited(model, each, IDS[:1, 2:])[0], edited(model, each, IDS[1:])[0]])
    torch.testing.assert_close(together, alone, **CLOSE)


def test_positions_without_a_mean_are_refused():
    model = build()
    each = Ablate("z", mode="mean", reference=OTHERS[:, :5], per_position=True)
    with pytest.raises(InputError, match="has 5 tokens, so nothing to write at position 5"):
        edited(model, each)
    edited(model, Ablate("z", pos=4, mode="mean", reference=OTHERS[:, :5], per_position=True))
    with pytest.raises(InputError, match="one length, got 4 to 8 tokens"):
        talking = build(vocab_size=300)
        edited(talking, Ablate("z", mode="mean", reference=TEXTS, per_position=True))


# -------------------------------------------------------------------------------- resampling


def donors(model: Any, seed: int, others: torch.Tensor = OTHERS, mask: Any = None) -> list[int]:
    """Which reference prompt each prompt got its last embedding from."""
    each = Ablate("embed", mode="resample", reference=others, seed=seed)
    with model.intervene(each):
        _, cache = model.run_with_cache(IDS, names_filter="hook_embed", attention_mask=mask)
    embeddings = model.decoder.embed_tokens(others)
    last = cache["hook_embed"][:, -1]
    return [(embeddings[:, -1] == row).all(-1).nonzero().item() for row in last]


@pytest.mark.parametrize("site", SITES)
def test_resampling_writes_one_other_prompt(site):
    model = build("post_ln_350m") if site != "embed" else build()
    index = donors(build(), seed=3)
    values = at(model, OTHERS, site)[index]
    ours = edited(model, Ablate(site, **layer_of(site), mode="resample", reference=OTHERS, seed=3))
    torch.testing.assert_close(
        ours, edited(model, Patch(site, **layer_of(site), value=values)), **CLOSE
    )


def test_resampling_is_seeded_and_never_takes_the_prompt_itself():
    model = build()
    drawn = [donors(model, seed) for seed in range(12)]
    assert drawn == [donors(model, seed) for seed in range(12)]
    assert {i for pair in drawn for i in pair} == {0, 1, 2, 3, 4}
    both = torch.cat([IDS, OTHERS[:1]])
    assert all(pair[0] != 0 and pair[1] != 1 for pair in (donors(model, s, both) for s in range(9)))
    with pytest.raises(InputError, match="Prompt 1 has 7 tokens, and no other reference prompt"):
        edited(model, Ablate("z", mode="resample", reference=IDS[1:]))


def test_resampling_takes_prompts_of_equal_length():
    model = build(vocab_size=300)
    model_texts = ["he cat", "the cat he", "he the cat"]
    lengths = [len(model.to_str_tokens(text)) for text in model_texts]
    assert lengths == [3, 6, 4]
    each = Ablate("z", layer=1, mode="resample", reference=model_texts)
    prompt = model.to_tokens("he he he")
    assert prompt.shape[1] == 6
    z = at(model, model.to_tokens(model_texts[1]), "z")
    by_hand = Patch("z", layer=1, value=z)
    torch.testing.assert_close(edited(model, each, prompt), edited(model, by_hand, prompt), **CLOSE)


# ---------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_350m"])
@pytest.mark.parametrize("site", SITES)
def test_freezing_at_a_prompt_a_recording_a_cache_or_a_mapping(site, variant):
    model = build(variant)
    source = OTHERS[:2]
    layers = range(1) if site == "embed" else range(2)
    hooks = [get_act_name(site, None if site == "embed" else layer) for layer in layers]
    _, cache = model.run_with_cache(source, names_filter=hooks)
    by_hand = {hook: cache[hook] for hook in hooks}
    patches = [
        Patch(site, **({} if site == "embed" else {"layer": layer}), value=by_hand[hook])
        for layer, hook in enumerate(hooks)
    ]
    expected = edited(model, patches)
    recorded = model.record(source, what="hook_embed" if site == "embed" else site)
    for source_of in (source, recorded, cache, by_hand):
        ours = edited(model, Freeze(site, source=source_of))
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_freezing_a_part():
    model = build()
    z, pattern = at(model, OTHERS[:2], "z"), at(model, OTHERS[:2], "pattern")
    stack = [
        Freeze("z", layer=1, head=[1, 2], pos=[3, -1], source=OTHERS[:2]),
        Freeze("pattern", layer=1, head=0, query=slice(2, None), key=1, source=OTHERS[:2]),
    ]
    by_hand = [
        Patch("z", layer=1, head=[1, 2], pos=[3, -1], value=z[:, [3, 6]][:, :, [1, 2]]),
        Patch("pattern", layer=1, head=0, query=slice(2, None), key=1, value=pattern[:, 0, 2:, 1]),
    ]
    torch.testing.assert_close(edited(model, stack), edited(model, by_hand), **CLOSE)


def test_one_frozen_run_serves_all_prompts():
    model = build()
    each = Freeze("resid_mid", layer=1, source=model.record(OTHERS[0], what="resid_mid"))
    expected = edited(model, Patch("resid_mid", layer=1, value=at(model, OTHERS[:1], "resid_mid")))
    torch.testing.assert_close(edited(model, each), expected, **CLOSE)


def test_recordings_hold_residuals_and_attention_under_their_own_names():
    model = build()
    rec = model.record(OTHERS[:2])
    for site, layer in (("pattern", 1), ("resid_post", 0), ("resid_pre", 0)):
        ours = edited(model, Freeze(site, layer=layer, source=rec))
        value = at(model, OTHERS[:2], site, layer)
        expected = edited(model, Patch(site, layer=layer, value=value))
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_runs_are_frozen_position_by_position(side):
    """The run is padded on one side, its source on the other."""
    model = build()
    mask, other = (LEFT, LEFT.flip(1)) if side == "left" else (LEFT.flip(1), LEFT)
    real, held = mask.bool(), other.bool()
    source = model.record(OTHERS[:2], what=("z", "attn_scores"), attention_mask=other)
    for site in ("z", "attn_scores"):
        together = edited(model, Freeze(site, source=source), mask=mask)
        alone = [
            edited(model, Freeze(site, source=OTHERS[row][held[row]]), IDS[row][real[row]])[0]
            for row in range(2)
        ]
        torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


def test_a_cache_of_a_padded_run_is_taken_column_by_column():
    model = build()
    _, cache = model.run_with_cache(OTHERS[:2], names_filter=None, attention_mask=LEFT)
    for site in ("z", "pattern"):
        value = cache[site, 1]
        stack = Freeze(site, layer=1, source=cache), Patch(site, layer=1, value=value)
        ours, by_hand = (edited(model, each, mask=LEFT) for each in stack)
        torch.testing.assert_close(ours, by_hand, **CLOSE)
        assert not ours.allclose(edited(model, [], mask=LEFT))


def test_a_source_that_does_not_fit_is_refused():
    model = build()
    z = {get_act_name("z", 0): at(model, IDS, "z", 0)}
    with pytest.raises(InputError, match="has 5 tokens, but prompt 0 has 7"):
        edited(model, Freeze("z", source=OTHERS[:2, :5]))
    with pytest.raises(InputError, match="has 5 tokens, but prompt 0 has 7"):
        edited(model, Freeze("z", layer=0, source={name: v[:, :5] for name, v in z.items()}))
    with pytest.raises(InputError, match="has 5 prompts, but 2 are run"):
        edited(model, Freeze("z", source=OTHERS))
    with pytest.raises(
        InputError, match=r"hook_z but not 'blocks\.1\.attn\.hook_z', which layer=1"
    ):
        edited(model, Freeze("z", layer=1, source=z))
    with pytest.raises(InputError, match=r"this model has \(2, 7, 4, 8\)"):
        edited(model, Freeze("z", layer=0, source={name: v[..., :4] for name, v in z.items()}))
    with pytest.raises(InputError, match=r"does not hold hooks of 'q', only .*what='q'"):
        Freeze("q", source=z)
    with pytest.raises(InputError, match=r"does not hold blocks\.1\.hook_resid_mid, only"):
        Freeze("resid_mid", layer=-1, source=model.record(IDS, what="resid_mid", layers=0))
    with pytest.raises(InputError, match="without pos= and heads="):
        Freeze("z", source=model.record(IDS, what="z", heads=[0]))
    with pytest.raises(InputError, match=r"expected \[batch, pos, head, d_head\]"):
        Freeze("z", source={get_act_name("z", 0): torch.ones(3, 3)})


# -------------------------------------------------------------- the reference runs themselves


@pytest.mark.parametrize(
    "each",
    [
        Ablate("z", mode="mean", reference=OTHERS),
        Ablate("z", mode="resample", reference=OTHERS),
        Freeze("z", source=OTHERS[:2]),
    ],
    ids=repr,
)
def test_reference_runs_are_unedited_and_unseen(each):
    """An outer intervention does not reach them, and what listens at the model does not hear them."""
    model = build()
    seen = []
    expected = edited(model, [Scale("resid_pre", layer=0, pos=6, factor=3), each])

    def listen(value: torch.Tensor, hook: Any) -> None:
        seen.append(value.shape[0])

    with torch.no_grad(), model.recorders([model.hook_dict["blocks.1.hook_resid_pre"]], listen):
        with model.intervene(Scale("resid_pre", layer=0, pos=6, factor=3)), model.intervene(each):
            ours = model(IDS, use_cache=False).logits
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert seen == [2]
    assert listeners(model) == {}


def test_what_interventions_of_a_list_take_from_the_same_prompts_is_run_once():
    """Equal prompts, asked for the same: means over all, means by position, whole runs."""
    model = build()
    several = [
        Ablate("z", layer=0, head=1, mode="mean", reference=OTHERS),
        Ablate("z", layer=0, head=[3, 0], mode="mean", reference=OTHERS.clone()),
        Ablate("resid_mid", layer=1, pos=-1, mode="mean", reference=OTHERS),
        Ablate("mlp_out", layer=1, pos=0, mode="mean", per_position=True, reference=OTHERS),
        Ablate("mlp_post", layer=0, neuron=3, mode="mean", per_position=True, reference=OTHERS),
        Freeze("z", layer=1, head=0, source=OTHERS[:2]),
        Ablate("z", layer=1, head=2, mode="resample", reference=OTHERS[:2]),
        Ablate("z", layer=1, head=1, mode="mean", reference=OTHERS[:3]),
    ]
    seen = []
    model.decoder.register_forward_pre_hook(lambda *_: seen.append("a run"))
    ours = edited(model, several)
    assert len(seen) == 4 + 1  # over all, by position, whole, the other prompts; and the run itself
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for each in several:
            stack.enter_context(model.intervene(each))
        apart = model(IDS, use_cache=False).logits
    torch.testing.assert_close(ours, apart, rtol=0, atol=0)


def test_outer_positions_need_not_exist_in_reference_prompts():
    model = build()
    outer = Scale("resid_pre", layer=0, pos=6, factor=3)
    each = Ablate("z", mode="mean", reference=OTHERS[:, :4])
    with torch.no_grad(), model.intervene(outer), model.intervene(each):
        ours = model(IDS, use_cache=False).logits
    torch.testing.assert_close(ours, edited(model, [outer, each]), **CLOSE)
