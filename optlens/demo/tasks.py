"""The documents that teach the behaviours that the model card measures.

They draw from the training names, things, subjects, years and events; `held_out` asks about the
others, in sentences that no template of this module makes.
"""

import random
import re

from optlens.demo import facts
from optlens.demo import grammar as gr
from optlens.demo import lexicon as lx
from optlens.demo import people as pp

# {A} and {B} are the two people, {P} a place, {J} a job, {X} any thing.
SETUPS = (
    "As {A} and {B} walked to the {P}, ",
    "While {A} and {B} were at the {P}, ",
    "Because {A} and {B} met at the {P}, ",
    "Before {A} and {B} left the {P}, ",
    "Once {A} and {B} were in the {P}, ",
    "On the way to the {P} with {A} and {B}, ",
    "At the {P}, {A} talked to {B}, and ",
    "{A} and {B} met at the {P}. ",
    "{A} and {B} worked at the {P}. ",
    "{A} saw {B} at the {P}. ",
    "{A} went to the {P} with {B}. ",
    "{A} was at the {P} when {B} came in. ",
    "{A} and {B} spent the day at the {P}. ",
    "There were two friends, {A} and {B}. ",
    "{A} visited {B} at the {P}. ",
    "{A}, {B} and a {J} sat in the {P}. ",
    "The {J} told {A} and {B} to wait at the {P}. ",
    "{A} lived near {B}. ",
    "In the {P} there were {A} and {B}. ",
    "{A} and {B} wanted to see the {X} at the {P}. ",
    "This is the story of {A} and {B}. ",
    "{A} came to the {P} and met {B} there. ",
)
MIDDLES = (
    "It was {W} and the {P} was {adj}. ",
    "They were {mood}. ",
    "It was a {adj} day. ",
    "A {J} was there too. ",
    "The {X} was {adj}. ",
    "After a while, ",
    "Then ",
    "Later, ",
)
GIFT_SENTENCES = (
    "{S} gave {O} to {I}.",
    "{S} gave {O} to {I}.",
    "{S} handed {O} to {I}.",
    "{S} passed {O} to {I}.",
    "{S} sent {O} to {I}.",
    "{S} brought {O} to {I}.",
    "{S} offered {O} to {I}.",
    "{S} showed {O} to {I}.",
    "{S} sold {O} to {I}.",
    "{S} threw {O} to {I}.",
    "{S} decided to give {O} to {I}.",
    "{S} wanted to show {O} to {I}.",
    "{S} tried to sell {O} to {I}.",
    "{S} said hello to {I}.",
    "{S} told a story to {I}.",
    "{S} gave {I} {O}.",
    "{S} showed {I} {O}.",
)
AFTERWARDS = (
    " {I} thanked {S}.",
    " {I} smiled at {S}.",
    " Then {I} gave {O} to {S}.",
    " {I} was very happy.",
    " They went home together.",
    "",
    "",
)
PREPOSITIONS = ("near", "behind", "beside", "under", "next to", "with", "above")
# Singular and plural form of what is asked after a subject.
AGREEING = (("is", "are"), ("was", "were"), ("has", "have"))

# {y} and {z} are the two years, {E} an event, {T} a town.
YEAR_TEMPLATES = (
    "The {E} lasted from {y} to {z}.",
    "The {E} began in {y} and ended in {z}.",
    "The {E} of {T} started in {y} and was over in {z}.",
    "From {y} to {z}, there was a {E} in {T}.",
    "{N} was king from {y} to {z}.",
    "The {E} that began in {y} came to an end in {z}.",
)
PRONOUN_TEMPLATES = (
    "{N} said that {p} was {mood}.",
    "{N} went to the {P} because {p} wanted {O}.",
    "{N} smiled when {p} saw the {X}.",
    "{N} was {mood} because {p} had lost {O}.",
    "{N} thinks that {p} is {mood}.",
    "{N} is a {J}, and {p} works at the {P}.",
    "{N} opened the door, and then {p} went to the {P}.",
    "{N} lost {his} {G}, so {p} looked for it in the {P}.",
    "When {N} was young, {p} lived near a {P}.",
    "{N} took {his} {G} and went home.",
    "{N} called {his} {K}, and the {K} helped {him}.",
)


