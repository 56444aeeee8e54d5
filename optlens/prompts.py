"""Seeded sets of prompt pairs for the tasks that circuits are studied on.

| generator | task | clean and corrupt differ in |
|---|---|---|
| `ioi` | indirect object: "When A and B went to the store, B gave a drink to" -> A | names |
| `induction` | a block of random words, repeated: what followed this word before? | one word |
| `greater_than` | "The war lasted from the year 1732 to the year 17" -> 33 to 99 | the year, 01 |
| `facts` | "The capital of France is" -> Paris | the subject |
| `agreement` | "The dogs near the lamp" -> are | the number of the subject |
| `gender` | "Mary thinks that" -> she | the name |

Words are chosen among those that are single tokens for the model's tokenizer, and every pair has equal
token length with the differing words at equal positions. Equal arguments give equal sets. Prompts
made with different frames differ in length; pass one frame (`frames=[...]`) for sets in which a
position means the same everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from optlens import checks
from optlens import prompt_words as words
from optlens.prompt_drafts import (
    Draft,
    build,
    check_choice,
    checked_frames,
    is_single,
    numbered_nouns,
    random_words,
    single_words,
    two_digit_years,
)
from optlens.prompt_set import PromptPair, PromptSet, tokenizer_of

if TYPE_CHECKING:
    from optlens.base import OPTBase

__all__ = [
    "PromptPair",
    "PromptSet",
    "agreement",
    "facts",
    "gender",
    "greater_than",
    "induction",
    "ioi",
]


def ioi(
    model: OPTBase,
    n: int,
    seed: int = 0,
    order: str = "mixed",
    corruption: str = "flip",
    *,
    frames: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> PromptSet:
    """Make prompts for indirect object identification (Wang et al. 2022).

    Two people are named, one of them (S) does something for the other (IO), who is the answer.

    Args:
        model: For its tokenizer.
        n: How many pairs.
        seed: Equal seeds give equal sets.
        order: "ABBA" (IO is named first), "BABA" (S is), or "mixed" (in turn).
        corruption: What the corrupt prompt changes:
            "flip": the second S becomes IO, so that the answer becomes S;
            "abc": all three names become fresh ones, different from each other: no answer;
            "third": the second S becomes a third person: no answer;
            "random": S and IO become two fresh names in the same places;
            "swap": IO and the first S change places: the answer stays;
            "io": IO becomes a third person, who is then the answer, and the wrong one here.
        frames: Sentences with the fields {A}, {B} (first and second name) and {S}, and if wanted
            {place} and {object}; those of `optlens.prompt_words` unless given.
        names: First names to draw from.

    Returns:
        Kinds "ABBA" and "BABA"; spans "IO", "S1", "S1+1" (the token after it), "S2", "end".

    Raises:
        InputError: If an argument is unknown, or too few names are single tokens.

    Example:
        >>> import optlens
        >>> prompts = ioi(optlens.load(), 4, order="ABBA")
        >>> len(prompts), prompts.kinds[0], sorted(prompts.spans)
        (4, 'ABBA', ['IO', 'S1', 'S1+1', 'S2', 'end'])
    """
    tokenizer = tokenizer_of(model)
    check_choice("order", order, ("mixed", "ABBA", "BABA"))
    check_choice("corruption", corruption, ("flip", "abc", "third", "random", "swap", "io"))
    frames = checked_frames(frames or words.IOI_FRAMES, ("A", "B", "S"), ("place", "object"))
    names = single_words(
        tokenizer, words.GIRLS + words.BOYS if names is None else names, "names", 5
    )
    places = single_words(tokenizer, words.PLACES, "places", 1)
    objects = single_words(tokenizer, words.OBJECTS, "objects", 1)

    def draw(rng: random.Random, number: int) -> Draft:
        kind = ("ABBA", "BABA")[number % 2] if order == "mixed" else order
        io, s, *fresh = rng.sample(names, 5)
        # for each corruption, who takes the places of IO, the first S and the second S
        new = {
            "flip": (io, s, io),
            "abc": tuple(fresh),
            "third": (io, s, fresh[0]),
            "random": (fresh[0], fresh[1], fresh[1]),
            "swap": (s, io, s),
            "io": (fresh[0], s, s),
        }[corruption]
        at = ("A", "B", "S") if kind == "ABBA" else ("B", "A", "S")
        scene = {"place": rng.choice(places), "object": rng.choice(objects)}
        return Draft(
            rng.choice(frames),
            scene | dict(zip(at, (io, s, s), strict=True)),
            scene | dict(zip(at, new, strict=True)),
            f" {io}",
            f" {fresh[0] if corruption == 'io' else s}",
            kind,
            {"IO": (at[0], 0), "S1": (at[1], 0), "S1+1": (at[1], 1), "S2": (at[2], 0)},
            ("A", "B", "S"),
        )

    note = {
        "flip": "the second subject is the other person, so the answer flips",
        "abc": "three fresh names, no answer",
        "third": "the second subject is a third person, no answer",
        "random": "two fresh names in the same places",
        "swap": "the first two names change places",
        "io": "the indirect object is a third person, so the answer is that person",
    }[corruption]
    settings = {"order": order, "corruption": corruption}
    return build(model, "ioi", n, seed, draw, settings, note)


def induction(
    model: OPTBase, n: int, length: int = 10, seed: int = 0, corruption: str = "answer"
) -> PromptSet:
    """Make random words that repeat: the last word asks for what followed it the first time.

    A block of `length` different words is written twice, the second time without its last word B,
    which is the answer; before B stands A, with which the prompt ends.

    Args:
        model: For its tokenizer; words are drawn from its vocabulary.
        n: How many pairs.
        length: Words in the block, 3 or more. The prompt has twice as many, `</s>` included.
        seed: Equal seeds give equal sets.
        corruption: "answer" writes another word C instead of B, which is then the corrupt answer
            and the wrong one; "prefix" writes another word instead of the first A, so that nothing
            is to be found, and the wrong answer is another word of the block.

    Returns:
        Spans "A1", "B1" (in the first block), "A2" and "end" (the same place).
    """
    tokenizer = tokenizer_of(model)
    check_choice("corruption", corruption, ("answer", "prefix"))
    if length < 3:
        raise checks.InputError(f"length must be at least 3, got {length}.")
    frame = "".join(f"{{w{place}}}" for place in range(length)) + "".join(
        f"{{again{place}}}" for place in range(length - 1)
    )

    def draw(rng: random.Random, number: int) -> Draft:
        *block, other = random_words(tokenizer, rng, length + 1)
        fill = {f"w{place}": word for place, word in enumerate(block)}
        fill |= {f"again{place}": word for place, word in enumerate(block[:-1])}
        changed = f"w{length - (1 if corruption == 'answer' else 2)}"
        wrong = other if corruption == "answer" else rng.choice(block[:-2])
        fields = {"A1": f"w{length - 2}", "B1": f"w{length - 1}", "A2": f"again{length - 2}"}
        spans = {name: (where, 0) for name, where in fields.items()}
        return Draft(frame, fill, fill | {changed: other}, block[-1], wrong, "induction", spans)

    note = {
        "answer": "another word follows the first time, so the answer is another",
        "prefix": "the last word did not occur before, so there is nothing to copy",
    }[corruption]
    settings = {"length": length, "corruption": corruption}
    return build(model, "induction", n, seed, draw, settings, note)


def greater_than(
    model: OPTBase, n: int, seed: int = 0, *, frames: Sequence[str] | None = None
) -> PromptSet:
    """Make prompts whose continuation is a later year (Hanna et al. 2023).

    Right are all two-digit tokens above the year's, wrong are all others (`answer_sets`,
    `wrong_sets`); `answers` and `wrong` name one of each. The corrupt prompt has the year 01 of the
    same century, after which nearly every year is later. `metrics.prob_diff(prompts.answer_sets,
    prompts.wrong_sets)` is the metric of the paper.

    Args:
        model: For its tokenizer. Only years that it cuts between century and year are used.
        n: How many pairs.
        seed: Equal seeds give equal sets.
        frames: Sentences with {year}, at the end {century}, and if wanted {event}.

    Returns:
        Kinds are the centuries' digits, "17"; spans "XX1" and "YY" (the two halves of the
        year), "end".
    """
    tokenizer = tokenizer_of(model)
    frames = checked_frames(frames or words.GREATER_THAN_FRAMES, ("year", "century"), ("event",))
    if not all(frame.endswith("{century}") for frame in frames):
        raise checks.InputError(f"The frames of greater_than end with {{century}}; got {frames}.")
    events = single_words(tokenizer, words.EVENTS, "events", 1)
    digits, years = two_digit_years(tokenizer)

    def draw(rng: random.Random, number: int) -> Draft:
        century = rng.choice(list(years))
        year = rng.choice(years[century])
        fill = {"event": rng.choice(events), "century": f"{century}"}
        later, others = [y for y in digits if y > year], [y for y in digits if y <= year]
        return Draft(
            rng.choice(frames),
            fill | {"year": f"{century}{year}"},
            fill | {"year": f"{century}01"},
            rng.choice(later),
            rng.choice(others),
            f"{century}",
            {"XX1": ("year", -1), "YY": ("year", 0)},
            answers=later,
            wrongs=others,
        )

    return build(model, "greater_than", n, seed, draw, {}, "the first year is 01")


def facts(
    model: OPTBase,
    n: int,
    seed: int = 0,
    relation: str = "mixed",
    *,
    table: Mapping[str, str] | None = None,
    frames: Sequence[str] | None = None,
) -> PromptSet:
    """Make prompts that ask for a fact; the corrupt one asks it of another subject.

    Args:
        model: For its tokenizer.
        n: How many pairs.
        seed: Equal seeds give equal sets.
        relation: "capital", "language", "continent", "opposite", or "mixed" (in turn).
        table: Your own facts, subject to answer, both single words; `frames` then says how to ask.
        frames: Sentences with {subject}, which end where the answer follows.

    Returns:
        Kinds are the relations; `wrong` is the other subject's answer; spans "subject", "end".
    """
    tokenizer = tokenizer_of(model)
    if table is not None:
        relation, relations = "table", {"table": (table, frames or ())}
    else:
        check_choice("relation", relation, ("mixed", *words.FACTS))
        relations = {
            name: (known, frames or own)
            for name, (known, own) in words.FACTS.items()
            if relation in ("mixed", name)
        }
    usable = {}
    for name, (known, own) in relations.items():
        own = checked_frames(own, ("subject",))
        both = [
            subject
            for subject, answer in known.items()
            if is_single(tokenizer, subject) and is_single(tokenizer, answer)
        ]
        if len({known[subject] for subject in both}) < 2:
            raise checks.InputError(
                f"Of {len(known)} facts ({name}) only {len(both)} have a subject and an answer that "
                "are single tokens here, and two with different answers are needed. Give your own: "
                'facts(..., table={"France": "Paris"}, frames=["The capital of {subject} is"]).'
            )
        usable[name] = (known, own, both)

    def draw(rng: random.Random, number: int) -> Draft:
        name = list(usable)[number % len(usable)]
        known, own, subjects = usable[name]
        subject = rng.choice(subjects)
        other = rng.choice([each for each in subjects if known[each] != known[subject]])
        return Draft(
            rng.choice(own),
            {"subject": subject},
            {"subject": other},
            f" {known[subject]}",
            f" {known[other]}",
            name,
            {"subject": ("subject", 0)},
            ("subject",),
        )

    settings = {"relation": relation}
    return build(model, "facts", n, seed, draw, settings, "another subject")


def agreement(model: OPTBase, n: int, seed: int = 0, distractor: str = "opposite") -> PromptSet:
    """Make prompts that ask for the verb's number; the corrupt one changes that of the subject.

    Where the tokenizer cuts a plural into two tokens (" dog", "s"), the singular gets an adjective
    (" old", " dog"), so that both have equal length and the last token of both tells the number.

    Args:
        model: For its tokenizer.
        n: How many pairs.
        seed: Equal seeds give equal sets.
        distractor: The number of the noun between subject and verb, against that of the clean
            subject: "opposite" or "same". It is the same in both prompts.

    Returns:
        Kinds "singular" and "plural" (of the clean subject), in turn; spans "subject" (its last
        token), "other" (the last token of the distractor), "end".
    """
    tokenizer = tokenizer_of(model)
    check_choice("distractor", distractor, ("opposite", "same"))
    verbs = [pair for pair in words.VERBS if all(is_single(tokenizer, form) for form in pair)]
    adjectives = single_words(tokenizer, words.ADJECTIVES, "adjectives", 1)
    beings, things = (numbered_nouns(tokenizer, pool) for pool in (words.BEINGS, words.THINGS))
    if not verbs or not beings:
        raise checks.InputError(
            "agreement needs nouns whose plural has as many tokens as the singular, or one more, "
            "and verbs like ' is' and ' are' of one token; this tokenizer has "
            f"{len(beings) + len(things)} such nouns and {len(verbs)} such verbs."
        )

    def draw(rng: random.Random, number: int) -> Draft:
        clause = rng.random() < 0.3
        frame = rng.choice(words.CLAUSE_FRAMES if clause else words.AGREEMENT_FRAMES)
        noun, plural, longer = rng.choice(beings if clause else beings + things)
        forms = [f"{rng.choice(adjectives)} {noun}" if longer else noun, plural]
        several = number % 2
        other = rng.choice([each for each in beings + things if each[0] != noun])
        fill = {"other": other[several if distractor == "same" else 1 - several]}
        verb = rng.choice(verbs)
        return Draft(
            frame,
            fill | {"subject": forms[several]},
            fill | {"subject": forms[1 - several]},
            f" {verb[several]}",
            f" {verb[1 - several]}",
            ("singular", "plural")[several],
            {"subject": ("subject", 0), "other": ("other", 0)},
        )

    settings = {"distractor": distractor}
    return build(model, "agreement", n, seed, draw, settings, "the subject's number is the other")


def gender(
    model: OPTBase, n: int, seed: int = 0, *, frames: Sequence[str] | None = None
) -> PromptSet:
    """Make prompts that ask for *he* or *she*; the corrupt one has a name of the other kind.

    The names are given to girls or to boys by an old convention of English; nothing is said about
    persons.

    Args:
        model: For its tokenizer.
        n: How many pairs.
        seed: Equal seeds give equal sets.
        frames: Sentences with {name}, and if wanted {place}.

    Returns:
        Kinds "she" and "he", in turn; spans "name", "end".
    """
    tokenizer = tokenizer_of(model)
    frames = checked_frames(frames or words.GENDER_FRAMES, ("name",), ("place",))
    pools = [single_words(tokenizer, pool, "names", 2) for pool in (words.GIRLS, words.BOYS)]
    places = single_words(tokenizer, words.PLACES, "places", 1)

    def draw(rng: random.Random, number: int) -> Draft:
        which = number % 2
        names = [rng.choice(pools[which]), rng.choice(pools[1 - which])]
        fill = {"place": rng.choice(places)}
        pronouns = ("she", "he")
        return Draft(
            rng.choice(frames),
            fill | {"name": names[0]},
            fill | {"name": names[1]},
            f" {pronouns[which]}",
            f" {pronouns[1 - which]}",
            pronouns[which],
            {"name": ("name", 0)},
            ("name",),
        )

    return build(model, "gender", n, seed, draw, {}, "a name of the other gender")
