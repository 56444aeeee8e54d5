"""Tokens that belong together stand in one column, in the order of both prompts."""

import random

from optlens.comparison import align, column_labels


def test_prompts_of_one_length_are_aligned_by_position():
    assert align([1, 2, 3], [3, 1, 2]) == [(0, 0), (1, 1), (2, 2)]


def test_an_added_token_stands_alone():
    assert align([1, 2], [1, 9, 2]) == [(0, 0), (None, 1), (1, 2)]
    assert align([1, 9, 2], [1, 2]) == [(0, 0), (1, None), (2, 1)]


def test_a_replaced_stretch_of_one_length_is_paired():
    assert align([1, 5, 6, 2, 3], [1, 7, 8, 2]) == [(0, 0), (1, 1), (2, 2), (3, 3), (4, None)]


def test_a_replaced_stretch_of_another_length_is_not():
    expected = [(0, 0), (1, None), (None, 1), (None, 2), (2, 3)]
    assert align([1, 5, 2], [1, 6, 7, 2]) == expected


def test_frequent_tokens_of_long_prompts_are_no_noise():
    """The default of difflib leaves out what makes up over 1 % of 200 tokens or more."""
    first = [1, 2] * 150
    columns = align(first, [9, *first])
    assert columns == [(None, 0), *((pos, pos + 1) for pos in range(300))]


def test_every_position_occurs_once_and_in_order():
    rng = random.Random(3)
    for _ in range(200):
        first = [rng.randrange(4) for _ in range(rng.randrange(1, 12))]
        second = [rng.randrange(4) for _ in range(rng.randrange(1, 12))]
        columns = align(first, second)
        assert [a for a, _ in columns if a is not None] == list(range(len(first)))
        assert [b for _, b in columns if b is not None] == list(range(len(second)))
        assert (None, None) not in columns


def test_labels_name_both_tokens_where_they_differ():
    columns = [(0, 0), (1, None), (None, 1), (2, 2)]
    assert column_labels(columns, ["A", "cat", "is"], ["A", "ran", "was"]) == [
        "A",
        "cat | ",
        " | ran",
        "is | was",
    ]
