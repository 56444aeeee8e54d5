"""Prompt sets: pairs that line up, right answers, seeds, their own errors; for the demo's and OPT's tokenizers."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import random_model, tiny_config
from tiny_tokenizer import TRUE_FILES, needs_true_files, tiny_backend

import optlens
from optlens import checks, metrics, prompt_words, prompts
from optlens.prompt_set import PromptPair, PromptSet
from optlens.tokenizer import OPTTokenizer

GENERATORS = {
    "ioi": prompts.ioi,
    "induction": prompts.induction,
    "greater_than": prompts.greater_than,
    "facts": prompts.facts,
    "agreement": prompts.agreement,
    "gender": prompts.gender,
}


@pytest.fixture(scope="module")
def demo():
    return optlens.load()


@pytest.fixture(scope="module")
def true_opt():
    """A tiny model with OPT's own tokenizer: generators ask a model only for that."""
    model = random_model(tiny_config(vocab_size=50272, num_hidden_layers=1))
    model.tokenizer = OPTTokenizer.from_files(TRUE_FILES / "vocab.json", TRUE_FILES / "merges.txt")
    return model


@pytest.fixture(scope="module")
def poor():
    """A model whose tokenizer has hardly any word."""
    model = random_model(tiny_config(vocab_size=300))
    model.tokenizer = OPTTokenizer.from_tokenizers(tiny_backend(), bos_token="</s>")
    return model


@pytest.fixture(params=["demo", pytest.param("true_opt", marks=needs_true_files)])
def model(request):
    return request.getfixturevalue(request.param)


def words_at(model, texts: list[str], positions: list[int]) -> list[str]:
    """Return the token at one position of each text, found by tokenising it alone."""
    return [model.to_str_tokens(text)[pos] for text, pos in zip(texts, positions, strict=True)]


# ------------------------------------------------------------------------- every generator


@pytest.mark.parametrize("name", GENERATORS)
def test_pairs_line_up(model, name):
    made = GENERATORS[name](model, 24, seed=3)
    assert len(made) == 24 and len(set(made.clean)) == 24
    for number, (clean, corrupt) in enumerate(zip(made.clean, made.corrupt, strict=True)):
        ids, other = model.to_tokens(clean)[0].tolist(), model.to_tokens(corrupt)[0].tolist()
        assert len(ids) == len(other) == made.lengths[number]
        assert ids != other
        assert ids == made.clean_ids[number] and other == made.corrupt_ids[number]
        assert made.spans["end"][number] == len(ids) - 1
        # nothing but the named words differs
        differing = [
            at for at, pair in enumerate(zip(ids, other, strict=True)) if pair[0] != pair[1]
        ]
        named = {at[number] for at in made.spans.values()}
        widest = 2 if name == "agreement" else 1
        assert all(any(0 <= at - pos < widest for at in named) for pos in differing)
    for answer, wrong in zip(made.answers, made.wrong, strict=True):
        assert model.to_single_token(answer) != model.to_single_token(wrong)


@pytest.mark.parametrize("name", GENERATORS)
def test_seeds(demo, name):
    make = GENERATORS[name]
    assert make(demo, 6, seed=1) == make(demo, 6, seed=1)
    assert make(demo, 6, seed=1).clean != make(demo, 6, seed=2).clean
    # a larger set begins with the smaller one
    assert make(demo, 9, seed=1)[:6] == make(demo, 6, seed=1)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_demo_model_answers(demo, name):
    """A clean prompt is answered, and the corrupt one takes the answer away."""
    made = GENERATORS[name](demo, 20, seed=5)
    clean = made.metric().of(demo, made.tokens, made.mask)
    corrupt = made.metric().of(demo, made.corrupt_tokens, made.mask)
    assert (clean > 0).float().mean() >= 0.8
    assert clean.mean() - corrupt.mean() > 1


