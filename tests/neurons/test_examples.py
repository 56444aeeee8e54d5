"""Top examples against a search through every window, one by one."""

import pytest
import torch
from conftest import random_model, tiny_config

import optlens
from optlens.checks import InputError
from optlens.neurons import TopExamples, result, top_examples

WINDOW, BEFORE, AFTER, K = 9, 3, 2, 5
GENERATOR = torch.Generator().manual_seed(5)
# few different tokens, so that contexts repeat; 61 windows of 8 tokens of their own, and a rest
TOKENS = torch.randint(3, 7, (61 * 8 + 5,), generator=GENERATOR)
ALL = {"k": K, "context": (BEFORE, AFTER), "window": WINDOW, "progress": False}


def by_hand(model, layer: int) -> list[list[dict]]:
    """Return each neuron's examples, from a run of its own for every window."""
    candidates: list[list[dict]] = [[] for _ in range(model.config.d_mlp)]
    for start in range(0, len(TOKENS), WINDOW - 1):
        ids = [2, *TOKENS[start : start + WINDOW - 1].tolist()]
        _, cache = model.run_with_cache(torch.tensor([ids]))
        post = cache["mlp_post", layer][0].detach().float()
        for neuron in range(model.config.d_mlp):
            values = post[1:, neuron].tolist()
            at = values.index(max(values)) + 1
            low, high = max(0, at - BEFORE), min(len(ids), at + 1 + AFTER)
            candidates[neuron].append(
                {
                    "activation": max(values),
                    "tokens": ids[low:high],
                    "activations": post[low:high, neuron].tolist(),
                    "index": at - low,
                    "offset": start + at - 1,
                    "position": at,
                    "same": (at < BEFORE, tuple(ids[low : at + 1])),
                }
            )
    best = []
    for found in candidates:
        kept: list[dict] = []
        for one in sorted(found, key=lambda one: (-one["activation"], one["offset"])):
            if one["activation"] > 0 and one["same"] not in [other["same"] for other in kept]:
                kept.append(one)
        best.append(kept[:K])
    return best


