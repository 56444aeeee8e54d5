"""The cache of keys and values grows by what each pass has seen, and belongs to one batch."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config
from transformers import DynamicCache
from twins import assert_near, twin_of

from optlens.checks import InputError
from optlens.kv_cache import KVCache

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


@torch.no_grad()
def test_it_holds_what_transformers_cache_holds(variant):
    model = random_model(tiny_config(**variant), torch.float64)
    ours = model(IDS, attention_mask=LEFT).past_key_values
    theirs = DynamicCache()
    twin_of(model)(IDS, attention_mask=LEFT, past_key_values=theirs, use_cache=True)
    assert ours.get_seq_length() == theirs.get_seq_length() == 7
    assert len(ours) == len(theirs) == 2
    for layer in range(2):
        for mine, other in zip(
            ours[layer], (theirs.layers[layer].keys, theirs.layers[layer].values), strict=True
        ):
            assert mine.shape == other.shape == (2, 4, 7, 8)
            assert_near(mine.transpose(1, 2)[LEFT.bool()], other.transpose(1, 2)[LEFT.bool()])


@torch.no_grad()
def test_it_grows_in_place_and_is_handed_on():
    model = random_model(tiny_config())
    cache = KVCache()
    assert (cache.get_seq_length(), len(cache)) == (0, 0)
    out = model(IDS[:, :3], past_key_values=cache)
    assert out.past_key_values is cache and cache.get_seq_length() == 3
    out = model(IDS[:, 3:], past_key_values=cache, use_cache=False)
    assert out.past_key_values is cache and cache.get_seq_length() == 7
    assert_near(out.logits, model(IDS).logits[:, 3:])


@torch.no_grad()
def test_one_token_after_another():
    model = random_model(tiny_config(), torch.float64)
    whole = model(IDS, attention_mask=LEFT).logits
    cache, steps = KVCache(), []
    for place in range(7):
        mask = LEFT[:, : place + 1]
        step = model(IDS[:, place : place + 1], attention_mask=mask, past_key_values=cache)
        steps.append(step.logits)
    assert_near(torch.cat(steps, 1)[LEFT.bool()], whole[LEFT.bool()])


@torch.no_grad()
def test_a_chunk_may_be_all_padding():
    """The short prompt of a batch padded on the left, read in chunks, is nothing at first."""
    model = random_model(tiny_config(), torch.float64)
    first = model(IDS[:, :2], attention_mask=LEFT[:, :2], use_cache=True)
    assert first.logits.isfinite().all()
    rest = model(IDS[:, 2:], attention_mask=LEFT, past_key_values=first.past_key_values)
    whole = model(IDS, attention_mask=LEFT).logits[:, 2:]
    assert_near(rest.logits[LEFT[:, 2:].bool()], whole[LEFT[:, 2:].bool()])


@torch.no_grad()
def test_a_padded_prompt_is_not_continued_without_its_mask():
    model = random_model(tiny_config())
    past = model(IDS, attention_mask=LEFT).past_key_values
    assert past.has_padding
    with pytest.raises(InputError, match=r"holds padded prompts.*attention_mask too, .*\(2, 9\)"):
        model(IDS[:, :2], past_key_values=past)
    assert past.get_seq_length() == 7
    model(IDS[:, :1], attention_mask=torch.cat([LEFT, LEFT[:, -1:]], 1), past_key_values=past)
    assert past.get_seq_length() == 8
    unpadded = model(IDS, attention_mask=torch.ones_like(IDS)).past_key_values
    assert not unpadded.has_padding
    model(IDS, past_key_values=unpadded)


@torch.no_grad()
def test_another_batch_is_refused():
    model = random_model(tiny_config())
    past = model(IDS).past_key_values
    with pytest.raises(ValueError, match="holds 2 prompts, but this call has 1"):
        model(IDS[:1], past_key_values=past)


@torch.no_grad()
def test_a_continuation_may_not_pass_the_last_position():
    model = random_model(tiny_config(max_position_embeddings=10))
    past = model(IDS).past_key_values
    with pytest.raises(InputError, match="has 11 tokens, but this model has positions for 10"):
        model(IDS[:, :4], past_key_values=past)
    model(IDS[:, :3], past_key_values=past)
    assert past.get_seq_length() == 10


@torch.no_grad()
def test_a_run_in_part_keeps_no_cache():
    model = random_model(tiny_config())
    past = model(IDS).past_key_values
    for part in ({"start_at_layer": 1}, {"stop_at_layer": 1}):
        given = torch.zeros(2, 7, 32) if "start_at_layer" in part else IDS
        with pytest.raises(InputError, match="cannot continue from past_key_values"):
            model(given, past_key_values=past, **part)
    assert model(torch.zeros(2, 7, 32), start_at_layer=1).past_key_values is None
    assert past.get_seq_length() == 7
