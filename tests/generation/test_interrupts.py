"""Wherever in a step an interrupt comes, the step is whole or has left no trace."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config

import optlens
from optlens.generation.decode import Decoding
from optlens.generation.processing import Processing
from optlens.generation.stopping import StopStrings
from optlens.kv_cache import KVCache

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))


def interrupting(monkeypatch, owner: type, name: str, call: int) -> None:
    """Let a method run so many times, then interrupt once instead of running."""
    real, calls = getattr(owner, name), []

    def method(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize("place", [(Decoding, "_note_ends"), (Processing, "__call__")], ids=str)
def test_a_step_cut_off_in_the_middle_is_taken_back(place, monkeypatch):
    model = random_model(tiny_config(), torch.float64)
    whole = model.generate(IDS, 6, stop_at_eos=False)
    end = int(whole[0, 9])  # the third new token ends the first text
    options = {"eos_token_id": end, "output_scores": True, "return_dict": True}
    asked = model.generate(IDS, 2, **options)
    interrupting(monkeypatch, *place, call=3)
    with pytest.warns(UserWarning, match="Interrupted after 2 of at most 6"):
        result = model.generate(IDS, 6, **options)
    assert result.sequences.equal(asked.sequences) and result.mask.equal(asked.mask)
    assert len(result.scores) == 2 and set(result.finish_reasons) == {"interrupted"}
    assert result.past_key_values.get_seq_length() == asked.past_key_values.get_seq_length()


def test_a_stream_goes_on_behind_an_interrupt_between_two_tokens(monkeypatch):
    model = random_model(tiny_config(), torch.float64)
    expected = model.generate(IDS[0], 6, output_scores=True, stop_at_eos=False)
    end = int(expected.sequences[0, 9])
    interrupting(monkeypatch, Decoding, "_note_ends", call=2)
    stream = model.stream(IDS[0], 6, eos_token_id=end, output_scores=True)
    pieces = [next(stream)]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    pieces += stream
    assert pieces == expected.sequences[0, 7:10].tolist()
    assert stream.result.finish_reasons == ["eos"]
    assert torch.stack(stream.result.scores).equal(torch.stack(expected.scores[:3]))


def test_an_end_noted_in_a_step_that_is_cut_off_is_forgotten(monkeypatch):
    demo = optlens.load()
    tokens = demo.to_tokens("Once upon a time")[0]
    end = int(demo.generate(tokens, 3)[-1])
    interrupting(monkeypatch, StopStrings, "completed", call=3)
    with pytest.warns(UserWarning, match="Interrupted after 2 of at most 6"):
        result = demo.generate(
            tokens, 6, eos_token_id=end, stop_strings="nowhere", return_dict=True
        )
    assert result.finish_reasons == ["interrupted"] and len(result.new_tokens[0]) == 2


@pytest.mark.parametrize("given", [False, True])
def test_several_texts_interrupted_in_their_first_step_can_be_forked(given, monkeypatch):
    """The prompts' keys and values, one row for each, may have been multiplied or not."""
    model = random_model(tiny_config(), torch.float64)
    options = {"seed": 1, "num_return_sequences": 2, "stop_at_eos": False, "return_dict": True}
    if given:
        options["past_key_values"] = model(IDS[:, :5], use_cache=True).past_key_values
    interrupting(monkeypatch, Processing, "__call__", call=1)
    with pytest.warns(UserWarning, match="Interrupted after 0 of at most 6"):
        result = model.generate(IDS, 6, **options)
    assert result.past_key_values is None
    assert result.sequences.equal(IDS.repeat_interleave(2, 0))
    assert result.fork(0, seed=1).sequences.shape == (4, 13)


@pytest.mark.parametrize("call", [3, 4])
def test_beams_interrupted_while_they_change_places(call, monkeypatch):
    """A text's score is of that text, and no text is there twice."""
    model = random_model(tiny_config(), torch.float64)
    options = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": list(range(3, 40))}
    options |= {"output_scores": True, "return_dict": True}
    steps = call - 2  # the first call multiplies the prompts' rows
    asked = model.generate(IDS, 6, **options, logits_processor=None)
    interrupting(monkeypatch, KVCache, "select", call=call)
    with pytest.warns(UserWarning, match=f"Interrupted after {steps} of at most 6"):
        result = model.generate(IDS, 6, **options)
    assert len(result.scores) == steps < len(asked.scores)
    for number, new in enumerate(result.new_tokens):
        prompt = IDS[number // 3]
        logits = model(torch.cat([prompt, torch.tensor(new)])[None]).logits[0, 6:-1].float()
        total = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum()
        torch.testing.assert_close(result.sequences_scores[number], total / len(new))
    texts = [tuple(new) for new in result.new_tokens]
    assert len(set(texts[:3])) == len(set(texts[3:])) == 3