def assert_equal(example, expected):
    for name in ("tokens", "index", "offset", "position"):
        assert getattr(example, name) == expected[name]
    assert example.activation == pytest.approx(expected["activation"], rel=1e-6)
    assert example.activations == pytest.approx(expected["activations"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_all_neurons_equal_a_search_by_hand(variant, batch_size):
    # in float64 the same text has the same activation in every batch, once rounded to float32
    model = random_model(tiny_config(**variant), torch.float64)
    found = top_examples(model, TOKENS, **ALL, batch_size=batch_size)
    assert found.counted == len(TOKENS)
    for layer in range(2):
        for neuron, expected in enumerate(by_hand(model, layer)):
            examples = found.of(layer, neuron)
            assert len(examples) == len(expected)
            for example, one in zip(examples, expected, strict=True):
                assert_equal(example, one)


def test_contexts_repeat_in_this_text():
    """Otherwise the tests above would not see whether repeated contexts are dropped."""
    model = random_model(tiny_config(), torch.float64)
    found = top_examples(model, TOKENS, **ALL)
    with_long_context = top_examples(model, TOKENS, **ALL | {"context": (8, 0)})
    assert not torch.equal(found.offsets, with_long_context.offsets)


def test_some_neurons_equal_their_rows_among_all():
    model = random_model(tiny_config(), torch.float64)
    everything = top_examples(model, TOKENS, **ALL)
    some = top_examples(model, TOKENS, layers=-1, neurons=[40, 3], **ALL)
    assert some.layers == [1] and some.neurons == [40, 3]
    for name in ("values", "tokens", "activations", "documents", "offsets", "positions"):
        rows = getattr(everything, name)[1][[40, 3]]
        torch.testing.assert_close(getattr(some, name)[0], rows, equal_nan=True)


def test_a_layer_named_twice_is_one():
    model = random_model(tiny_config())
    assert top_examples(model, TOKENS, layers=[0, -2], neurons=[1, 1], **ALL).values.shape == (
        1,
        1,
        K,
    )


def test_equal_activations_come_in_the_order_of_the_text(tiny_model):
    """A neuron that fires equally everywhere: of each window its first token."""
    layer = tiny_model.decoder.layers[0].fc1
    with torch.no_grad():
        layer.weight[7], layer.bias[7] = 0.0, 1.5
    tokens = torch.arange(3, 99)  # no context repeats
    for batch_size in (1, 5):
        found = top_examples(tiny_model, tokens, 0, 7, **ALL, batch_size=batch_size)
        assert found.offsets.flatten().tolist() == [0, 8, 16, 24, 32]
        assert set(found.values.flatten().tolist()) == {1.5}


def test_the_start_of_a_window_is_part_of_a_context(tiny_model):
    """Without `</s>`: 10 at the start of a window is another text than 10 behind any token."""
    tokens = torch.tensor([10, 11, 3, 10, 10, 12, 3, 10])
    windows = tokens.view(4, 2)

    def fire_on_ten(post, hook):
        post[:, :, 7] = (windows == 10).float()

    options = {"k": 5, "context": (1, 0), "window": 2, "prepend_bos": False, "progress": False}
    with tiny_model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", fire_on_ten)]):
        found = top_examples(tiny_model, tokens, 0, 7, **options)
    assert [example.tokens for example in found.of(0, 7)] == [[10], [3, 10]]
    assert [example.offset for example in found.of(0, 7)] == [0, 3]


def test_a_neuron_that_never_fires_has_no_examples(tiny_model):
    with torch.no_grad():
        tiny_model.decoder.layers[0].fc1.bias[7] = -100.0
    found = top_examples(tiny_model, TOKENS, 0, [7, 8], **ALL)
    assert found.of(0, 7) == [] and len(found.of(0, 8)) == K
    assert found.values[0, 0].tolist() == [0.0] * K
    assert (found.documents[0, 0] == -1).all() and found.activations[0, 0].isnan().all()


def test_interventions_act(tiny_model):
    with tiny_model.intervene([optlens.Scale("mlp_post", layer=0, neuron=8, factor=0)]):
        found = top_examples(tiny_model, TOKENS, 0, 8, **ALL)
    assert found.of(0, 8) == []


def test_examples_of_the_demo_are_about_their_token():
    """A neuron of the demo that announces to whom something is given, as the model card's task is."""
    model = optlens.load()
    texts = ["The cat sat on the mat.", "Mary gave a pen to John.", "Ann handed the book to Bob."]
    examples = top_examples(model, texts, 1, 986, progress=False).of(1, 986)
    assert [example.labels[example.index] for example in examples[:2]] == ["·to", "·to"]
    assert sorted(example.document for example in examples[:2]) == [1, 2]
    assert repr(examples[0]).count("[·to]") == 1
    _, cache = model.run_with_cache(texts[examples[0].document])
    own = cache["mlp_post", 1][0, examples[0].position, 986]
    assert examples[0].activation == pytest.approx(float(own), rel=1e-4)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    found = top_examples(optlens.load(), "The cat sat on the mat.", 0, [1, 2], progress=False)
    found.save(tmp_path / "examples.safetensors")
    loaded = TopExamples.load(tmp_path / "examples.safetensors")
    assert repr(loaded) == repr(found)
    assert list(map(repr, loaded.of(0, 1))) == list(map(repr, found.of(0, 1)))
    assert loaded.to_dataframe().equals(found.to_dataframe())


def test_the_table_has_a_row_for_each_example():
    found = top_examples(optlens.load(), "The cat sat on the mat.", 0, [1, 2], progress=False)
    frame = found.to_dataframe()
    assert len(frame) == int((found.values > 0).sum())
    assert repr(found) == "TopExamples(2 neurons of layer 0; up to 10 examples each, of 8 tokens)"


def test_wrong_requests_are_refused(tiny_model, monkeypatch):
    with pytest.raises(InputError, match="k=0 and context"):
        top_examples(tiny_model, TOKENS, k=0)
    with pytest.raises(InputError, match="neurons=64 asks for 64, but there are 64"):
        top_examples(tiny_model, TOKENS, neurons=64)
    found = top_examples(tiny_model, TOKENS, 0, 7, **ALL)
    with pytest.raises(InputError, match="Neuron 8 of layer 0 was not looked at"):
        found.of(0, 8)
    monkeypatch.setattr(result, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="choose fewer layers= or neurons="):
        top_examples(tiny_model, TOKENS)
