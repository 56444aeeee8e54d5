"""Greedy and beam outputs are transformers', token by token; so is what each option does to logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_model, tiny_config
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation import logits_process as theirs
from twins import assert_near, twin_of

import optlens
from optlens import demo
from optlens.generation import warpers

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
PADDED = IDS.masked_fill(LEFT == 0, 1)


def of_transformers(twin: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    twin.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=1, bos_token_id=2)
    kind = {"do_sample": False, "num_beams": 1} | options
    out = twin.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **kind
    )
    return out


GREEDY = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 9},
    "length": {"min_length": 12},
    "eos": {"eos_token_id": list(range(20, 32))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY)
def test_greedy_texts(variant, options, dtype):
    model = random_model(tiny_config(**variant), dtype)
    twin = twin_of(model)
    for ids, mask in ((IDS, torch.ones_like(IDS)), (PADDED, LEFT)):
        if "min_length" in options and (mask == 0).any():
            continue  # transformers counts padding as length
        expected = of_transformers(twin, ids, mask, max_new_tokens=20, **options)
        ours = model.generate(ids, 20, attention_mask=mask, output_scores=True, **options)
        assert ours.sequences.equal(expected.sequences)
        assert len(ours.scores) == len(expected.scores)


def test_scores_are_theirs():
    model = random_model(tiny_config(), torch.float64)
    expected = of_transformers(
        twin_of(model), IDS, torch.ones_like(IDS), max_new_tokens=9, repetition_penalty=1.5
    )
    ours = model.generate(IDS, 9, repetition_penalty=1.5, output_scores=True, output_logits=True)
    assert len(ours.scores) == len(ours.logits) == 9
    for mine, other in zip(ours.scores, expected.scores, strict=True):
        assert_near(mine, other, 1e-6)
    whole = model(ours.sequences[:, :-1]).logits[:, 6:].float()
    assert_near(torch.stack(ours.logits, 1), whole, 1e-6)


def test_bad_words():
    model = random_model(tiny_config())
    plain = model.generate(IDS, 12)
    words = [[int(plain[0, 8])], [int(plain[1, 9]), int(plain[1, 10])]]
    expected = of_transformers(
        twin_of(model), IDS, torch.ones_like(IDS), max_new_tokens=12, bad_words_ids=words
    )
    ours = model.generate(IDS, 12, bad_words=words)
    assert ours.equal(expected.sequences) and not ours.equal(plain)


BEAMS = {
    "plain": {},
    "longer": {"length_penalty": 2.5},
    "shorter": {"length_penalty": -1.0},
    "early": {"early_stopping": True},
    "never": {"early_stopping": "never", "length_penalty": 0.5},
    "several": {"num_return_sequences": 3},
    "restrained": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
}


@pytest.mark.parametrize("eos", [[2], list(range(40, 60))], ids=["one end", "many ends"])
@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
def test_beam_search_texts(variant, options, eos):
    """Some texts end early when there are many ways to end."""
    options = {"num_beams": 4, "eos_token_id": eos} | options
    for dtype in (torch.float64, torch.float32):
        model = random_model(tiny_config(**variant), dtype, seed=1)
        twin = twin_of(model)
        for ids, mask in ((IDS, torch.ones_like(IDS)), (PADDED, LEFT)):
            expected = of_transformers(twin, ids, mask, max_new_tokens=10, **options)
            ours = model.generate(ids, 10, attention_mask=mask, return_dict=True, **options)
            assert ours.sequences.equal(expected.sequences)
            assert_near(ours.sequences_scores, expected.sequences_scores, 1e-5)
            n_new = (expected.beam_indices >= 0).sum(-1)
            assert ours.mask[:, 7:].sum(-1).tolist() == n_new.tolist()


def test_when_a_search_stops():
    """Sooner or later, as `early_stopping` says, though the texts are often the same."""
    ids, eos = IDS[:1], list(range(40, 100))
    steps: dict[object, int] = {False: 0, "never": 0, True: 0}
    for seed in range(4):
        model = random_model(tiny_config(), torch.float64, seed)
        twin = twin_of(model)
        for early in steps:
            options = {"num_beams": 3, "early_stopping": early, "eos_token_id": eos}
            expected = of_transformers(
                twin, ids, torch.ones_like(ids), max_new_tokens=12, **options
            )
            ours = model.generate(ids, 12, output_scores=True, **options)
            assert ours.sequences.equal(expected.sequences)
            assert len(ours.scores) == len(expected.scores)
            steps[early] += len(ours.scores)
    assert steps[True] < steps[False] < steps["never"]


def test_the_demo_checkpoint_writes_the_same():
    model = optlens.load()
    twin = twin_of(model)
    tokenizer = AutoTokenizer.from_pretrained(demo.path(), padding_side="left")
    texts = ["When Mary and John went to the store, John gave a drink to", "Once upon a time"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = of_transformers(
            twin, batch.input_ids, batch.attention_mask, max_new_tokens=24, **options
        )
        ours = model.generate(texts, 24, return_dict=True, **options)
        assert ours.sequences.equal(expected.sequences)
        assert ours.texts == tokenizer.batch_decode(expected.sequences, skip_special_tokens=True)


def test_stop_strings_end_texts_where_theirs_do():
    model = optlens.load()
    twin = twin_of(model)
    tokenizer = AutoTokenizer.from_pretrained(demo.path(), padding_side="left")
    text = "When Mary and John went to the store, John gave a drink to"
    plain = model.generate(text, 12)[len(text) :]
    for stop in (plain[3:9], plain[:2], plain[-4:], "nowhere"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = of_transformers(
            twin,
            ids,
            torch.ones_like(ids),
            max_new_tokens=12,
            stop_strings=[stop],
            tokenizer=tokenizer,
        )
        assert model.generate(ids, 12, stop_strings=stop).equal(expected.sequences)


# --- what narrows a sample ----------------------------------------------------------------------------------------------

WARPERS = {
    "top_k 5": (theirs.TopKLogitsWarper(5), lambda x: warpers.keep_top_k(x, 5)),
    "top_k all": (theirs.TopKLogitsWarper(500), lambda x: warpers.keep_top_k(x, 500)),
    "top_p 0.9": (theirs.TopPLogitsWarper(0.9), lambda x: warpers.keep_top_p(x, 0.9)),
    "top_p 0.1": (theirs.TopPLogitsWarper(0.1), lambda x: warpers.keep_top_p(x, 0.1)),
    "top_p two": (
        theirs.TopPLogitsWarper(0.1, min_tokens_to_keep=2),
        lambda x: warpers.keep_top_p(x, 0.1, 2),
    ),
    "min_p": (theirs.MinPLogitsWarper(0.2), lambda x: warpers.keep_min_p(x, 0.2)),
    "min_p best": (theirs.MinPLogitsWarper(1.0), lambda x: warpers.keep_min_p(x, 1.0)),
    "min_p three": (
        theirs.MinPLogitsWarper(1.0, min_tokens_to_keep=3),
        lambda x: warpers.keep_min_p(x, 1.0, 3),
    ),
    "typical 0.9": (theirs.TypicalLogitsWarper(0.9), lambda x: warpers.keep_typical(x, 0.9)),
    "typical 0.2": (
        theirs.TypicalLogitsWarper(0.2, min_tokens_to_keep=2),
        lambda x: warpers.keep_typical(x, 0.2, 2),
    ),
    "repetition": (
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
        lambda x: warpers.penalize_repetition(x, IDS, torch.ones_like(IDS).bool(), 1.4),
    ),
    "reward": (
        theirs.RepetitionPenaltyLogitsProcessor(0.5),
        lambda x: warpers.penalize_repetition(x, IDS, torch.ones_like(IDS).bool(), 0.5),
    ),
}


@pytest.mark.parametrize("kind", ["random", "sharp", "flat", "tied", "holed"])
@pytest.mark.parametrize("name", WARPERS)
def test_each_mode_keeps_their_tokens(name, kind):
    """The same tokens, and probabilities to 1e-6."""
    logits = torch.randn(2, 101, generator=torch.manual_seed(7))
    logits = {
        "random": 3 * logits,
        "sharp": 30 * logits,
        "flat": 1e-3 * logits,
        "tied": (2 * logits).round(),
        "holed": logits.masked_fill(logits < 0.3, -torch.inf),
    }[kind]
    other, ours = WARPERS[name]
    expected, got = other(IDS, logits.clone()), ours(logits.clone())
    assert got.isfinite().equal(expected.isfinite())
    torch.testing.assert_close(got.softmax(-1), expected.softmax(-1), rtol=0, atol=1e-6)


def test_padding_is_no_part_of_a_run_of_tokens():
    tokens = torch.tensor([[1, 1, 7, 8, 1, 1]])
    real = torch.tensor([[False, False, True, True, True, True]])
    logits = torch.zeros(1, 9)
    # among real tokens 1 was followed by 1; the padding's 1 was followed by 7, which says nothing
    banned = warpers.forbid_repeated_ngrams(logits, tokens, real, 2)[0] == -torch.inf
    assert banned.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_k": 9, "temperature": 1.7},
        {"top_p": 0.8, "top_k": 30},
        {"min_p": 0.1, "repetition_penalty": 1.3},
        {"typical_p": 0.7, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_samples_are_drawn_from_their_distribution(options):
    """Steps of a sample, each compared with transformers' whole chain on the same logits."""
    model = random_model(tiny_config())
    ours = model.generate(IDS, 8, do_sample=True, output_scores=True, output_logits=True, **options)
    twin = twin_of(model)
    config = GenerationConfig(do_sample=True, **({"top_k": 0} | options))
    config._eos_token_tensor = None
    for step, (logits, scores) in enumerate(zip(ours.logits, ours.scores, strict=True)):
        if any(n != len(ours.new_tokens[0]) for n in map(len, ours.new_tokens)):
            break
        chain = twin._get_logits_processor(config, input_ids_seq_length=7, device="cpu")
        expected = chain(ours.sequences[:, : 7 + step], logits.clone())
        assert scores.isfinite().equal(expected.isfinite())
        torch.testing.assert_close(scores.softmax(-1), expected.softmax(-1), rtol=0, atol=1e-6)
        chosen = ours.sequences[:, 7 + step : 8 + step]
        assert scores.gather(1, chosen).isfinite().all()
