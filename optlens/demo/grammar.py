"""Small phrases of the synthetic corpus, built from the lexicon by a seeded random generator."""

import random

from optlens.demo import lexicon as lx


def noun_phrase(rng: random.Random, noun: str) -> str:
    """Describe a noun by none, one or two adjectives, without article: ``small red kite``."""
    words = [noun]
    if rng.random() < 0.35:
        words.insert(0, rng.choice(lx.COLORS))
    if rng.random() < 0.35:
        words.insert(0, rng.choice(lx.ADJECTIVES))
    return " ".join(words)


def number(rng: random.Random) -> str:
    """Draw a small number, as a word from two to twelve."""
    return rng.choice(lx.NUMBERS[1:12])


def when(rng: random.Random) -> str:
    """Draw a time at the start of a sentence, with its comma."""
    pick = rng.randrange(7)
    if pick == 0:
        return f"On {rng.choice(lx.DAYS)},"
    if pick == 1:
        return f"In {rng.choice(lx.MONTHS)},"
    if pick == 2:
        weather = rng.choice(lx.WEATHER)
        return f"One {weather} {rng.choice(('morning', 'evening', 'day', 'afternoon'))},"
    if pick == 3:
        return f"Last {rng.choice(('week', 'month', 'year', 'night', *lx.SEASONS))},"
    if pick == 4:
        return f"In {rng.randint(1100, 2020)},"
    return rng.choice(
        ("Yesterday,", "Today,", "One day,", "Later,", "Once,", "Early in the morning,")
    )


def sentence(text: str) -> str:
    """Capitalise the first letter and leave the rest."""
    return text[0].upper() + text[1:]


def any_noun(rng: random.Random) -> str:
    """Draw a noun of any countable kind, held-out ones included."""
    pool = rng.choice(
        (lx.GIFTS, lx.HELD_OUT_GIFTS, lx.THINGS, lx.ANIMALS, lx.HELD_OUT_SUBJECTS, lx.JOBS)
    )
    return rng.choice(pool)


def subject_noun(rng: random.Random, pool: list[str]) -> str:
    """Draw a noun that may be the subject of a verb: not one of ``HELD_OUT_SUBJECTS``."""
    while True:
        noun = rng.choice(pool)
        if noun not in lx.HELD_OUT_SUBJECTS:
            return noun


def counted(rng: random.Random, noun: str) -> str:
    """Show a noun's number by a determiner: ``a lamp``, ``these lamps``, ``seven old lamps``."""
    singular, several = noun, lx.plural(noun)
    if rng.random() < 0.5:
        phrase = noun_phrase(rng, singular)
        return rng.choice((lx.article(phrase), "this " + phrase, "that " + phrase, "one " + phrase))
    phrase = noun_phrase(rng, several)
    return rng.choice(("these ", "those ", "many ", "some ", number(rng) + " ", "a few ")) + phrase