@pytest.mark.parametrize("name", GENERATORS)
def test_how_many(demo, name):
    for n in (0, -1, 2.0, True):
        with pytest.raises(checks.InputError, match="at least 1 prompt"):
            GENERATORS[name](demo, n)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_tokenizer_without_the_words(poor, name):
    with pytest.raises(checks.InputError, match="token"):
        GENERATORS[name](poor, 2)
    with pytest.raises(checks.InputError, match="no tokenizer"):
        GENERATORS[name](random_model(tiny_config()), 2)


# ------------------------------------------------------------------------------------ ioi


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_ioi_order(model, order):
    made = prompts.ioi(model, 12, order=order)
    at = {name: words_at(model, made.clean, made.spans[name]) for name in ("IO", "S1", "S2")}
    assert at["S1"] == at["S2"] == made.wrong
    assert at["IO"] == made.answers
    for io, s1, s2 in zip(*(made.spans[name] for name in ("IO", "S1", "S2")), strict=True):
        assert (io < s1 < s2) if order == "ABBA" else (s1 < io < s2)
    assert made.spans["S1+1"] == [at + 1 for at in made.spans["S1"]]
    assert set(made.kinds) == {order}


def test_ioi_mixes_both_orders_equally(demo):
    made = prompts.ioi(demo, 8)
    assert made.kinds == ["ABBA", "BABA"] * 4
    assert made.of_kind("BABA") == made[1::2]


@pytest.mark.parametrize("corruption", ["flip", "abc", "third", "random", "swap", "io"])
def test_ioi_corruptions(model, corruption):
    made = prompts.ioi(model, 12, corruption=corruption)
    for number, pair in enumerate(made):
        io, s = pair.answer, pair.wrong
        new_io, new_s1, new_s2 = (
            words_at(model, [made.corrupt[number]], [pair.spans[name]])[0]
            for name in ("IO", "S1", "S2")
        )
        if corruption == "flip":
            assert (new_io, new_s1, new_s2) == (io, s, io)
        elif corruption == "abc":
            assert len({io, s, new_io, new_s1, new_s2}) == 5
        elif corruption == "third":
            assert (new_io, new_s1) == (io, s) and new_s2 not in (io, s)
        elif corruption == "random":
            assert new_s1 == new_s2 and len({io, s, new_io, new_s1}) == 4
        elif corruption == "io":
            old_s = words_at(model, [pair.clean], [pair.spans["S1"]])[0]
            assert (new_s1, new_s2) == (old_s, old_s)
            assert new_io == s and len({io, s, old_s}) == 3
        else:
            assert (new_io, new_s1, new_s2) == (s, io, s)


def test_ioi_with_own_frames_and_names(demo):
    frame = "Then {A} and {B} had a long argument, and {S} said to"
    made = prompts.ioi(demo, 6, frames=frame, names=["Mary", "John", "Tom", "Anna", "Paul"])
    assert len(set(made.lengths)) == 1 and made.mask is None
    assert all(text.startswith("Then ") for text in made.clean)
    with pytest.raises(checks.InputError, match=r"At least 5 names.*has 2.*'Xyzzyq'.*cut into"):
        prompts.ioi(demo, 2, names=["Mary", "John", "Xyzzyq", "Mary"])
    with pytest.raises(checks.InputError, match="found only"):
        prompts.ioi(demo, 1000, frames=frame, names=["Mary", "John", "Tom", "Anna", "Paul"])


