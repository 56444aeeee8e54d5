"""Firing counted by hand, and mutual information from the joint table."""

import math

import pytest
import torch
from conftest import TOL, random_model, tiny_config

import optlens
from optlens.neurons import NeuronStatistics, result, statistics

WINDOW = 9
GENERATOR = torch.Generator().manual_seed(6)
TOKENS = torch.randint(3, 101, (40 * 8 + 5,), generator=GENERATOR)
OPTIONS = {"window": WINDOW, "progress": False}


def by_hand(model, layer: int) -> list[torch.Tensor]:
    """Return the activations of each window, `[pos, neuron]`, without its `</s>`."""
    found = []
    for start in range(0, len(TOKENS), WINDOW - 1):
        ids = torch.cat([torch.tensor([2]), TOKENS[start : start + WINDOW - 1]])
        _, cache = model.run_with_cache(ids[None])
        found.append(cache["mlp_post", layer][0, 1:].detach())
    return found


def entropy(counts) -> float:
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts if c)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_counts_equal_counting_by_hand(variant, batch_size):
    model = random_model(tiny_config(**variant))
    found = statistics(model, TOKENS, **OPTIONS, batch_size=batch_size)
    assert found.counted == len(TOKENS)
    assert found.tokens_at.tolist() == [0, *[41] * 5, *[40] * 3]
    for layer in range(2):
        windows = by_hand(model, layer)
        values = torch.cat(windows)
        torch.testing.assert_close(found.fired[layer], (values > 0).sum(0))
        torch.testing.assert_close(found.frequency[layer], (values > 0).double().mean(0))
        torch.testing.assert_close(found.mean[layer], values.double().mean(0), **TOL[torch.float32])
        torch.testing.assert_close(found.max[layer], values.amax(0), **TOL[torch.float32])
        at_three = torch.stack([window[2] for window in windows if len(window) > 2])
        expected = (at_three > 0).double().mean(0)
        torch.testing.assert_close(found.position_frequency[layer, :, 3], expected)


def test_information_is_that_of_the_joint_table(tiny_model):
    found = statistics(tiny_model, TOKENS, **OPTIONS)
    windows = by_hand(tiny_model, 1)
    for neuron in range(64):
        table = [[0, 0] for _ in range(WINDOW - 1)]
        for window in windows:
            for pos, value in enumerate(window[:, neuron].tolist()):
                table[pos][value > 0] += 1
        joint = entropy([count for row in table for count in row])
        apart = entropy([sum(row) for row in table])
        fires = entropy([sum(row[i] for row in table) for i in (0, 1)])
        expected = apart + fires - joint
        assert float(found.position_information[1, neuron]) == pytest.approx(expected, abs=1e-12)


def driven(model, fire):
    """Statistics of neuron 3 when `fire(batch, pos)` decides where it does."""

    def edit(post, hook):
        post[:, :, 3] = fire(*post.shape[:2]).float()

    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", edit)]):
        return statistics(model, TOKENS, layers=0, neurons=[3], **OPTIONS)


def test_a_neuron_of_some_positions_is_positional(tiny_model):
    found = driven(tiny_model, lambda batch, pos: (torch.arange(pos) < 4).expand(batch, pos))
    share = float(found.frequency)
    assert float(found.position_information) == pytest.approx(entropy([share, 1 - share]))
    assert bool(found.positional())
    assert found.position_frequency[0, 0, 1:].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert found.position_frequency[0, 0, 0].isnan()  # `</s>` is not counted


def test_a_neuron_that_ignores_the_position_has_the_bias_alone(tiny_model):
    """The information that chance leaves in a finite text, on average over many such neurons."""
    generator = torch.Generator().manual_seed(1)
    chances = [
        driven(tiny_model, lambda *shape: torch.rand(shape, generator=generator) < 0.3)
        for _ in range(60)
    ]
    mean = sum(float(found.position_information) for found in chances) / len(chances)
    # (8 - 1) / (2 * 325) = 0.0108; the mean of 60 has a standard error of 7 %
    assert mean == pytest.approx(chances[0].bias, rel=0.25)
    assert not any(bool(found.positional()) for found in chances)


def test_neurons_that_always_or_never_fire_have_no_information(tiny_model):
    for value in (False, True):
        found = driven(tiny_model, lambda *shape, value=value: torch.full(shape, value))
        assert float(found.position_information) == 0.0
        assert float(found.frequency) == float(value)
        assert bool(found.dead) is not value


def test_dead_neurons_are_found(tiny_model):
    with torch.no_grad():
        tiny_model.decoder.layers[1].fc1.bias[[5, 9]] = -100.0
    found = statistics(tiny_model, TOKENS, **OPTIONS)
    assert {(1, 5), (1, 9)} <= set(map(tuple, found.dead.nonzero().tolist()))
    assert not found.dead[0, [5, 9]].any()
    assert found.max[1, 5] == 0.0 and found.mean[1, 5] == 0.0


def test_chosen_neurons_are_rows_of_all(tiny_model):
    everything = statistics(tiny_model, TOKENS, **OPTIONS)
    some = statistics(tiny_model, TOKENS, layers=1, neurons=[30, 2], **OPTIONS)
    assert torch.equal(some.fired_at[0], everything.fired_at[1][[30, 2]])
    assert some.place(1, 2) == (0, 1)


def test_saved_and_loaded_it_is_the_same(tiny_model, tmp_path):
    found = statistics(tiny_model, TOKENS, **OPTIONS)
    found.save(tmp_path / "statistics.safetensors")
    loaded = NeuronStatistics.load(tmp_path / "statistics.safetensors")
    assert repr(loaded) == repr(found)
    assert loaded.to_dataframe().equals(found.to_dataframe())
    with pytest.raises(ValueError, match="holds NeuronStatistics, not a TopExamples"):
        optlens.neurons.TopExamples.load(tmp_path / "statistics.safetensors")


def test_table_and_repr_say_what_was_counted(tiny_model):
    with torch.no_grad():
        tiny_model.decoder.layers[0].fc1.bias[:] = -100.0
    found = statistics(tiny_model, TOKENS, layers=0, **OPTIONS)
    assert (
        repr(found) == "NeuronStatistics(64 neurons of layer 0; over 325 tokens 64 of 64 are dead)"
    )
    frame = found.to_dataframe()
    assert len(frame) == 64 and frame["dead"].all()


def test_what_does_not_fit_is_refused_before_running(tiny_model, monkeypatch):
    monkeypatch.setattr(result, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="smaller window="):
        statistics(tiny_model, TOKENS, **OPTIONS)
