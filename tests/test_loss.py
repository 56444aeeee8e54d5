"""The next-token loss: transformers', torch's and ours agree, and padding does not count."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config
from twins import twin_of

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
REAL = PADDED.bool()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_loss_over_labels_equals_transformers(dtype):
    """Which takes the softmax in float32 whatever the logits are; ours of float64 logits is float64."""
    model = random_model(tiny_config(), dtype)
    labels = IDS.masked_fill(PADDED == 0, -100)
    labels[1, 3] = -100
    ours = model(IDS, attention_mask=PADDED, labels=labels).loss
    theirs = twin_of(model)(IDS, attention_mask=PADDED, labels=labels).loss
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # bfloat16 logits differ by 2**-8 of themselves, and the loss is a mean of 9 of them
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=0)


@torch.no_grad()
def test_losses_agree():
    model = random_model(tiny_config(), torch.float64)
    logits = model(IDS).logits
    log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    loss = -log_probs.mean()
    torch.testing.assert_close(model(IDS, labels=IDS).loss, loss)
    torch.testing.assert_close(model(IDS, return_type="loss"), loss)
    torch.testing.assert_close(model.loss(IDS), loss)
    torch.testing.assert_close(model.loss_fn(logits, IDS), loss)
    torch.testing.assert_close(model.loss_fn(model(IDS), IDS), loss)
    torch.testing.assert_close(model.loss(IDS, per_token=True), -log_probs)
    both = model(IDS, return_type="both")
    torch.testing.assert_close(both, (logits, loss))
    torch.testing.assert_close(model(IDS, return_type="logits"), logits)
    # labels given beside return_type are what the loss is about
    halved = IDS.masked_fill(torch.arange(7) > 3, -100)
    expected = -log_probs[:, :3].mean()
    torch.testing.assert_close(model(IDS, labels=halved, return_type="loss"), expected)


@torch.no_grad()
def test_padding_does_not_count_in_the_loss():
    model = random_model(tiny_config(), torch.float64)
    alone = [model.loss(row[real], per_token=True)[0] for row, real in zip(IDS, REAL, strict=True)]
    expected = torch.cat(alone).mean()
    torch.testing.assert_close(model.loss(IDS, attention_mask=PADDED), expected)
    torch.testing.assert_close(model(IDS, attention_mask=PADDED, return_type="loss"), expected)
    labels = IDS.masked_fill(PADDED == 0, -100)
    labels[0, 2] = -100  # the first real token of the left-padded prompt has nothing real before it
    torch.testing.assert_close(model(IDS, attention_mask=PADDED, labels=labels).loss, expected)
    per_token = model.loss(IDS, attention_mask=PADDED, per_token=True)
    assert per_token.shape == (2, 6)
    torch.testing.assert_close(per_token[0], torch.cat([torch.zeros(2).double(), alone[0]]))
    torch.testing.assert_close(per_token[1], torch.cat([alone[1], torch.zeros(2).double()]))


@torch.no_grad()
def test_loss_of_a_continuation_counts_its_own_tokens():
    model = random_model(tiny_config(), torch.float64)
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    per_token = model.loss(IDS, attention_mask=left, per_token=True)
    past = model(IDS[:, :3], attention_mask=left[:, :3]).past_key_values
    loss = model(IDS[:, 3:], attention_mask=left, past_key_values=past, return_type="loss")
    torch.testing.assert_close(loss, per_token[:, 3:].mean())
