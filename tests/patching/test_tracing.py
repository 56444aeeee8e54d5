"""Causal tracing against whole forward passes with hand-written hooks, for each noise sample."""

import pytest
import torch

import optlens
from optlens import metrics
from optlens.checks import InputError
from optlens.patching import PatchResult, SweepPlan, causal_trace
from optlens.patching.tracing import embedding_std
from optlens.patching.wave import Wave
from tests.patching.naive import hook_name, naive_sweep
from tests.patching.test_sweep import VARIANTS, make_model, make_prompts, padded_as_text

SUBJECT, SAMPLES = (1, 3), 3
METRIC = metrics.prob(5)
# float64 throughout; probabilities are below one
EXACT = {"atol": 1e-12, "rtol": 1e-9}


def probability(logits):
    return logits[:, -1].softmax(-1)[:, 5]


def added_noise(model, length, subject=SUBJECT, samples=SAMPLES, seed=0, noise=3.0):
    """Draw the noise of one prompt, `[samples, pos, d_model]`."""
    drawn = torch.randn(
        samples,
        len(subject),
        model.config.d_model,
        generator=torch.Generator().manual_seed(seed),
    )
    added = torch.zeros(samples, length, model.config.d_model)
    added[:, list(subject)] = drawn * (noise * float(model.W_E.detach().std(correction=0)))
    return added.double()


def naive_trace(model, tokens, added, site, over, window=1, measure=probability):
    """Restore one place at a time in noisy runs; return `[*over]`, and the ends."""
    names = [hook_name(site, layer) for layer in range(model.config.n_layers)]
    clean = model.run_with_cache(tokens, sorted(set(names)))[1]
    rows = tokens.expand(len(added), -1)
    columns = torch.arange(tokens.shape[1]).expand(len(added), -1)
    with torch.no_grad():
        clean_value = measure(model(tokens).logits)
        with model.hooks([("hook_embed", lambda embed, hook: embed + added)]):
            noisy = measure(model(rows).logits)
            values = naive_sweep(
                model,
                rows,
                lambda name: clean[name].expand(len(added), *clean[name].shape[1:]),
                None,
                site,
                over,
                measure,
                columns,
                window,
            )
    return values.mean(-1), clean_value, noisy.mean()


@pytest.mark.parametrize("variant", ["pre-LN", "350m"])
@pytest.mark.parametrize(
    ("site", "over", "window"),
    [
        ("resid_post", ("layer", "pos"), 1),
        ("resid_pre", ("layer", "pos"), 2),
        ("mlp_out", ("layer", "pos"), 3),
        ("attn_out", ("layer", "pos"), 2),
        ("z", ("layer", "head", "pos"), 1),
        ("embed", ("pos",), 1),
    ],
)
def test_every_restored_place_equals_whole_forward_passes(site, over, window, variant):
    model = make_model(**VARIANTS[variant])
    tokens = make_prompts()[0][:1]
    added = added_noise(model, 6)
    expected, clean, noisy = naive_trace(model, tokens, added, site, over, window)
    result = causal_trace(
        model,
        tokens,
        SUBJECT,
        METRIC,
        site,
        over,
        window,
        samples=SAMPLES,
        progress=False,
    )
    assert (expected - noisy).abs().max() > 1e-3  # restoring does something
    torch.testing.assert_close(result.values, expected, **EXACT)
    assert result.per_prompt.shape == (*expected.shape, 1)
    assert result.clean == pytest.approx(float(clean))
    assert result.corrupt == pytest.approx(float(noisy))


def test_restoring_all_of_the_first_state_gives_the_clean_run_and_restoring_too_late_nothing():
    model = make_model()
    tokens = make_prompts()[0][:1]
    whole = causal_trace(
        model, tokens, SUBJECT, METRIC, "resid_pre", ("layer",), samples=2, progress=False
    )
    torch.testing.assert_close(whole.normalized, torch.ones(3).double())
    single = causal_trace(model, tokens, SUBJECT, METRIC, samples=2, progress=False)
    # the last state of the subject itself is read by nobody
    assert float(single.normalized[-1, 3]) == pytest.approx(0.0, abs=1e-12)
    assert float(single.normalized[-1, -1]) == pytest.approx(1.0)