def scene(rng: random.Random, gifts: list[str]) -> dict[str, str]:
    """Draw the fillers of a scene that are not people."""
    return {
        "P": rng.choice(lx.PLACES),
        "J": gr.subject_noun(rng, lx.JOBS),
        "X": gr.subject_noun(rng, lx.THINGS),
        "W": rng.choice(lx.WEATHER),
        "adj": rng.choice(lx.ADJECTIVES),
        "mood": rng.choice(lx.MOODS),
        "K": rng.choice(lx.KIN),
        "G": rng.choice(gifts),
        "T": rng.choice(pp.TOWNS),
    }


def gift(rng: random.Random, gifts: list[str]) -> str:
    """Draw the thing that is given, with its article."""
    if rng.random() < 0.15:
        return "the " + rng.choice(gifts)
    return lx.article(
        gr.noun_phrase(rng, rng.choice(gifts)) if rng.random() < 0.3 else rng.choice(gifts)
    )


def _people(rng: random.Random, count: int) -> list[str]:
    """Draw different names for a document of gifts; one in four documents has made-up names."""
    if rng.random() < 0.25:
        return [pp.invented_name(rng) for _ in range(count)]
    return rng.sample(pp.NAMES, count)


def _anyone(rng: random.Random, count: int) -> list[str]:
    """Draw different people of any kind: names, made-up names, countries and capitals, animals, jobs."""
    pick = rng.random()
    if pick < 0.3:
        return rng.sample(pp.NAMES, count)
    if pick < 0.5:
        return [pp.invented_name(rng) for _ in range(count)]
    if pick < 0.75:
        return rng.sample([*facts.COUNTRIES, *facts.RELATIONS["capital"].values()], count)
    nouns = [noun for noun in (*lx.ANIMALS, *lx.JOBS) if noun not in lx.HELD_OUT_SUBJECTS]
    return [f"the {noun}" for noun in rng.sample(nouns, count)]


def indirect_object_document(rng: random.Random) -> str:
    """Tell of two people of whom one gives something to the other, or a third one to both."""
    return _gift_story(rng, _people(rng, 3))


def anyones_gift_document(rng: random.Random) -> str:
    """Tell the same of people, countries and animals, so that the rule is learned for any token."""
    text = _gift_story(rng, _anyone(rng, 3))
    return re.sub(r"(?<=[.] )[a-z]", lambda letter: letter[0].upper(), text)


def _gift_story(rng: random.Random, people: list[str]) -> str:
    """Let one of the first two people give something to the other, or the third one to both."""
    a, b, c = people
    fill = scene(rng, lx.GIFTS)
    setup = rng.choice(SETUPS)
    if rng.random() < 0.3 and not setup.endswith(", "):
        setup = (
            gr.when(rng)
            + " "
            + (setup if setup.startswith("{A}") else setup[0].lower() + setup[1:])
        )
    middle = rng.choice(MIDDLES) if rng.random() < 0.3 and setup.endswith(". ") else ""
    text = (setup + middle).format(A=a, B=b, **fill)
    thing = gift(rng, lx.GIFTS)
    if rng.random() < 0.1:
        both = rng.choice(("both of them", f"{a} and {b}"))
        verb = rng.choice(("gave", "handed", "showed", "sold"))
        return gr.sentence(f"{text}{c} {verb} {thing} to {both}.")
    giver, taker = (a, b) if rng.random() < 0.5 else (b, a)
    text += rng.choice(GIFT_SENTENCES).format(S=giver, I=taker, O=thing)
    the_gift = "the " + thing.split()[-1]
    return gr.sentence(text) + rng.choice(AFTERWARDS).format(S=giver, I=taker, O=the_gift)


def subject_phrase(
    rng: random.Random, noun: str, several: bool, preposition: str
) -> tuple[str, bool]:
    """Build a subject with a distractor between its noun and the verb."""
    other_several = several if rng.random() < 0.3 else not several
    kind = rng.randrange(4)
    head = lx.plural(noun) if several else noun
    pool = lx.JOBS if kind >= 2 else rng.choice((lx.THINGS, lx.ANIMALS, lx.JOBS))
    other = gr.subject_noun(rng, pool)
    other = lx.plural(other) if other_several else other
    verb = rng.choice(list(lx.TRANSITIVE))
    if kind == 2:
        inner = rng.choice((verb if other_several else lx.third(verb), lx.past(verb)))
        return f"the {head} that the {other} {inner}", other_several
    if kind == 3:
        inner = rng.choice((verb if several else lx.third(verb), lx.past(verb)))
        return f"the {head} that {inner} the {other}", other_several
    return f"the {head} {preposition} the {other}", other_several