def test_names_are_one_token_wherever_they_stand(model):
    """At the beginning of a sentence a name has no space, and may be cut into several tokens."""
    made = prompts.ioi(model, 10, frames="{A} and {B} met. {S} gave a {object} to")
    for pair, ids in zip(made, made.clean_ids, strict=True):
        first, second = sorted((pair.spans["IO"], pair.spans["S1"]))
        assert (first, second) == (1, 3) and len(ids) == len(model.to_tokens(pair.clean)[0])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ("{A} and {B} met", r"must have \{A\}, \{B\}, \{S\} once each"),
        ("{A} and {B} met {S} in {town}", r"may have \{place\}, \{object\}"),
        ("{A} and {B} met; {S} and {A}", "once each"),
        ("{A} and {B} met; {S} saw ", "ends with a blank"),
    ],
)
def test_frames_that_do_not_fit(demo, frame, message):
    with pytest.raises(checks.InputError, match=message):
        prompts.ioi(demo, 2, frames=[frame])


def test_unknown_choices_name_the_known_ones(demo):
    with pytest.raises(checks.InputError, match="'mixed', 'ABBA', 'BABA'; got 'AABB'"):
        prompts.ioi(demo, 2, order="AABB")
    with pytest.raises(checks.InputError, match="'flip'.*'swap'"):
        prompts.ioi(demo, 2, corruption="noise")
    with pytest.raises(checks.InputError, match="'capital'.*got 'colour'"):
        prompts.facts(demo, 2, relation="colour")
    with pytest.raises(checks.InputError, match="'opposite', 'same'"):
        prompts.agreement(demo, 2, distractor="none")


# ------------------------------------------------------------------------- the other tasks


@pytest.mark.parametrize("corruption", ["answer", "prefix"])
def test_induction(model, corruption):
    made = prompts.induction(model, 8, length=7, corruption=corruption)
    for number, pair in enumerate(made):
        bos, *ids = made.clean_ids[number]
        assert bos == 2 and len(ids) == 13 and len(set(ids)) == 7
        assert ids[7:] == ids[:6]
        assert model.to_single_token(pair.answer) == ids[6]
        assert pair.spans == {"A1": 6, "B1": 7, "A2": 13, "end": 13}
        other = made.corrupt_ids[number]
        if corruption == "answer":
            assert other[7] == model.to_single_token(pair.wrong)
        else:
            assert other[6] not in ids and model.to_single_token(pair.wrong) in ids[:5]
    with pytest.raises(checks.InputError, match="at least 3"):
        prompts.induction(model, 2, length=2)


def test_greater_than(model):
    made = prompts.greater_than(model, 16)
    for number, pair in enumerate(made):
        right, wrong = pair.acceptable
        tokens = model.to_str_tokens(pair.clean)
        century, year = tokens[pair.spans["XX1"]], tokens[pair.spans["YY"]]
        assert tokens[-1] == century == f" {pair.kind}"
        assert all(y > year for y in right) and all(y <= year for y in wrong)
        assert len(right) + len(wrong) == 100 and pair.answer in right and pair.wrong in wrong
        assert model.to_str_tokens(made.corrupt[number])[pair.spans["YY"]] == "01"


@needs_true_files
def test_years_that_are_one_token_are_not_used(true_opt):
    """In OPT's vocabulary " 1990" is one token, and so are most years after 1900."""
    assert len(true_opt.tokenizer.encode(" 1990", False)) == 1
    assert "19" not in prompts.greater_than(true_opt, 60).kinds


def test_facts(model):
    made = prompts.facts(model, 60)
    assert set(made.kinds) == set(prompt_words.FACTS)
    for pair in made:
        known = prompt_words.FACTS[pair.kind][0]
        subject = words_at(model, [pair.clean], [pair.spans["subject"]])[0].strip()
        other = words_at(model, [pair.corrupt], [pair.spans["subject"]])[0].strip()
        assert pair.answer == f" {known[subject]}" != pair.wrong == f" {known[other]}"


