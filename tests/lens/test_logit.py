"""The logit lens against a direct computation over the whole vocabulary."""

import pytest
import torch
from conftest import TOL, random_model, tiny_config

import optlens
from optlens.checks import InputError
from optlens.lens import logit as module
from optlens.recording import NotRecordedError

TOKENS = torch.tensor([2, 10, 20, 30, 40, 50, 60])
CLOSE = TOL[torch.float32]


def naive_log_probs(model, rows: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of every residual row, by the model's last steps written out."""
    decoder = model.decoder
    h = rows
    if decoder.final_layer_norm is not None:
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        if decoder.final_layer_norm.weight is not None:
            h = h * decoder.final_layer_norm.weight + decoder.final_layer_norm.bias
    if decoder.project_out is not None:
        h = h @ decoder.project_out.weight.T
    return (h @ model.lm_head.weight.T).log_softmax(-1).detach()


def test_statistics_equal_the_direct_computation(variant):
    model = random_model(tiny_config(**variant))
    rec = model.record(TOKENS)
    log = naive_log_probs(model, rec.residual)
    lens = rec.logit_lens(top_k=7)
    torch.testing.assert_close(lens.top_probs, log.exp().topk(7).values, **CLOSE)
    torch.testing.assert_close(lens.top_probs, log.exp().gather(-1, lens.top_tokens), **CLOSE)
    torch.testing.assert_close(lens.entropy, -(log.exp() * log).sum(-1), **CLOSE)
    torch.testing.assert_close(lens.kl, (log[-1].exp() * (log[-1] - log)).sum(-1), **CLOSE)
    assert lens.kl[-1].abs().max() == 0
    for token in (0, 57):
        torch.testing.assert_close(lens.prob(token), log[..., token].exp(), **CLOSE)
        expected = (log > log[..., token, None]).sum(-1)
        torch.testing.assert_close(lens.rank(token), expected)
    assert lens.labels == ["embed", "0", "1"]


def test_last_row_is_the_models_prediction(variant):
    model = random_model(tiny_config(**variant))
    probs = model(TOKENS).logits[0].softmax(-1)
    lens = optlens.logit_lens(model, TOKENS)
    torch.testing.assert_close(lens.top_probs[-1], probs.topk(5).values.detach(), **CLOSE)


def test_top_one_has_rank_zero(tiny_model):
    lens = optlens.logit_lens(tiny_model, TOKENS)
    token = int(lens.top_tokens[1, 3, 0])
    assert lens.rank(token)[1, 3] == 0
    assert lens.prob(token)[1, 3] == pytest.approx(float(lens.top_probs[1, 3, 0]))


def test_sublayers_read_between_attention_and_mlp(variant):
    model = random_model(tiny_config(**variant))
    lens = optlens.logit_lens(model, TOKENS, sublayers=True)
    _, cache = model.run_with_cache(TOKENS, remove_batch_dim=True)
    names = [("resid_pre", 0)] + [
        (n, layer) for layer in (0, 1) for n in ("resid_mid", "resid_post")
    ]
    log = naive_log_probs(model, torch.stack([cache[name] for name in names]))
    assert lens.labels == ["embed", "0 mid", "0 post", "1 mid", "1 post"]
    torch.testing.assert_close(lens.entropy, -(log.exp() * log).sum(-1), **CLOSE)


def test_chunks_change_nothing_and_stay_small(tiny_model, monkeypatch):
    whole = tiny_model.record(TOKENS.repeat(2, 1)).logit_lens()
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * 101)
    sizes, unembed = [], tiny_model.unembed
    monkeypatch.setattr(tiny_model, "unembed", lambda h: (sizes.append(len(h)), unembed(h))[1])
    chunked = tiny_model.record(TOKENS.repeat(2, 1)).logit_lens()
    chunked_rank = chunked.rank(3)
    assert max(sizes) == 3
    torch.testing.assert_close(chunked.kl, whole.kl, **CLOSE)
    torch.testing.assert_close(chunked.top_tokens, whole.top_tokens)
    torch.testing.assert_close(chunked_rank, whole.rank(3))


def test_a_users_hook_on_the_final_norm_is_not_asked(tiny_model):
    rec = tiny_model.record(TOKENS)
    plain = rec.logit_lens(top_k=20).entropy
    calls = []
    with tiny_model.hooks([("ln_final.hook_scale", lambda scale, hook: calls.append(scale))]):
        inside = rec.logit_lens(top_k=20).entropy
    assert calls == []
    torch.testing.assert_close(inside, plain)


def test_selected_layers_keep_the_models_own_end(tiny_model):
    full, part = (tiny_model.record(TOKENS, layers=layers) for layers in (None, [0]))
    torch.testing.assert_close(part.logit_lens().kl, full.logit_lens().kl[:2], **CLOSE)
    assert part.logit_lens().labels == ["embed", "0"]


def test_bad_requests(tiny_model):
    rec = tiny_model.record(TOKENS, what="attention")
    with pytest.raises(NotRecordedError, match="'residual'"):
        rec.logit_lens()
    rec = tiny_model.record(TOKENS)
    with pytest.raises(NotRecordedError, match="'resid_mid'"):
        rec.logit_lens(sublayers=True)
    for top_k in (0, 102):
        with pytest.raises(InputError, match="top_k must be 1 to 101"):
            rec.logit_lens(top_k=top_k)
    with pytest.raises(InputError, match="101 is out of range"):
        rec.logit_lens().rank(101)


def test_logits_of_every_row(variant):
    model = random_model(tiny_config(**variant))
    rec = model.record(TOKENS)
    lens = rec.logit_lens()
    difference = lens.logit(7) - lens.logit(8)
    log = naive_log_probs(model, rec.residual)
    torch.testing.assert_close(difference, log[..., 7] - log[..., 8], **CLOSE)
    torch.testing.assert_close(lens.logit(7)[-1], model(TOKENS).logits[0, :, 7].detach(), **CLOSE)
