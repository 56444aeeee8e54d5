"""Pieces of a stream are whole characters, and together what generate returns."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from twins import examples

import optlens
from optlens import Steer
from optlens.checks import InputError
from optlens.tokenizer import OPTTokenizer

DEMO = optlens.load()
TEXT = "When Mary and John went to the store, John gave a drink to"


def test_pieces_make_the_text():
    for options in ({}, {"seed": 4, "temperature": 2.0}, {"stop_strings": "."}):
        stream = DEMO.stream(TEXT, 15, **options)
        pieces = list(stream)
        assert len(pieces) > 1 and all(pieces)
        assert TEXT + "".join(pieces) == DEMO.generate(TEXT, 15, **options)
        assert stream.result.texts == [TEXT + "".join(pieces)] and not stream.result.partial
        assert list(stream) == []


def test_token_ids_stream_as_ids():
    model = random_model(tiny_config())
    ids = torch.tensor([5, 6, 7])
    written = model.generate(ids, 6).tolist()
    assert [5, 6, 7, *model.stream(ids, 6)] == written
    assert [5, 6, 7, *model.stream(input_ids=ids, max_new_tokens=6)] == written


def forcing(ids: list[int]):
    """Make the model write these tokens."""

    def processor(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        step = tokens.shape[1] - start
        return torch.full_like(logits, -50.0).index_fill(1, torch.tensor([ids[step]]), 50.0)

    start = DEMO.to_tokens("x").shape[1]
    return processor


@given(text=st.text("aé木😀 \u0301", min_size=1, max_size=8), cut=st.integers(0, 3))
@examples(40)
def test_characters_of_several_bytes_are_held_until_they_are_whole(text, cut):
    ids = DEMO.tokenizer.encode(text, prepend_bos=False)
    ids = ids[: max(1, len(ids) - cut)]  # may end, or lack, the rest of a character
    options = {"logits_processor": forcing(ids), "stop_at_eos": False}
    stream = DEMO.stream("x", len(ids), **options)
    pieces = list(stream)
    assert "x" + "".join(pieces) == DEMO.generate("x", len(ids), **options)
    assert "".join(pieces) == DEMO.tokenizer.decode(ids)
    whole = DEMO.tokenizer.decode(ids).rstrip("\ufffd")
    assert "".join(pieces).startswith(whole) and not any("\ufffd" in p for p in pieces[:-1])


def test_a_fork_within_a_character_writes_it_whole():
    ids = DEMO.tokenizer.encode("a木😀", prepend_bos=False)
    assert len(ids) > 4  # characters of several tokens
    options = {"logits_processor": forcing(ids), "stop_at_eos": False}
    result = DEMO.generate("x", len(ids), return_dict=True, **options)
    for step in range(len(ids)):
        assert result.fork(step).texts == result.texts == ["xa木😀"]


def test_special_tokens_are_not_shown():
    ids = [*DEMO.tokenizer.encode("a", False), 2, *DEMO.tokenizer.encode("b", False)]
    options = {"logits_processor": forcing(ids), "stop_at_eos": False}
    assert list(DEMO.stream("x", 3, **options)) == ["a", "b"]
    assert DEMO.generate("x", 3, **options) == "xab"


def test_a_stream_may_be_left_and_leaves_nothing_behind():
    model = random_model(tiny_config())
    grad = torch.is_grad_enabled()
    edit = Steer(layer=0, vector=torch.ones(32), scale=9.0)
    expected = model.generate(torch.tensor([5, 6, 7]), 6, stop_at_eos=False, interventions=edit)
    model.train()
    stream = model.stream(
        torch.tensor([5, 6, 7]), 6, stop_at_eos=False, interventions=edit, record="residual"
    )
    pieces = [next(stream), next(stream)]
    assert model.training and torch.is_grad_enabled() == grad
    assert not any(point.listening for point in model.hook_dict.values())
    partial = stream.result
    assert partial.partial and partial.sequences.tolist() == [[5, 6, 7, *pieces]]
    assert partial.recording.tokens.shape == (5,)
    assert [5, 6, 7, *pieces, *stream] == expected.tolist()  # looking does not disturb it
    assert stream.result.recording.tokens.shape == (9,)


def test_an_interrupt_reaches_the_caller_and_keeps_what_was_written():
    left = [KeyboardInterrupt]

    def stop(value: torch.Tensor, hook: object) -> None:
        if hook.now.step == 2 and left:
            raise left.pop()

    stream, pieces = DEMO.stream(TEXT, 8), []
    with DEMO.hooks([("hook_embed", stop)]), pytest.raises(KeyboardInterrupt):
        for piece in stream:
            pieces.append(piece)
    assert stream.result.partial and stream.result.texts == [TEXT + "".join(pieces)]
    assert TEXT + "".join(pieces) + "".join(stream) == DEMO.generate(TEXT, 8)


def test_what_cannot_be_streamed():
    for prompt, options in (
        ([TEXT, TEXT], {}),
        (TEXT, {"num_beams": 2}),
        (TEXT, {"num_return_sequences": 2}),
    ):
        with pytest.raises(InputError, match="stream writes one text: give one prompt, without"):
            DEMO.stream(prompt, **options)
    with pytest.raises(InputError, match="leave out return_dict"):
        DEMO.stream(TEXT, return_dict=False)
    with pytest.raises(InputError, match="no option 'streamer': iterate over"):
        DEMO.generate(TEXT, streamer=print)
    assert isinstance(DEMO.tokenizer, OPTTokenizer)
