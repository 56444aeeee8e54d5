"""Comparisons against whole tables of probabilities, and what must be exactly nothing."""

import copy
import math

import pytest
import torch
from conftest import TOL, random_model, tiny_config

import optlens
from optlens.checks import InputError
from optlens.comparison import Comparison, compare, numbers
from optlens.recording import NotRecordedError, Recording

TOKENS = torch.tensor([2, 10, 20, 30, 40, 50, 60])
LONGER = torch.tensor([2, 10, 20, 99, 98, 30, 41, 50, 60])
PAIRS = [(0, 0), (1, 1), (2, 2), (3, 5), (4, 6), (5, 7), (6, 8)]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float64 numbers, rounded to float32


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def predictions(model, tokens):
    """Return the residual stream, and the log-probabilities of every row of it."""
    rec = model.record(tokens, what="residual")
    with torch.no_grad():
        return rec.residual, model.unembed(rec.residual).log_softmax(-1)


def same(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), **CLOSE)


@pytest.fixture
def two():
    config = tiny_config()
    return random_model(config, torch.float64), random_model(config, torch.float64, seed=1)


def test_two_models_equal_the_whole_table(variant, monkeypatch):
    monkeypatch.setattr(numbers, "CHUNK_BYTES", 4 * 101 * 3)  # three positions at a time
    models = [random_model(tiny_config(**variant), torch.float64, seed) for seed in (0, 1)]
    (stream_a, log_a), (stream_b, log_b) = (predictions(model, TOKENS) for model in models)
    found = compare(*models, TOKENS)
    last_a, last_b = log_a[-1], log_b[-1]
    same(found.kl, kl(last_a, last_b))
    same(found.kl_reverse, kl(last_b, last_a))
    middle = ((last_a.exp() + last_b.exp()) / 2).log()
    same(found.js, (kl(last_a, middle) + kl(last_b, middle)) / 2)
    same(found.lens_kl, kl(log_a, log_b))
    same(found.cosine, torch.cosine_similarity(stream_a, stream_b, dim=-1))
    for log, top, prob, final in (
        (log_a, found.top_a, found.prob_a, found.final_a),
        (log_b, found.top_b, found.prob_b, found.final_b),
    ):
        assert torch.equal(top, log.argmax(-1)) and torch.equal(final, top[-1])
        same(prob, log.exp().amax(-1))
    assert torch.equal(found.changed, log_a[-1].argmax(-1) != log_b[-1].argmax(-1))
    assert found.rows == ["embed", "0", "1"] and len(found.labels) == len(TOKENS)
    assert bool(found.aligned.all())