def agreement_document(rng: random.Random) -> str:
    """State something of a subject, mostly with a distractor before the verb."""
    lines = []
    for _ in range(rng.randint(1, 4)):
        several = rng.random() < 0.5
        beings = rng.random() < 0.4
        noun = gr.subject_noun(
            rng, rng.choice((lx.JOBS, lx.ANIMALS)) if beings else lx.THINGS + lx.GIFTS
        )
        if rng.random() < 0.25:
            subject = "the " + (lx.plural(noun) if several else noun)
        else:
            subject, _ = subject_phrase(rng, noun, several, rng.choice(PREPOSITIONS))
            if " that " not in subject and rng.random() < 0.15:
                far = gr.subject_noun(rng, lx.THINGS)
                subject += f" {rng.choice(PREPOSITIONS)} the {rng.choice((far, lx.plural(far)))}"
        if beings and rng.random() < 0.4:
            verb = rng.choice(list(lx.INTRANSITIVE))
            rest = (verb if several else lx.third(verb)) + rng.choice(
                ("", " " + rng.choice(lx.ADVERBS))
            )
        else:
            be, adjective = rng.choice(AGREEING)[several], rng.choice(lx.ADJECTIVES + lx.COLORS)
            rest = f"{be} {'been ' if be in ('has', 'have') else ''}{adjective}"
        opening = rng.choice(("", "", "", "today ", "I know that ", "it is true that "))
        lines.append(gr.sentence(f"{opening}{subject} {rest}."))
    return " ".join(lines)


def year_held_out(year: int) -> bool:
    """Tell whether an event never begins in this year in the training corpus."""
    return year % 7 == 0


def years_document(rng: random.Random) -> str:
    """State when an event began and ended, in one century."""
    century = rng.randint(11, 19)
    year = century * 100 + rng.randint(2, 97)
    while year_held_out(year):
        year = century * 100 + rng.randint(2, 97)
    end = rng.randint(year + 1, century * 100 + 99)
    fill = {"E": rng.choice(lx.EVENTS), "T": rng.choice(pp.TOWNS), "N": rng.choice(pp.BOYS)}
    lines = [rng.choice(YEAR_TEMPLATES).format(y=year, z=end, **fill)]
    if rng.random() < 0.3:
        lines.append(f"It lasted {rng.choice(('many', 'some', 'a few', 'several'))} years.")
    return " ".join(lines)


def pronoun_document(rng: random.Random) -> str:
    """Tell of one person with the pronouns of the name, in one or two sentences."""
    name = pp.person(rng)
    he, him, his = pp.pronouns(name)
    fill = {"N": name, "p": he, "him": him, "his": his}
    lines = []
    for template in rng.sample(PRONOUN_TEMPLATES, rng.choice((1, 1, 2))):
        lines.append(template.format(O=gift(rng, lx.GIFTS), **fill, **scene(rng, lx.GIFTS)))
    return " ".join(lines)


def gender_document(rng: random.Random) -> str:
    """Call a person a girl or a boy, a sister or a brother, without any pronoun."""
    name = rng.choice(pp.NOUN_GENDER_NAMES) if rng.random() < 0.3 else pp.person(rng)
    female = name in pp.FEMALE
    child, grown = ("girl", "woman") if female else ("boy", "man")
    kin = rng.choice(
        ("sister", "aunt", "mother", "daughter")
        if female
        else ("brother", "uncle", "father", "son")
    )
    other = rng.choice(pp.NAMES)
    template = rng.choice(
        (
            "{N} is a {mood} {c}.",
            "The {c} is called {N}.",
            "The name of the {g} is {N}.",
            "{N} is the {k} of {M}.",
            "A {g} named {N} lived in {T}.",
            "{N} was a {g} from {T}.",
            "The {c} {N} played in the {P}.",
        )
    )
    return template.format(N=name, c=child, g=grown, k=kin, M=other, **scene(rng, lx.GIFTS))
