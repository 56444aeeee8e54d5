"""Value-weighted attention is the length of what goes missing with a value; products add up to scores."""

from __future__ import annotations

import pytest
import torch
from conftest import TOL, VARIANTS, padded, random_model, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from optlens import circuits
from optlens.checks import InputError
from optlens.recording import NotRecordedError

TOKENS = torch.tensor([2, 10, 20, 30, 10, 50, 60])
CLOSE = TOL[torch.float64]


def test_weight_is_the_length_of_what_goes_missing_with_the_value(variant):
    """Erasing one head's value at one key takes exactly that much from what the head writes."""
    model = random_model(tiny_config(**variant), torch.float64)
    moved = circuits.value_weighted_attention(model, TOKENS)
    inside = circuits.value_weighted_attention(model, TOKENS, by="value")
    names = ["blocks.1.attn.hook_result", "blocks.1.attn.hook_z"]
    _, cache = model.run_with_cache(TOKENS, names)
    for head, key in ((0, 0), (1, 3), (3, 5)):

        def erase(v, hook, head=head, key=key):
            v[:, key, head] = 0.0

        with model.hooks([("blocks.1.attn.hook_v", erase)]):
            _, without = model.run_with_cache(TOKENS, names)
        for name, found in zip(names, (moved, inside), strict=True):
            missing = (cache[name] - without[name])[0, :, head].norm(dim=-1)
            torch.testing.assert_close(found[1, head, :, key], missing, **CLOSE)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["output", "value"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10_000),
)
def test_padded_prompts_have_the_weights_they_have_alone(lengths, left, by, normalize, dtype, seed):
    model = random_model(tiny_config(), dtype, seed)
    tokens, mask = padded(lengths, left, seed)
    rec = model.record(tokens, what=("attention", "v"), attention_mask=mask)
    moved = circuits.value_weighted_attention(None, rec, by, normalize)
    for number in range(len(lengths)):
        real = mask[number].bool()
        alone = circuits.value_weighted_attention(model, tokens[number][real], by, normalize)
        here = moved[number][:, :, real]
        torch.testing.assert_close(here[..., real], alone, **TOL[dtype])
        assert (here[..., ~real] == 0).all() and moved.isfinite().all()
        if normalize:
            torch.testing.assert_close(alone.sum(-1), torch.ones_like(alone[..., 0]), **TOL[dtype])


def test_rows_are_in_proportion_to_the_weights(tiny_model):
    plain = circuits.value_weighted_attention(tiny_model, TOKENS)
    shares = circuits.value_weighted_attention(tiny_model, TOKENS, normalize=True)
    torch.testing.assert_close(shares * plain.sum(-1, keepdim=True), plain)
    rec = tiny_model.record(TOKENS, what=("attention", "v"), layers=[1], heads=[2, 0])
    torch.testing.assert_close(circuits.value_weighted_attention(None, rec), plain[[1]][:, [2, 0]])


# --- queries and keys ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_products_add_up_to_the_models_own_scores(name):
    model = random_model(tiny_config(**VARIANTS[name]), torch.float64)
    rec = model.record(TOKENS, what=("q", "k", "attn_scores", "attention"))
    for layer, head, pos in ((0, 0, -1), (1, 2, 3), (-1, -1, 0)):
        detail = circuits.score_detail(None, rec, layer, head, pos)
        torch.testing.assert_close(detail.scores, rec["attn_scores"][layer, head, pos], **CLOSE)
        torch.testing.assert_close(detail.pattern, rec.attention[layer, head, pos], **CLOSE)
        seen = detail.scores.isfinite()
        torch.testing.assert_close(detail.products.sum(-1)[seen], detail.scores[seen], **CLOSE)
        assert (detail.layer, detail.head) == (layer % 2, head % 4)
        alone = circuits.score_detail(model, TOKENS, layer, head, pos)
        torch.testing.assert_close(alone.products, detail.products, **CLOSE)


def test_a_product_is_what_erasing_that_dimension_of_the_query_takes(tiny_model):
    detail = circuits.score_detail(tiny_model, TOKENS, 1, 2)
    name = "blocks.1.attn.hook_attn_scores"
    _, cache = tiny_model.run_with_cache(TOKENS, name)

    def erase(q, hook):
        q[:, -1, 2, 5] = 0.0

    with tiny_model.hooks([("blocks.1.attn.hook_q", erase)]):
        _, without = tiny_model.run_with_cache(TOKENS, name)
    change = (cache[name] - without[name])[0, 2, -1]
    torch.testing.assert_close(detail.products[:, 5], change, **TOL[torch.float32])


@pytest.mark.parametrize("left", [True, False])
def test_detail_of_padded_prompts(left):
    model = random_model(tiny_config(), torch.float64)
    tokens, mask = padded([3, 7], left, 0)
    rec = model.record(tokens, what=("q", "k"), attention_mask=mask)
    detail = circuits.score_detail(None, rec, 1, 2, pos=2)
    for number in (0, 1):
        real = mask[number].bool()
        alone = circuits.score_detail(model, tokens[number][real], 1, 2, pos=2)
        torch.testing.assert_close(detail.query[number], alone.query, **CLOSE)
        torch.testing.assert_close(detail.scores[number][real], alone.scores, **CLOSE)
        torch.testing.assert_close(detail.pattern[number][real], alone.pattern, **CLOSE)
        assert (detail.scores[number][~real] == -torch.inf).all()


def test_bad_requests(tiny_model):
    with pytest.raises(InputError, match="by='keys'"):
        circuits.value_weighted_attention(tiny_model, TOKENS, by="keys")
    with pytest.raises(NotRecordedError, match="not 'v'"):
        circuits.value_weighted_attention(None, tiny_model.record(TOKENS, what="attention"))
    rec = tiny_model.record(TOKENS, what=("attention", "v", "q", "k"), pos=[1, 2])
    for call in (
        lambda: circuits.value_weighted_attention(None, rec),
        lambda: circuits.score_detail(None, rec, 0, 0),
    ):
        with pytest.raises(NotRecordedError, match="all 7 positions.*without pos="):
            call()
    rec = tiny_model.record(TOKENS, what=("q", "k"), layers=[0], heads=[1])
    with pytest.raises(InputError, match="layer=1 is not in this recording"):
        circuits.score_detail(None, rec, 1, 1)
    with pytest.raises(InputError, match="head=0 is not in this recording"):
        circuits.score_detail(None, rec, 0, 0)
    with pytest.raises(InputError, match="layer"):
        circuits.score_detail(tiny_model, TOKENS, 2, 0)
    with pytest.raises(InputError, match="pos=9"):
        circuits.score_detail(tiny_model, TOKENS, 0, 0, pos=9)
    with pytest.raises(NotRecordedError, match="not 'k'"):
        circuits.score_detail(None, tiny_model.record(TOKENS, what="q"), 0, 0)
