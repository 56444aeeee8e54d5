"""Where a user's subject, queries or keys stand."""

import pytest
import torch

import optlens
from optlens.checks import InputError
from optlens.patching.spans import positions_of

TEXTS = ["John and Mary met John", "The capital of France is"]


@pytest.fixture(scope="module")
def demo():
    return optlens.load()


def found(model, texts, given):
    tokens, mask = model.prepare_inputs(texts)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    return positions_of(model, tokens, real, given, "subject")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (-1, [5]),
        (slice(1, 3), [1, 2]),
        (range(4, 6), [4, 5]),
        ((0, -1), [0, 5]),
        ([3, 1, 3], [1, 3]),
        (torch.tensor([2, 4]), [2, 4]),
        ("Mary", [3]),
        (" Mary", [3]),
        ("and Mary met", [2, 3, 4]),
        (("John", 1), [5]),
        (("John", -2), [1]),
        ([("John", 0)], [1]),
        ([[1, 2]], [1, 2]),
    ],
)
def test_one_prompt(demo, given, expected):
    assert found(demo, TEXTS[0], given) == [expected]


def test_a_word_may_be_several_tokens_of_which_the_last_is_short(demo):
    """The tokens before the last are as long as the text, for the space that is not given."""
    prompt = "The Johns met"
    assert demo.to_str_tokens(prompt) == ["</s>", "The", " John", "s", " met"]
    assert found(demo, prompt, "Johns") == found(demo, prompt, " Johns") == [[2, 3]]


def test_prompts_of_unequal_length_count_their_own_tokens(demo):
    texts = ["The capital of France is", "The France is"]
    assert found(demo, texts, -1) == [[5], [3]]
    assert found(demo, texts, "France") == [[4], [2]]
    assert found(demo, texts, ["capital of", ("France", 0)]) == [[2, 3], [2]]
    assert found(demo, texts, [4, 1]) == [[4], [1]]
    assert found(demo, texts, (1, 2)) == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("texts", "given", "message"),
    [
        (TEXTS[0], "John", r"occurs 2 times, at positions \[\[1\], \[5\]\]; .*\('John', 0\)"),
        (TEXTS[0], ("John", 2), "none of them"),
        (TEXTS[0], "Mar", r"' Mary'"),
        (TEXTS[0], "", "no tokens spell"),
        (TEXTS[0], 6, "0 to 5"),
        (TEXTS[0], slice(9, 10), "chooses none"),
        (TEXTS[0], 1.5, "give a position"),
        (TEXTS[0], None, "give a position"),
        (TEXTS[0], True, "give a position"),
        (TEXTS, [1, 2, 3], "3 entries for 2 prompts"),
        (["The capital of France is", "The France is"], 4, "of prompt 1 asks for position 4"),
    ],
)
def test_what_is_wrong_is_said(demo, texts, given, message):
    with pytest.raises(InputError, match=message):
        found(demo, texts, given)