def test_predictions_are_those_of_the_forward_pass(two):
    with torch.no_grad():
        log_a, log_b = (model(TOKENS).logits[0].log_softmax(-1) for model in two)
    same(compare(*two, TOKENS).kl, kl(log_a, log_b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_differ_by_exactly_nothing(variant, dtype):
    model = random_model(tiny_config(**variant), dtype)
    found = compare(model, copy.deepcopy(model), TOKENS)
    for nothing in (found.kl, found.kl_reverse, found.js, found.lens_kl):
        assert torch.equal(nothing, torch.zeros_like(nothing))
    assert torch.equal(found.cosine, torch.ones_like(found.cosine))
    assert not found.changed.any()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_changed_head_shows_from_its_layer_on_only(layer):
    model = random_model(tiny_config(num_hidden_layers=3))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decoder.layers[layer].self_attn.out_proj.weight[:, 8:16] *= 1.5  # head 1
    found = compare(model, other, TOKENS)
    assert torch.equal(found.lens_kl[: layer + 1], torch.zeros(layer + 1, len(TOKENS)))
    assert torch.equal(found.cosine[: layer + 1], torch.ones(layer + 1, len(TOKENS)))
    assert (found.lens_kl[layer + 1 :] > 0).all()
    assert (found.cosine[layer + 1 :] < 1).all()


def test_divergences_are_within_their_bounds(two):
    found = compare(*two, TOKENS)
    assert (found.js >= 0).all() and (found.js <= math.log(2)).all()
    assert (found.js <= torch.minimum(found.kl, found.kl_reverse)).all()
    swapped = compare(*reversed(two), TOKENS)
    same(swapped.kl, found.kl_reverse)
    same(swapped.js, found.js)


def test_two_prompts_are_compared_where_they_are_aligned(two, monkeypatch):
    monkeypatch.setattr(numbers, "CHUNK_BYTES", 4 * 101 * 2)  # some chunks have one side only
    model = two[0]
    stream_a, log_a = predictions(model, TOKENS)
    stream_b, log_b = predictions(model, LONGER)
    found = compare(model, None, TOKENS, LONGER)
    assert found.columns == [*PAIRS[:3], (None, 3), (None, 4), *PAIRS[3:]]
    assert found.aligned.tolist() == [True] * 3 + [False] * 2 + [True] * 4
    here, there = (list(side) for side in zip(*PAIRS, strict=True))
    same(found.kl[found.aligned], kl(log_a[-1, here], log_b[-1, there]))
    same(found.lens_kl[:, found.aligned], kl(log_a[:, here], log_b[:, there]))
    cosine = torch.cosine_similarity(stream_a[:, here], stream_b[:, there], dim=-1)
    same(found.cosine[:, found.aligned], cosine)
    for alone in (found.kl, found.js, found.lens_kl[1], found.cosine[2], found.prob_a[0]):
        assert alone[~found.aligned].isnan().all()
    # what has no counterpart still has its own prediction
    assert torch.equal(found.final_b[[3, 4]], log_b[-1, [3, 4]].argmax(-1))
    assert found.final_a[[3, 4]].tolist() == [-1, -1]
    assert not found.changed[~found.aligned].any()
    assert found.labels[3] == " | ⟨99⟩" and found.labels[6] == "⟨40⟩ | ⟨41⟩"


def test_the_prompt_of_each_model_may_differ(two):
    found = compare(*two, TOKENS, LONGER)
    assert found.final_a.tolist()[0] == int(two[0](TOKENS).logits[0, 0].argmax())
    assert found.final_b.tolist()[-1] == int(two[1](LONGER).logits[0, -1].argmax())


def test_models_of_other_depths_are_paired_by_relative_depth():
    shallow = random_model(tiny_config(), torch.float64)
    deep = random_model(tiny_config(num_hidden_layers=5), torch.float64)
    (stream, log), (deep_stream, deep_log) = (predictions(m, TOKENS) for m in (shallow, deep))
    found = compare(shallow, deep, TOKENS)
    assert found.rows == ["embed", "0 | 2", "1 | 4"]
    same(found.lens_kl, kl(log, deep_log[[0, 3, 5]]))
    same(found.cosine, torch.cosine_similarity(stream, deep_stream[[0, 3, 5]], dim=-1))
    assert compare(deep, shallow, TOKENS).rows == ["embed", "2 | 0", "4 | 1"]


def test_models_of_other_widths_have_no_cosine(two, tmp_path):
    wide = random_model(tiny_config(hidden_size=64, word_embed_proj_dim=64), torch.float64)
    found = compare(two[0], wide, TOKENS)
    assert found.cosine is None and (found.kl > 0).all()
    with pytest.raises(InputError, match="differ in width"):
        found.plot("cosine")
    found.save(tmp_path / "found.safetensors")
    assert Comparison.load(tmp_path / "found.safetensors").cosine is None


def test_recordings_are_compared_like_their_models(two, tmp_path):
    recordings = [model.record(TOKENS) for model in two]
    expected = compare(*two, TOKENS)
    found = compare(*recordings)
    assert torch.equal(found.kl, expected.kl) and torch.equal(found.cosine, expected.cosine)
    mixed = compare(recordings[0], two[1], prompt_b=TOKENS)
    assert torch.equal(mixed.lens_kl, expected.lens_kl)

    recordings[0].save(tmp_path / "rec.safetensors")
    loaded = Recording.load(tmp_path / "rec.safetensors")
    with pytest.raises(NotRecordedError, match="attach"):
        compare(loaded, recordings[1])
    assert torch.equal(compare(loaded.attach(two[0]), recordings[1]).kl, expected.kl)


def test_an_intervention_shows_from_its_layer_on_only():
    model = random_model(tiny_config(num_hidden_layers=3))
    ablated = optlens.Ablate("z", layer=1, head=2, mode="zero")
    found = compare(model.record(TOKENS), model.record(TOKENS, interventions=[ablated]))
    assert torch.equal(found.lens_kl[:2], torch.zeros(2, len(TOKENS)))
    assert (found.lens_kl[2:] > 0).all() and (found.kl > 0).all()


def test_parts_of_recordings_are_compared(two):
    parts = [model.record(TOKENS, layers=[1], pos=[2, -1]) for model in two]
    expected, found = compare(*two, TOKENS), compare(*parts)
    assert found.rows == ["embed", "1"]
    same(found.lens_kl, expected.lens_kl[[0, 2]][:, [2, 6]])
    same(found.kl, expected.kl[[2, 6]])
    assert found.labels == ["⟨20⟩", "⟨60⟩"]
    with pytest.raises(InputError, match=r"a holds layers \[1\] and b layers \[0, 1\]"):
        compare(parts[0], two[1].record(TOKENS))
    deep = random_model(tiny_config(num_hidden_layers=3), torch.float64)
    with pytest.raises(InputError, match="needs all of them; a holds"):
        compare(parts[0], deep.record(TOKENS))


def test_no_table_over_layers_positions_and_vocabulary_is_made(monkeypatch):
    """Each call of the unembedding sees a chunk of one row."""
    monkeypatch.setattr(numbers, "CHUNK_BYTES", 4 * 101 * 3)
    model = random_model(tiny_config())
    sizes = []
    unembed = Recording._unembed
    monkeypatch.setattr(
        Recording, "_unembed", lambda rec, x: (sizes.append(x.shape), unembed(rec, x))[1]
    )
    compare(model, None, TOKENS, LONGER)
    assert all(len(shape) == 2 and shape[0] <= 3 for shape in sizes)


def test_what_cannot_be_compared_is_refused(two):
    a, b = two
    recording = a.record(TOKENS)
    for arguments, message in (
        ((a, None, TOKENS), "nothing to compare with"),
        ((a, b), "a is a model and needs a prompt"),
        ((recording, b), "b is a model and needs a prompt"),
        ((recording, recording, TOKENS), "a is a recording, which has its prompt"),
        ((a, b, TOKENS[None].repeat(2, 1)), "a has a batch of 2 prompts"),
        ((a, random_model(tiny_config(vocab_size=102)), TOKENS), "of 101 and 102 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            compare(*arguments)
    with pytest.raises(TypeError, match="a is a NoneType"):
        compare(None, a, TOKENS)
    with pytest.raises(TypeError, match=r"b is a str.*compare\(model, None, prompt, prompt_b\)"):
        compare(a, "The cat")
    with pytest.raises(NotRecordedError, match="residual"):
        compare(a.record(TOKENS, what="attention"), recording)


def test_models_that_name_tokens_otherwise_are_refused():
    model = optlens.load()
    other = copy.deepcopy(model)
    display = other.tokenizer.to_str_tokens
    other.tokenizer.to_str_tokens = lambda ids: ["dog" if i == 77 else t for i, t in zip(ids, display(ids), strict=True)]  # fmt: skip
    with pytest.raises(InputError, match="tokenizers differ: token 77 is .* 'dog' in b"):
        compare(model, other, "The cat")


def test_a_demo_comparison_reads_well(tmp_path):
    model = optlens.load()
    clean = "When Mary and John went to the store, John gave a drink to"
    found = compare(model, None, clean, clean.replace(", John", ", Mary"))
    assert found.labels[-5] == "·John | ·Mary"
    worst = int(found.kl.argmax())
    assert bool(found.changed[worst])
    names = found.label(found.final_a[-1]), found.label(found.final_b[-1])
    assert names == ("·Mary", "·John") and found.label(-1) == ""
    assert repr(found) == repr(compare(model, None, clean, clean.replace(", John", ", Mary")))
    frame = found.to_dataframe()
    assert len(frame) == len(found.columns) and frame["top_b"].iloc[-1] == "·John"

    found.save(tmp_path / "found.safetensors")
    loaded = Comparison.load(tmp_path / "found.safetensors")
    assert repr(loaded) == repr(found) and loaded.to_dataframe().equals(frame)
    assert loaded.columns == found.columns


def test_figures_show_the_numbers(two):
    found = compare(*two, TOKENS)
    figure = found.plot()
    drawn = figure.axes[0].images[0].get_array()
    torch.testing.assert_close(
        torch.tensor(drawn.data), found.lens_kl.double(), **TOL[torch.float32]
    )
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["embed", "0", "1"]
    cosine = found.plot("cosine", style="dark").axes[0].images[0].get_array()
    torch.testing.assert_close(torch.tensor(cosine.data), 1 - found.cosine.double(), **CLOSE)
    with pytest.raises(InputError, match="give one of kl, cosine"):
        found.plot("js")
