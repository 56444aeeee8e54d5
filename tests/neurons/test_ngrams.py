"""N-grams that set neurons off, against counters that keep everything."""

from collections import Counter

import pytest
import torch
from conftest import random_model, tiny_config

import optlens
from optlens.checks import InputError
from optlens.neurons import Triggers, ngrams, result, triggers

WINDOW = 9
GENERATOR = torch.Generator().manual_seed(7)
TOKENS = torch.randint(3, 15, (50 * 8 + 5,), generator=GENERATOR)
OPTIONS = {"window": WINDOW, "progress": False}


def by_hand(model, layer: int, n: int) -> list[Counter]:
    """Count, for each neuron, the n-grams that end where it fires."""
    found = [Counter() for _ in range(model.config.d_mlp)]
    for start in range(0, len(TOKENS), WINDOW - 1):
        ids = [2, *TOKENS[start : start + WINDOW - 1].tolist()]
        _, cache = model.run_with_cache(torch.tensor([ids]))
        for pos, neuron in (cache["mlp_post", layer][0] > 0).nonzero().tolist():
            if pos >= max(1, n - 1):
                found[neuron][tuple(ids[pos - n + 1 : pos + 1])] += 1
    return found


def ordered(counter: Counter) -> list:
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def covering(counter: Counter, coverage: float, most: int) -> int:
    total, reached = sum(counter.values()), 0
    if total == 0:
        return 0
    for number, (_, count) in enumerate(ordered(counter)[:most], 1):
        reached += count
        if reached / total >= coverage:
            return number
    return most + 1


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("buffer", [1, 500, ngrams.BUFFER])
def test_counts_equal_counting_by_hand(monkeypatch, tiny_model, n, buffer):
    monkeypatch.setattr(ngrams, "BUFFER", buffer)
    found = triggers(tiny_model, TOKENS, n=n, coverage=0.8, most=9, **OPTIONS)
    assert found.tokens.shape == (2, 64, 9, n) and int(found.lost.max()) == 0
    for layer in range(2):
        for neuron, counter in enumerate(by_hand(tiny_model, layer, n)):
            got = [(tuple(one.tokens), one.count) for one in found.of(layer, neuron)]
            assert got == ordered(counter)[:9]
            assert int(found.fired[layer, neuron]) == sum(counter.values())
            assert int(found.covering[layer, neuron]) == covering(counter, 0.8, 9)


def test_variants_count_alike(variant):
    model = random_model(tiny_config(**variant))
    found = triggers(model, TOKENS, layers=1, most=12, **OPTIONS)
    expected = by_hand(model, 1, 1)
    for neuron in range(64):
        got = {tuple(one.tokens): one.count for one in found.of(1, neuron)}
        assert got == dict(expected[neuron])


@pytest.mark.parametrize("n", [2, 3])
def test_a_small_capacity_loses_no_more_than_it_says(monkeypatch, tiny_model, n):
    monkeypatch.setattr(ngrams, "BUFFER", 1)
    capacity = 12
    found = triggers(tiny_model, TOKENS, n=n, most=12, capacity=capacity, **OPTIONS)
    assert int(found.lost.max()) > 0
    for neuron, counter in enumerate(by_hand(tiny_model, 0, n)):
        lost = int(found.lost[0, neuron])
        assert lost <= sum(counter.values()) / (capacity + 1)
        got = {tuple(one.tokens): one.count for one in found.of(0, neuron)}
        assert int(found.fired[0, neuron]) == sum(counter.values())
        for gram, count in counter.items():
            assert 0 <= count - got.get(gram, 0) <= lost


def driven(model, fire, **options):
    """Triggers of neuron 3 of layer 0 when `fire(tokens)` decides where it fires."""
    seen = []

    def edit(post, hook):
        post[:, :, 3] = fire(seen[-1]).float()

    def remember(module, arguments):
        seen.append(arguments[0])

    handle = model.decoder.embed_tokens.register_forward_pre_hook(remember)
    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", edit)]):
        found = triggers(model, TOKENS, layers=0, neurons=[3], **OPTIONS | options)
    handle.remove()
    return found


def test_a_detector_of_tokens_is_one(tiny_model):
    found = driven(tiny_model, lambda tokens: (tokens == 5) | (tokens == 9), most=3)
    assert bool(found.detectors) and int(found.covering) == 2
    assert {one.tokens[0] for one in found.of(0, 3)} == {5, 9}
    assert sum(one.share for one in found.of(0, 3)) == 1.0
    assert int(found.fired) == int(((TOKENS == 5) | (TOKENS == 9)).sum())


def test_a_detector_of_pairs_has_its_pairs(tiny_model):
    """A neuron that fires on whatever follows token 5."""
    places = [p for p in range(len(TOKENS)) if p % 8 and TOKENS[p - 1] == 5]
    pairs = {(5, int(TOKENS[p])) for p in places}
    after_five = {"fire": lambda tokens: tokens.roll(1, 1) == 5, "n": 2, "coverage": 1.0}
    found = driven(tiny_model, **after_five, most=len(pairs))
    assert int(found.covering) == len(pairs) and bool(found.detectors)
    assert {tuple(one.tokens) for one in found.of(0, 3)} == pairs
    assert int(found.fired) == len(places)
    assert not bool(driven(tiny_model, **after_five, most=len(pairs) - 1).detectors)


def test_neurons_that_fire_never_or_everywhere_detect_nothing(tiny_model):
    never = driven(tiny_model, lambda tokens: tokens < 0)
    assert int(never.covering) == 0 and not bool(never.detectors) and never.of(0, 3) == []
    always = driven(tiny_model, lambda tokens: tokens >= 0, most=5)
    assert int(always.covering) == 6 and not bool(always.detectors)


def test_labels_table_and_file(tmp_path):
    text = "Mary gave a pen to John. Ann gave the cup to Bob. Tom gave a pen to Kim."
    found = triggers(optlens.load(), text, 1, 986, progress=False)
    assert repr(found.of(1, 986)[0]).startswith("·to ")
    assert found.to_dataframe()["ngram"][0] == "·to"
    found.save(tmp_path / "triggers.safetensors")
    loaded = Triggers.load(tmp_path / "triggers.safetensors")
    assert loaded.of(1, 986) == found.of(1, 986)
    assert repr(loaded) == repr(found)
    assert "1 of 1 fire on 50 1-grams or fewer, to 95 %" in repr(found)


def test_wrong_requests_are_refused(tiny_model, monkeypatch):
    for options in ({"n": 0}, {"most": 0}, {"capacity": 49}, {"coverage": 0.0}, {"coverage": 1.1}):
        with pytest.raises(InputError, match="do not go together"):
            triggers(tiny_model, TOKENS, **options)
    with pytest.raises(
        InputError, match="10-grams of 101 tokens for 64 neurons cannot be numbered"
    ):
        triggers(tiny_model, TOKENS, n=10)
    monkeypatch.setattr(result, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="smaller capacity="):
        triggers(tiny_model, TOKENS)
