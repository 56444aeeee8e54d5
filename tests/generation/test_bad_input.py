"""What generation refuses, before it runs, and how it says so; and what the user's own callables get wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config

import optlens
from optlens import OPTModel
from optlens.checks import InputError
from optlens.generation import GenerationOptions
from optlens.kv_cache import KVCache

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))

WRONG = [
    ({"max_new_tokens": 58}, r"has 7 tokens and max_new_tokens=58.*for 64 only: at most .*=57 fit"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, or None; got 0"),
    ({"temperature": 0}, "temperature must be a number above 0; greedy decoding is what"),
    ({"temperature": float("nan")}, "temperature must be a number above 0"),
    ({"top_k": 2.5}, "top_k must be a whole number"),
    ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
    ({"min_p": -0.1}, "min_p must be from 0 to 1"),
    ({"typical_p": 0}, "typical_p must be above 0"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0; got 0"),
    ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size must be a whole number of at least 1"),
    ({"num_beams": True}, "num_beams must be a whole number of at least 1; got True"),
    ({"seed": 1.0}, "seed must be a whole number of 64 bits"),
    ({"num_beams": 2, "early_stopping": "often"}, "True, False or 'never', got 'often'"),
    ({"num_beams": 2, "early_stopping": 1}, "True, False or 'never', got 1"),
    ({"do_sample": 0, "temperature": 2.0}, "do_sample must be True or False; got 0"),
    ({"stop_at_eos": None}, "stop_at_eos must be True or False; got None"),
    ({"output_scores": "all"}, "output_scores must be True or False; got 'all'"),
    ({"do_sample": False, "top_p": 0.5}, "top_p=0.5 is for sampling, but do_sample=False"),
    ({"length_penalty": 2.0}, "length_penalty is for beam search; give num_beams="),
    ({"early_stopping": False}, "early_stopping is for beam search"),
    (
        {"num_return_sequences": 2},
        "Greedy decoding has one answer.*add do_sample=True or num_beams=",
    ),
    (
        {"num_beams": 2, "num_return_sequences": 3},
        "num_return_sequences=3 is more than num_beams=2",
    ),
    ({"min_new_tokens": 3, "min_length": 9}, "Give min_new_tokens=3 or min_length=9"),
    ({"min_new_tokens": 30}, "min_new_tokens=30 is more than max_new_tokens=20"),
    ({"min_length": 50}, "asks for 43 new tokens, but only 20 may be written"),
    ({"min_length": 5, "stop_at_eos": False}, "min_length is about the end-of-text token, which"),
    ({"eos_token_id": 101}, "eos_token_id 101 is no token of this model, which has ids 0 to 100"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be token ids, got '</s>'"),
    ({"bad_words": [[101]]}, "bad_words has token id 101; this model has ids 0 to 100"),
    ({"bad_words": [[]]}, r"lists of token ids, got \[\] among them"),
    ({"bad_words": "dog"}, "has the text 'dog', but this model has no tokenizer"),
    ({"stop_strings": "."}, "stop_strings needs a tokenizer"),
    ({"stop_strings": [""]}, "texts that are not empty, got ''"),
    ({"logits_processor": 3}, r"must be f\(tokens, logits\) -> logits or several such, got 3"),
    ({"max_length": 20}, "no option 'max_length': max_new_tokens= counts the new tokens alone"),
    ({"temprature": 0.5}, "no option 'temprature': did you mean 'temperature'"),
    ({"inputs": IDS}, "no option 'inputs': the prompt comes first"),
    ({"input_ids": IDS}, "Give one prompt.*got both a prompt and input_ids"),
    ({"prompt": None}, "Give one prompt.*got none"),
    ({"nonsense": 0.5}, "no option 'nonsense': there are max_new_tokens, min_new_tokens"),
    ({"output_scores": True, "return_dict": False}, "output_scores is part of the result object"),
    ({"record": "residual", "num_beams": 2}, "cannot be recorded; record its result: model.record"),
    (
        {"record": {"layers": [0]}},
        "a dict of what, layers, heads, dtype, device in which what is given",
    ),
    ({"record": {"what": "z", "pos": 3}}, "record= takes what model.record takes as what="),
    ({"record": "residul"}, "did you mean|no hook of that name"),
    ({"attention_mask": torch.tensor([[1] * 7, [0] * 7])}, "Prompt 1 of the batch is all padding"),
    ({"attention_mask": torch.tensor([[1] * 7, [1] * 6 + [0]])}, "Prompt 1 ends in padding.*left"),
    ({"past_key_values": ()}, "is a builtins.tuple; this model continues from a KVCache only"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=lambda part: str(part)[:40])
def test_it_is_refused_before_anything_runs(options, message, monkeypatch):
    model = random_model(tiny_config())
    monkeypatch.setattr(model.decoder, "forward", lambda *args: pytest.fail("it ran"))
    with pytest.raises((InputError, KeyError), match=message):
        model.generate(**({"prompt": IDS} | options))


def test_prompts_that_are_none():
    model = random_model(tiny_config())
    for empty in (IDS[:0], IDS[:, :0]):
        with pytest.raises(InputError, match="The prompt is empty"):
            model.generate(empty)
    demo = optlens.load()
    with pytest.raises(InputError, match="list of prompts is empty"):
        demo.generate([])
    with pytest.raises(InputError, match="has no tokenizer, so it cannot read text"):
        model.generate("Hello")
    with pytest.raises(InputError, match="An OPTModel has no unembedding to write with"):
        OPTModel(tiny_config()).eval().generate(IDS)
    full = torch.randint(3, 101, (1, 64))
    with pytest.raises(InputError, match="for 64 only: there is no room for more"):
        model.generate(full)
    assert model.generate(IDS, None, stop_at_eos=False).shape == (2, 64)


def test_a_padded_past_needs_its_mask():
    model = random_model(tiny_config())
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    past = model(IDS[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
    with pytest.raises(InputError, match="holds padded prompts, so this call needs"):
        model.generate(IDS, past_key_values=past)


def test_logits_processors_act_and_are_checked():
    model = random_model(tiny_config())
    seen = []

    def only_seven(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tokens.shape))
        logits[:, 7] += 1000
        return logits

    result = model.generate(IDS, 3, logits_processor=only_seven, output_logits=True)
    assert (result.sequences[:, 7:] == 7).all() and seen == [(2, 7), (2, 8), (2, 9)]
    assert result.logits[0].max() < 500  # the callable got its own copy
    twice = [only_seven, lambda tokens, logits: logits.roll(1, -1)]
    assert (model.generate(IDS, 3, logits_processor=twice)[:, 7:] == 8).all()
    for wrong, message in (
        (lambda tokens, logits: None, "returned a NoneType; it must return logits"),
        (lambda tokens, logits: logits[:1], r"returned \[1, 101\]; it must return .*\[2, 101\]"),
        (lambda tokens, logits: logits * torch.nan, "At step 0 no token is left.*row 0"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(IDS, 3, logits_processor=wrong)
    everything = [[token] for token in range(101)]
    with pytest.raises(InputError, match="no token is left to choose.*Loosen one"):
        model.generate(IDS, 3, bad_words=everything, num_beams=2)


def test_words_to_avoid_as_text():
    demo = optlens.load()
    text = "When Mary and John went to the store, John gave a drink to"
    assert demo.generate(text, 4)[len(text) :].startswith(" Mary")
    assert "Mary" not in demo.generate(text, 4, bad_words="Mary")[len(text) :]
    for words in ([" Mary"], [demo.tokenizer.encode(" Mary", prepend_bos=False)]):
        assert " Mary" not in demo.generate(text, 4, bad_words=words)[len(text) :]


def test_arrays_and_their_numbers_are_taken():
    model = random_model(tiny_config())
    options = GenerationOptions.of(max_new_tokens=np.int64(3), top_k=np.int32(4), seed=np.int64(5))
    assert (options.max_new_tokens, options.top_k, type(options.seed)) == (3, 4, int)
    words = [[5, 6], [7]]
    for given in (words, torch.tensor([[5, 6]]), [torch.tensor([5, 6])], [np.array([5, 6]), [7]]):
        expected = tuple(words[: len(given)])
        assert tuple(map(list, GenerationOptions.of(bad_words=given).bad_words)) == expected
    expected = model.generate(IDS, 3, top_k=4, seed=5)
    assert model.generate(IDS, np.int64(3), top_k=np.int32(4), seed=np.int64(5)).equal(expected)


def test_forks_of_texts_that_are_not_there():
    model = random_model(tiny_config())
    result = model.generate(IDS, 5, num_beams=2, length_penalty=2.0, return_dict=True)
    for text in (2, -3, "a", True):
        with pytest.raises(InputError, match=f"There is no text {text!r}: they go from 0 to 1"):
            result.fork(2, text=text)
    assert result.fork(2, text=-1).prompt_length == 9
    assert result.fork(2, num_beams=1).options.length_penalty is None  # which was of the beams


def test_options_are_values():
    assert GenerationOptions.of(stop_strings="a") == GenerationOptions.of(stop_strings=["a"])
    assert not GenerationOptions.of().samples and not GenerationOptions.of(num_beams=3).samples
    for sampling in (
        {"seed": 0},
        {"top_k": 3},
        {"do_sample": True},
        {"num_beams": 2, "top_p": 0.4},
    ):
        assert GenerationOptions.of(**sampling).samples


# --- the cache ----------------------------------------------------------------------------------------------------------


def numbered(n: int, batch: int = 2) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32).view(1, 1, n, 1).expand(batch, 3, n, 4).clone()


def test_a_cache_with_room_writes_in_place():
    cache = KVCache(room=6)
    cache.update(0, numbered(3), -numbered(3))
    memory = cache[0][0].data_ptr()
    key, value = cache.update(0, numbered(2), -numbered(2))
    assert key.data_ptr() == memory and key[0, 0, :, 0].tolist() == [0, 1, 2, 0, 1]
    assert value.equal(-key) and cache.get_seq_length() == 5
    cache.shorten({0: 4})
    assert cache.update(0, numbered(1) + 9, numbered(1))[0][0, 0, :, 0].tolist() == [0, 1, 2, 0, 9]
    grown, _ = cache.update(0, numbered(2), numbered(2))  # beyond its room
    assert grown.shape[2] == 7 and grown.data_ptr() != memory


def test_what_a_cache_was_given_is_never_written_into():
    """Without room of its own it grows by copying, also after a failure shortened it."""
    cache, given = KVCache(), numbered(5)
    cache.update(0, given, given)
    cache.room = 9
    cache.shorten({0: 3})
    cache.update(0, numbered(2) + 50, numbered(2))
    assert given.equal(numbered(5)) and cache[0][0][0, 0, :, 0].tolist() == [0, 1, 2, 50, 51]


def test_rows_of_a_cache_are_chosen_and_copied():
    cache = KVCache(room=5)
    rows = torch.arange(2.0).view(2, 1, 1, 1) * 10
    cache.update(0, numbered(4) + rows, numbered(4) + rows)
    copy = cache.copy(3)
    cache.select(torch.tensor([1, 1]), start=2)  # the first two tokens are known to be alike
    assert cache[0][0][:, 0, :, 0].tolist() == [[0, 1, 12, 13], [10, 11, 12, 13]]
    assert copy[0][0][:, 0, :, 0].tolist() == [[0, 1, 2], [10, 11, 12]]
    cache.select(torch.tensor([1, 0, 1]))
    assert cache[0][1][:, 0, 0, 0].tolist() == [10, 0, 10] and cache.get_seq_length() == 4
    cache.update(0, numbered(1, 3), numbered(1, 3))
    assert cache[0][0].shape == (3, 3, 5, 4)


def test_gradients_flow_through_a_cache_with_room():
    model = random_model(tiny_config())
    cache = KVCache(room=20)
    first = model(IDS[:, :4], past_key_values=cache)
    model(IDS[:, 4:], past_key_values=first.past_key_values).logits.sum().backward()
    with_room = model.decoder.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(IDS).logits[:, 4:].sum().backward()
    expected = model.decoder.layers[0].self_attn.k_proj.weight.grad
    torch.testing.assert_close(with_room, expected, rtol=1e-4, atol=1e-4)