def test_prompts_of_a_padded_list_are_traced_as_each_alone(monkeypatch):
    model = make_model()
    tokens, _, mask, _ = make_prompts(padded=True)
    alone = [tokens[:1, 2:], tokens[1:]]
    subjects, answers = [(1, 2), [0, 3, 4]], [5, 9]
    expected = [
        causal_trace(
            model, prompt, [subject], metrics.prob(answer), positions=[-2, -1], progress=False
        )
        for prompt, subject, answer in zip(alone, subjects, answers, strict=True)
    ]
    text, _ = padded_as_text(model, monkeypatch, tokens, tokens, mask)
    result = causal_trace(
        model, text, subjects, metrics.prob(answers), positions=[-2, -1], progress=False
    )
    for number, one in enumerate(expected):
        torch.testing.assert_close(result.per_prompt[..., number], one.values, **EXACT)
        assert float(result.clean_per_prompt[number]) == pytest.approx(one.clean)
        assert float(result.corrupt_per_prompt[number]) == pytest.approx(one.corrupt)
    assert result.metadata["subject"] == [[1, 2], [0, 3, 4]]


def test_equal_seeds_give_equal_noise_and_other_seeds_other_noise():
    model = make_model()
    tokens = make_prompts()[0][:1]
    values = [
        causal_trace(model, tokens, 2, METRIC, samples=2, seed=seed, progress=False).values
        for seed in (4, 4, 5)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.allclose(values[0], values[2])


def test_a_callable_and_a_comparison_with_the_clean_run():
    model = make_model()
    tokens = make_prompts()[0][:1]
    added = added_noise(model, 6)
    over = ("layer", "pos")
    clean_logits = model(tokens).logits.detach()

    def both(logits):
        return logits[:, :, 5].mean(1)

    expected, _, _ = naive_trace(model, tokens, added, "resid_mid", over, 1, both)
    found = causal_trace(model, tokens, SUBJECT, both, "resid_mid", samples=SAMPLES, progress=False)
    torch.testing.assert_close(found.values, expected, atol=1e-11, rtol=1e-9)

    def divergence(logits):
        clean, other = (each[:, -1].log_softmax(-1) for each in (clean_logits, logits))
        return (clean.exp() * (clean - other)).sum(-1)

    expected, clean, _ = naive_trace(model, tokens, added, "resid_mid", over, 1, divergence)
    found = causal_trace(
        model, tokens, SUBJECT, metrics.kl(), "resid_mid", samples=SAMPLES, progress=False
    )
    torch.testing.assert_close(found.values, expected, atol=1e-11, rtol=1e-9)
    assert found.clean == pytest.approx(float(clean), abs=1e-12)


@pytest.mark.parametrize("variant", ["pre-LN", "350m"])
def test_noise_is_scaled_by_the_embeddings_standard_deviation(variant):
    model = make_model(**VARIANTS[variant])
    of_all = float(model.W_E.detach().std(correction=0))
    assert embedding_std(model) == pytest.approx(of_all)
    reference = torch.tensor([[2, 7, 8], [2, 9, 9]])  # 2 is </s>
    embed = model.run_with_cache(reference, "hook_embed")[1]["hook_embed"]
    assert embedding_std(model, reference) == pytest.approx(float(embed[:, 1:].std(correction=0)))
    result = causal_trace(
        model, reference[:1], 1, METRIC, noise=2.0, reference=reference, progress=False
    )
    assert result.metadata["noise_std"] == pytest.approx(2 * embedding_std(model, reference))


def test_the_subject_is_found_as_text_and_the_metric_is_the_prediction():
    model = optlens.load()
    prompt = "The capital of France is"
    result = causal_trace(
        model, prompt, "capital of France", samples=2, layers=[0, 2], progress=False
    )
    assert result.metadata["subject"] == [[2, 3, 4]]
    assert result.labels["pos"][4] == "4:  France"
    likeliest, token = model(prompt).logits[0, -1].detach().softmax(-1).max(-1)
    assert result.clean == pytest.approx(float(likeliest), rel=1e-4)  # float32
    assert result.metadata["metric"] == f"prob({model.tokenizer.decode(int(token))!r})"
    assert result.axes == ("layer", "pos")
    assert list(result.values.shape) == [2, 6]


def test_the_prediction_is_named_by_its_id_where_there_is_no_tokenizer():
    model, tokens = make_model(), make_prompts()[0]
    result = causal_trace(model, tokens, (1,), samples=2, layers=[0], progress=False)
    ids = model(tokens).logits[:, -1].argmax(-1).tolist()
    assert result.metadata["metric"] == f"prob({ids})"


def test_several_sites_are_an_axis_and_a_plan_says_what_they_cost():
    model = make_model()
    tokens = make_prompts()[0][:1]
    sites = ["resid_post", "mlp_out", "attn_out"]
    options = {"samples": 2, "progress": False}
    together = causal_trace(model, tokens, SUBJECT, METRIC, sites, **options)
    assert together.axes == ("component", "layer", "pos")
    alone = causal_trace(model, tokens, SUBJECT, METRIC, "mlp_out", **options)
    torch.testing.assert_close(together.values[1], alone.values)
    plan = causal_trace(model, tokens, SUBJECT, METRIC, dry_run=True, samples=2)
    assert isinstance(plan, SweepPlan)
    assert plan.patches == 3 * 6 * 2
    # position 0 comes before the subject, position 2 of block 0 has not seen it through attention
    assert plan.runs < 3 * 5 * 2


def test_a_trace_is_streamed_saved_and_completed(monkeypatch, tmp_path):
    model = make_model()
    tokens = make_prompts()[0][:1]
    arguments = (model, tokens, SUBJECT, METRIC)
    whole = causal_trace(*arguments, samples=2, progress=False)
    monkeypatch.setattr("optlens.patching.plan.MOST_TOKENS", 1)
    results = causal_trace(*arguments, samples=2, stream=True)
    first = next(results)
    assert not first.complete
    part = PatchResult(**vars(first) | {"per_prompt": first.per_prompt.clone()})
    assert all(result is first for result in results)
    torch.testing.assert_close(first.per_prompt, whole.per_prompt)
    part.save(tmp_path / "part.safetensors")
    run, calls = Wave.run, []
    monkeypatch.setattr(Wave, "run", lambda self, rows: calls.append(rows) or run(self, rows))
    loaded = PatchResult.load(tmp_path / "part.safetensors")
    again = causal_trace(*arguments, samples=2, resume=loaded, progress=False)
    torch.testing.assert_close(again.per_prompt, whole.per_prompt)
    assert sum(map(len, calls)) == 2 * int(part.per_prompt.isnan().sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": 0}, "positive multiple"),
        ({"samples": 0}, "at least once"),
        ({"subject": 6}, "0 to 5"),
        ({"subject": "Rome"}, "no tokenizer"),
        ({"site": "resid"}, "there are embed"),
        ({"metric": metrics.prob([5, 6])}, "1 prompts|2 entries|entries"),
        ({"reference": torch.tensor([[2, 2]])}, "no token but"),
    ],
)
def test_bad_arguments_say_what_would_be_right(changes, message):
    model = make_model()
    tokens = make_prompts()[0][:1]
    arguments = {"subject": 1, "metric": METRIC, "samples": 2, "progress": False} | changes
    with pytest.raises(InputError, match=message):
        causal_trace(model, tokens, **arguments)
