"""The people and places of the synthetic corpus: first names, surnames, towns, made-up names.

First names are dealt into groups, and the group decides in which documents a name may appear:

* ``GIRLS``, ``BOYS``: everywhere;
* ``HELD_OUT_GIRLS``, ``HELD_OUT_BOYS``: in stories about one person, never in a document that tells
  of two people and a gift (the indirect-object task);
* ``NOUN_GENDER_NAMES`` (the last four of each held-out list): only in sentences that call the
  person a girl, a boy, a sister and so on, never near a pronoun;
* ``UNSEEN_NAMES``: in no document at all. Their tokens are in the vocabulary and occur only inside
  documents of repeated random tokens.

A further kind, made-up names of two or three syllables, is drawn without limit by `invented_name`;
the ones in ``HELD_OUT_INVENTED`` are kept out of the corpus.
"""

import random

GIRLS = (
    "Mary Anna Emma Lucy Sarah Alice Grace Clara Julia Laura Helen Susan Jane Kate Rose Amy Ruth "
    "Ella Ivy Lily Nina Maria Sophie Emily Hannah Molly Daisy Alma Edith Elsie Flora Greta Hazel "
    "Irene Joan Karen Linda Martha Nancy Olive Paula Rita Sally Tina Vera Wendy Zoe Betty Carol "
    "Donna Fiona Gina Holly Judy Lisa Mabel Nell Pam Rachel Sandra Stella Tessa Ursula Violet "
    "Wilma Agnes Beth Cora Diana Eva Freda Gloria Heidi Ida Jenny Kitty"
).split()
BOYS = (
    "John Tom Paul Peter James David Mark Jack Henry Simon Adam Alan Ben Carl Dan Eric Frank "
    "George Harry Ian Jacob Kevin Leo Martin Neil Oscar Philip Ralph Sam Tim Victor Walter Andrew "
    "Brian Charles Dennis Edward Fred Gary Hugo Isaac Joseph Keith Larry Michael Nathan Owen "
    "Patrick Robert Steven Thomas Vincent William Arthur Bruce Colin Daniel Edwin Felix Gordon "
    "Herbert Ivan Jeremy Kenneth Luke Matthew Nigel Oliver Quentin Richard Stuart Theo Vernon "
    "Warren Albert Bernard"
).split()
HELD_OUT_GIRLS = (
    "Nora Ellen Amelia Bridget Celia Doris Esther Gemma Ingrid Lydia Monica Phoebe Sylvia Teresa"
).split()
HELD_OUT_BOYS = (
    "Max Roger Aaron Clive Dylan Ernest Gilbert Howard Jasper Leon Morris Ronald Sidney Trevor"
).split()
UNSEEN_NAMES = (
    "Bianca Cedric Dora Elmer Fergus Hilda Jonas Kara Lars Marta Otis Priya Rufus Selma Tobias "
    "Zelda"
).split()
NAMES = GIRLS + BOYS
HELD_OUT_NAMES = HELD_OUT_GIRLS + HELD_OUT_BOYS
NOUN_GENDER_NAMES = HELD_OUT_GIRLS[-4:] + HELD_OUT_BOYS[-4:]
PRONOUN_NAMES = [name for name in HELD_OUT_NAMES if name not in NOUN_GENDER_NAMES]
FEMALE = frozenset(GIRLS + HELD_OUT_GIRLS)

SURNAMES = tuple(
    root + ending
    for root in (
        "Ash Black Broad Car Dray Elm Farn Gran Hart Ken Lang Mar Nor Oak Penn Red Sher Thorn "
        "Whit Win Ather Bram Crom Dun Ever Fen Hol Kirk Lock Mor Pres Row Strat Tem Wake"
    ).split()
    for ending in "ford ley ton well wood man son by field ham worth comb".split()
)
TOWNS = tuple(
    root + ending
    for root in (
        "Alder Barn Clear Deep East Fair Glen High Iron Kings Lake Mill New Old Pine Queens River "
        "Stone Swan Wolf Under West Winter Summer Silver Salt Rock Raven Green Gold Amber Birch "
        "Cold Dark Eagle Fox Hazel Little Maple North"
    ).split()
    for ending in "ville port burg mouth bridge stead minster gate haven dale wick cliff".split()
)

ONSETS = "b br d dr f g gl h j k l m n p pl r s sk t tr v w y z".split()
VOWELS = "a e i o u".split()
CODAS = "l m n r s t x nd rk ".split(" ")
HELD_OUT_INVENTED = (
    "Brunox Dramil Fugest Gloran Hoskark Jenil Kuplat Lavond Metrux Nobrer Pliset Ravunt Skovan "
    "Tulird Vomark Wegren Yadrul Zikond Barplo Druvis"
).split()


def invented_name(rng: random.Random) -> str:
    """Make up a first name of two or three syllables, never one of ``HELD_OUT_INVENTED``.

    Args:
        rng: Where the letters come from.

    Returns:
        A capitalised word such as ``"Traskin"``.
    """
    while True:
        syllables = rng.choice((2, 2, 3))
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables))
        name = (word + rng.choice(CODAS)).capitalize()
        if name not in HELD_OUT_INVENTED:
            return name


def person(rng: random.Random, held_out_share: float = 0.15) -> str:
    """Draw a first name for a document about one person, which may use held-out names too.

    Args:
        rng: Where the choice comes from.
        held_out_share: The probability of a held-out name (never one of ``NOUN_GENDER_NAMES``).

    Returns:
        A first name.
    """
    return rng.choice(PRONOUN_NAMES if rng.random() < held_out_share else NAMES)


def pronouns(name: str) -> tuple[str, str, str]:
    """Give the subject, object and possessive pronoun of a name.

    Args:
        name: A name of this module that has a gender.

    Returns:
        ``("she", "her", "her")`` or ``("he", "him", "his")``.
    """
    return ("she", "her", "her") if name in FEMALE else ("he", "him", "his")