def test_facts_of_ones_own(demo):
    table = {"France": "Paris", "Italy": "Rome", "Flubberland": "Paris"}
    made = prompts.facts(demo, 2, table=table, frames=["The train to {subject} stops in"])
    assert sorted(made.answers) == [" Paris", " Rome"] and made.kinds == ["table"] * 2
    with pytest.raises(checks.InputError, match="found only 2"):
        prompts.facts(demo, 3, table=table, frames=["The train to {subject} stops in"])
    with pytest.raises(checks.InputError, match="only 1 have"):
        prompts.facts(demo, 1, table={"France": "Paris", "Xyzzyq": "Rome"}, frames="{subject}:")
    with pytest.raises(checks.InputError, match=r"at least one sentence with \{subject\}"):
        prompts.facts(demo, 1, table=table)


@pytest.mark.parametrize("distractor", ["opposite", "same"])
def test_agreement(model, distractor):
    made = prompts.agreement(model, 30, distractor=distractor)
    singular = {pair[0] for pair in prompt_words.VERBS}
    plurals = {
        form for pool in (prompt_words.BEINGS, prompt_words.THINGS) for form in pool.values()
    }
    for number, pair in enumerate(made):
        several = pair.kind == "plural"
        assert several == number % 2
        assert (pair.answer.strip() in singular) != several
        assert (pair.wrong.strip() in singular) == several
        assert (pair.clean.split()[1] in plurals) == several != (pair.corrupt.split()[1] in plurals)
        assert (pair.clean.split()[-1] in plurals) == (several == (distractor == "same"))


def test_a_plural_of_two_tokens_is_matched_by_an_adjective(demo):
    """The demo's tokenizer cuts " dogs" into " dog", "s"."""
    cut = {
        noun: len(demo.tokenizer.encode(f" {plural}", False))
        for noun, plural in (prompt_words.BEINGS | prompt_words.THINGS).items()
    }
    described = []
    for pair in prompts.agreement(demo, 30).of_kind("singular"):
        noun = pair.clean.split(" ")[1]
        described.append(noun in prompt_words.ADJECTIVES)
        assert described[-1] == (noun not in cut or cut[noun] == 2)
    # a vocabulary with enough plurals of one token needs none of them
    assert any(described) or sum(length == 1 for length in cut.values()) >= 10


def test_gender(model):
    made = prompts.gender(model, 20)
    for number, pair in enumerate(made):
        she = number % 2 == 0
        name = words_at(model, [pair.clean], [pair.spans["name"]])[0].strip()
        other = words_at(model, [pair.corrupt], [pair.spans["name"]])[0].strip()
        assert name in (prompt_words.GIRLS if she else prompt_words.BOYS)
        assert other in (prompt_words.BOYS if she else prompt_words.GIRLS)
        assert (pair.answer, pair.wrong, pair.kind) == (
            (" she", " he", "she") if she else (" he", " she", "he")
        )


def test_the_words_are_sound():
    assert not set(prompt_words.GIRLS) & set(prompt_words.BOYS)
    for pool in (prompt_words.GIRLS, prompt_words.BOYS, prompt_words.PLACES, prompt_words.OBJECTS):
        assert len(pool) == len(set(pool))
    assert not [word for word in prompt_words.OBJECTS if word[0] in "aeiou"]  # "a {object}"
    nouns = prompt_words.BEINGS | prompt_words.THINGS  # their plurals only take an s
    assert not [
        noun for noun in nouns if re.search("(s|x|z|ch|sh|[^aeiou]y|[^o]f|fe|[^o]o)$", noun)
    ]


# ------------------------------------------------------------------------- the set as data


def test_tokens_are_padded_on_the_left(demo):
    made = prompts.ioi(demo, 12)
    tokens, mask = demo.to_tokens_and_mask(made.clean)
    assert min(made.lengths) < max(made.lengths)
    assert torch.equal(made.tokens, tokens) and torch.equal(made.mask, mask)
    other, other_mask = demo.to_tokens_and_mask(made.corrupt)
    assert torch.equal(made.corrupt_tokens, other) and torch.equal(made.mask, other_mask)
    columns = made.columns("S2")
    found = demo.tokenizer.to_str_tokens(tokens[torch.arange(12), columns])
    assert found == made.wrong
    with pytest.raises(checks.InputError, match="No span 'S3'; there are IO, S1"):
        made.columns("S3")


