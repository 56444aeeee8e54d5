"""What a call may be given and asked for means what it means to transformers."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config
from twins import assert_near, twin_of

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
REAL = PADDED.bool()


# --- inputs -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_inputs_embeds_stand_before_the_projection(variant):
    model = random_model(tiny_config(**variant), torch.float64)
    embeds = torch.randn(2, 7, model.config.word_embed_proj_dim).double()
    options = {"inputs_embeds": embeds, "attention_mask": PADDED}
    assert_near(model(**options).logits[REAL], twin_of(model)(**options).logits[REAL])
    same = model(inputs_embeds=model.decoder.embed_tokens(IDS)).logits
    torch.testing.assert_close(same, model(IDS).logits, rtol=0, atol=0)


@torch.no_grad()
def test_position_ids_equal_transformers():
    model = random_model(tiny_config(), torch.float64)
    twin = twin_of(model)
    rows = torch.tensor([[0, 3, 9, 10, 63, 62, 0], [6, 5, 4, 3, 2, 1, -1]])
    assert_near(model(IDS, position_ids=rows).logits, twin(IDS, position_ids=rows).logits)
    for shape in (rows[:1], rows[0]):
        theirs = twin(IDS, position_ids=rows[:1].expand(2, -1)).logits
        assert_near(model(IDS, position_ids=shape).logits, theirs)
    shifted = model(IDS, position_ids=rows[:1] + 0 * IDS, attention_mask=PADDED).logits
    theirs = twin(IDS, position_ids=rows[:1] + 0 * IDS, attention_mask=PADDED).logits
    assert_near(shifted[REAL], theirs[REAL])


@torch.no_grad()
def test_use_cache_follows_the_config_unless_said():
    for by_default in (True, False):
        model = random_model(tiny_config(use_cache=by_default))
        assert (model(IDS).past_key_values is not None) == by_default
        assert model(IDS, use_cache=False).past_key_values is None
        assert model(IDS, use_cache=True).past_key_values.get_seq_length() == 7
        assert model.model(IDS, use_cache=True).past_key_values.get_seq_length() == 7


@torch.no_grad()
def test_one_prompt_needs_no_batch_axis():
    model = random_model(tiny_config())
    torch.testing.assert_close(model(IDS[0]).logits, model(IDS[:1]).logits, rtol=0, atol=0)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        torch.testing.assert_close(model(IDS.to(dtype)).logits, model(IDS).logits, rtol=0, atol=0)


# --- outputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep",
    [0, 1, 3, 7, 9, torch.tensor([0, 5]), torch.tensor([-1]), torch.tensor([[6, 1], [4, 4]])],
    ids=str,
)
@torch.no_grad()
def test_logits_to_keep_equals_transformers(keep):
    model = random_model(tiny_config(), torch.float64)
    ours = model(IDS, logits_to_keep=keep).logits
    theirs = twin_of(model)(IDS, logits_to_keep=keep).logits
    assert ours.shape == theirs.shape
    assert_near(ours, theirs)


@torch.no_grad()
def test_logits_to_keep_computes_no_others(monkeypatch):
    model = random_model(tiny_config())
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(IDS, logits_to_keep=1)
    model(IDS, stop_at_layer=2)
    assert seen == [(2, 1, 101)]


@torch.no_grad()
def test_output_reads_as_transformers_output_does():
    model = random_model(tiny_config())
    asked = {"output_attentions": True, "output_hidden_states": True, "labels": IDS}
    ours, theirs = model(IDS, **asked), twin_of(model, "eager")(IDS, **asked)
    assert len(ours.to_tuple()) == len(theirs.to_tuple()) == 5
    for name in theirs.keys():  # noqa: SIM118
        assert ours[name] is getattr(ours, name)
    assert ours[0] is ours.loss and ours[1] is ours.logits and ours[-1] is ours.attentions
    assert model(IDS, use_cache=False)[0].shape == (2, 7, 101)  # what is None does not count
    torch.testing.assert_close(ours[0, -1], ours.logits[0, -1])
    torch.testing.assert_close(ours[:, -1, IDS[0]], ours.logits[:, -1, IDS[0]])
    torch.testing.assert_close(ours[..., 3], ours.logits[..., 3])
    base = model.model(IDS)
    assert base[0] is base.last_hidden_state
    torch.testing.assert_close(base[0, -1], base.last_hidden_state[0, -1])