def test_indexing(demo):
    made = prompts.ioi(demo, 6)
    pair = made[2]
    assert isinstance(pair, PromptPair) and pair == made[-4] == list(made)[2]
    assert (pair.clean, pair.answer) == (made.clean[2], made.answers[2])
    assert pair.spans["S2"] == made.spans["S2"][2]
    assert isinstance(made[1:3], PromptSet) and made[1:3].clean == made.clean[1:3]
    assert made[[4, -1]].clean == [made.clean[4], made.clean[5]]
    wanted = torch.tensor([True, False, False, True, False, False])
    assert made[wanted] == made[wanted.tolist()] == made[[0, 3]] == made[torch.tensor([0, 3])]
    assert made[:2].tokens.shape == (2, max(made.lengths[:2]))
    with pytest.raises(IndexError):
        made[6]
    with pytest.raises(IndexError, match="2 truth values for 6"):
        made[[True, False]]
    with pytest.raises(checks.InputError, match="No prompt is left"):
        made[6:]
    with pytest.raises(checks.InputError, match="there are 'ABBA', 'BABA'"):
        made.of_kind("AB")


def test_metric(demo):
    made = prompts.ioi(demo, 4)
    assert made.metric() == metrics.logit_diff(
        [[answer] for answer in made.answers], [[wrong] for wrong in made.wrong]
    )
    together = made.metric().of(demo, made.clean)
    alone = torch.cat([pair.metric().of(demo, pair.clean) for pair in made])
    # float32, padded and alone
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    years = prompts.greater_than(demo, 2)
    bound = years.metric().bind(demo, years.tokens, years.mask)
    assert bound.token_ids.shape[1] >= 100


def test_repr(demo):
    made = prompts.ioi(demo, 5, seed=7)
    lines = repr(made).splitlines()
    assert lines[0].startswith("PromptSet(ioi, 5 pairs of ")
    assert "order='mixed', corruption='flip', seed=7" in lines[0]
    assert made.clean[0] in lines[2] and made.answers[0] in lines[2]
    assert lines[-1] == "  ... and 3 more"


def test_prompts_of_ones_own(demo):
    texts = ["When Mary and John met, John gave a book to"]
    flipped = ["When Mary and John met, Mary gave a book to"]
    made = PromptSet.from_texts(demo, texts, flipped, [" Mary"], [" John"], spans={"S2": [7]})
    assert made.spans["end"] == [made.lengths[0] - 1] and made.kinds == ["custom"]
    with pytest.raises(checks.InputError, match=r"prompt 0 differ in token length \(\d+ and \d+\)"):
        PromptSet.from_texts(demo, texts, ["Nothing"], [" Mary"], [" John"])
    with pytest.raises(checks.InputError, match="clean   </s> .*\n.*corrupt </s> "):
        PromptSet.from_texts(demo, texts, ["Nothing"], [" Mary"], [" John"])
    with pytest.raises(checks.InputError, match="is . tokens, expected one"):
        PromptSet.from_texts(demo, texts, flipped, [" Mary Ann"], [" John"])
    with pytest.raises(checks.InputError, match="wrong and clean must be lists of equal length"):
        PromptSet.from_texts(demo, texts, flipped, [" Mary"], [" John", " Tom"])
    with pytest.raises(checks.InputError, match="lists of equal length"):
        PromptSet.from_texts(demo, texts[0], flipped[0], " Mary", " John")
    with pytest.raises(checks.InputError, match=r"spans\['S2'\] says position 99"):
        PromptSet.from_texts(demo, texts, flipped, [" Mary"], [" John"], spans={"S2": [99]})
    with pytest.raises(checks.InputError, match="at least one pair"):
        PromptSet.from_texts(demo, [], [], [], [])
