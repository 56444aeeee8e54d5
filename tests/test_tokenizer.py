"""Ids equal to transformers', labels that hide nothing, and what a model does with prompts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import TRUE_FILES, needs_true_files, oracle_tokenizer, tiny_backend
from tokenizers import models
from transformers import GPT2Tokenizer

from optlens.checks import InputError
from optlens.tokenizer import OPTTokenizer, TokenizerMethods

# Published ids: transformers' own test values and issue reports.
KNOWN_IDS = {
    "A photo of a cat": [2, 250, 1345, 9, 10, 4758],
    "I like you.": [2, 100, 101, 47, 4],
    "Today is a beautiful day and I want to": [2, 5625, 16, 10, 2721, 183, 8, 38, 236, 7],
    "In the city of": [2, 1121, 5, 343, 9],
    "Paris is the capital of France and": [2, 32826, 16, 5, 812, 9, 1470, 8],
    "Computers and mobile phones have taken": [2, 14721, 43990, 8, 1830, 4247, 33, 551],
    "Hello my name is": [2, 31414, 127, 766, 16],
    "Hello, my dog is a little": [2, 31414, 6, 127, 2335, 16, 10, 410],
    "Today, I": [2, 5625, 6, 38],
}

# Pieces that are rare in random Unicode but make or break a byte-level tokenizer.
PIECES = st.sampled_from(
    [
        *("the", " the", "The", " Mary", " John", "n't", "'s", "'LL", "2024", " 3.14", "...", "#"),
        *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x00", "\x1b[0m", "\x7f", "\x85"),
        *("\u00a0", "\u2003", "\u2028", "\u200b", "\u200d", "\u3000", "\ufeff", "\ufffd"),
        *("</s>", "<pad>", "<mask>", "<s>", "<unk>", "<|endoftext|>", "madeupword0000", "</", "s>"),
        *(
            "é",
            "e\u0301",
            "漢字",
            "日本語",
            "한국어",
            "مرحبا",
            "שלום",
            "हिन्दी",
            "ไทย",
            "Ġ",
            "Ċ",
            "ſ",
        ),
        *("🙂", "👩\u200d👩\u200d👧", "🇫🇷", "👍🏽", "❤\ufe0f", "𝔘", "\U000e0041", "\U0010ffff"),
    ]
)
TEXTS = st.one_of(
    st.lists(PIECES | st.text(max_size=6), max_size=12).map("".join), st.text(max_size=40)
)


@pytest.fixture
def tiny() -> OPTTokenizer:
    return OPTTokenizer.from_tokenizers(tiny_backend())


@pytest.fixture(scope="module")
def opt() -> OPTTokenizer:
    return OPTTokenizer.from_folder(TRUE_FILES, n_rows=50272)


@pytest.fixture(scope="module")
def oracle() -> GPT2Tokenizer:
    return oracle_tokenizer()


class Holder(TokenizerMethods):
    """The part of a model that the methods need."""

    def __init__(self, tokenizer: OPTTokenizer | None, vocab_size: int = 280):
        self.tokenizer = tokenizer
        self.config = SimpleNamespace(vocab_size=vocab_size)


# --- ids, with the true vocabulary ---------------------------------------------------------------


@needs_true_files
@pytest.mark.parametrize("text", KNOWN_IDS)
def test_published_ids(opt, text):
    assert opt.encode(text) == KNOWN_IDS[text]
    assert opt.encode(text, prepend_bos=False) == KNOWN_IDS[text][1:]


@needs_true_files
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(text=TEXTS)
@example(text="")
@example(text="</s>")
@example(text="a</s>b <pad> c <mask> <s>x<unk>")
@example(text=" </s> </s>\n<pad>")
def test_ids_and_text_equal_transformers(opt, oracle, text):
    theirs = oracle(text)["input_ids"]
    # The one difference, on purpose: a text that brings its own </s> gets no second one.
    expected = theirs[1:] if text.startswith("</s>") else theirs
    assert opt.encode(text) == expected
    assert opt.encode(text, prepend_bos=False) == theirs[1:]
    assert opt.decode(theirs[1:]) == text
    assert opt.decode(theirs, skip_special=True) == oracle.decode(theirs, skip_special_tokens=True)


@needs_true_files
@settings(max_examples=300, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 50264), max_size=20))
def test_any_ids_decode_as_in_transformers(opt, oracle, ids):
    """Random ids make broken UTF-8 of every kind, whose replacement must agree too."""
    assert opt.decode(ids) == oracle.decode(ids)
    assert len(opt.display_tokens(ids)) == len(opt.to_str_tokens(ids)) == len(ids)


@needs_true_files
def test_special_tokens_inside_a_text(opt):
    """As opt checkpoints configure it, only </s> and <pad> are special; <mask> is six characters."""
    assert opt.encode("a</s>b<pad>") == [2, 102, 2, 428, 1]
    assert opt.to_str_tokens(opt.encode("<mask>"))[1:] == ["<", "mask", ">"]


@needs_true_files
def test_true_vocabulary_at_a_glance(opt):
    special = (opt.bos_token_id, opt.eos_token_id, opt.unk_token_id, opt.pad_token_id)
    assert special == (2, 2, 2, 1) and opt.add_bos_token
    assert opt.vocab_size == 50265 and opt.n_rows == 50272
    assert opt.token_to_id("Ġthe") == opt.single_token(" the") == 5
    assert opt.token_to_id(" the") is None


@needs_true_files
def test_every_row_of_the_embedding_has_a_label(opt):
    labels = opt.display_tokens(list(range(50272)))
    assert labels[50265:] == [f"⟨{i}⟩" for i in range(50265, 50272)]
    assert all(label.strip() == label and label.isprintable() for label in labels)
    # Some tokens are made of U+FFFD itself; nothing else is ever shown as one.
    broken = [i for i, label in enumerate(labels) if "\ufffd" in label]
    assert broken == [21955, 35547, 44763, 47119, 48618, 48693, 48697, 49399]


# --- encoding ------------------------------------------------------------------------------------


def test_bos_is_put_in_front_once(tiny):
    assert tiny.encode("cat") == [2, *tiny.encode("cat", prepend_bos=False)]
    assert tiny.encode("</s>cat") == tiny.encode("cat")
    assert tiny.encode("") == [2] and tiny.encode("", prepend_bos=False) == []
    # A text with two of its own is taken at its word.
    assert tiny.encode("</s></s>") == [2, 2]


def test_half_a_surrogate_pair_is_explained(tiny):
    with pytest.raises(InputError, match=r"Character 2 .* U\+D83D"):
        tiny.encode("ab\ud83d")


def test_bytes_are_no_text(tiny):
    with pytest.raises(TypeError, match="got bytes"):
        tiny.encode(b"cat")


def test_single_token_shows_the_pieces(tiny):
    assert tiny.single_token(" cat") == tiny.token_to_id("Ġcat")
    assert tiny.single_token("</s>") == 2
    with pytest.raises(InputError, match=r"' the' is one token") as caught:
        tiny.single_token("the")
    assert f"'t' ({tiny.token_to_id('t')}), 'he' ({tiny.token_to_id('he')})" in str(caught.value)
    with pytest.raises(InputError, match="empty"):
        tiny.single_token("")


def test_saved_truncation_and_padding_are_switched_off():
    backend = tiny_backend()
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=64)
    assert len(OPTTokenizer.from_tokenizers(backend).encode("abcdefg")) == 8
    assert backend.truncation is not None  # the caller's own is left as it was


# --- labels and text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (" cat", ["·cat"]),
        ("\n\t\r", ["↵", "⇥", "␍"]),
        ("\x00\x7f", ["␀", "␡"]),
        ("é", ["⟨C3⟩", "⟨A9⟩"]),
        ("漢", ["⟨E6⟩", "⟨BC⟩", "⟨A2⟩"]),
        ("🙂", ["⟨F0⟩", "⟨9F⟩", "⟨99⟩", "⟨82⟩"]),
        ("</s><pad>", ["</s>", "<pad>"]),
    ],
)
def test_labels(tiny, text, labels):
    assert tiny.display_tokens(tiny.encode(text, prepend_bos=False)) == labels


@needs_true_files
def test_labels_of_true_fragments(opt):
    ids = opt.encode(" 漢字 “hi” 🙂", prepend_bos=False)
    labels = opt.display_tokens(ids)
    assert labels[:5] == ["·⟨E6⟩", "⟨BC⟩", "⟨A2⟩", "⟨E5 AD⟩", "⟨97⟩"]
    assert len(labels) == len(ids) and "·⟨E2 80⟩" in labels
    # A text token keeps its blank: what is drawn as · is a space in the prompt.
    assert opt.to_str_tokens(ids)[0] == " ⟨E6⟩"
    assert opt.decode(ids) == " 漢字 “hi” 🙂"


def test_invisible_tokens_are_labelled():
    backend = tiny_backend()
    backend.add_tokens(["\u200b", "\u0301", "a\u00a0b", "éé"])
    tokenizer = OPTTokenizer.from_tokenizers(backend)
    first = tokenizer.token_to_id("\u200b")
    labels = tokenizer.display_tokens(range(first, first + 4))
    assert labels == ["⟨U+200B⟩", "◌\u0301", "a⟨U+00A0⟩b", "éé"]
    assert tokenizer.decode(range(first, first + 4)) == "\u200b\u0301a\u00a0béé"


def test_a_token_without_characters_is_seen():
    vocab = {**tiny_backend().get_vocab(), "": 270}
    backend = tiny_backend()
    backend.model = models.BPE(vocab=vocab, merges=[])
    assert OPTTokenizer.from_tokenizers(backend).display(270) == "∅"


def test_ids_without_a_token(tiny):
    assert tiny.decode([2, 277]) == "</s>⟨277⟩"
    assert tiny.decode([2, 277], skip_special=True) == ""
    assert tiny.to_str_tokens(torch.tensor([277])) == tiny.display_tokens([277]) == ["⟨277⟩"]


def test_ids_that_no_model_has(tiny):
    with pytest.raises(InputError, match="-1"):
        tiny.decode([-1])
    rows = OPTTokenizer(tiny_backend(), n_rows=272)
    assert rows.decode(271) == "⟨271⟩"
    with pytest.raises(InputError, match="no token id 272; ids go from 0 to 271"):
        rows.display(272)


def test_decode_joins_what_fragments_belong_together(tiny):
    text = "  the cat\n漢 🙂 </s>"
    ids = tiny.encode(text)
    assert tiny.decode(ids) == "</s>" + text
    assert tiny.decode(torch.tensor(ids), skip_special=True) == text.removesuffix("</s>")
    assert tiny.decode(ids[:-4]) == "</s>  the cat\n漢 \ufffd"


# --- padding -------------------------------------------------------------------------------------


def test_padding_left_and_right(tiny):
    ids, mask = tiny.pad([[2, 10, 11], [2]])
    assert ids.tolist() == [[2, 10, 11], [1, 1, 2]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64
    ids, mask = tiny.pad([[2, 10, 11], [2]], side="right")
    assert ids.tolist() == [[2, 10, 11], [2, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_padding_refuses_nothing_to_pad(tiny):
    with pytest.raises(InputError, match="list of prompts is empty"):
        tiny.pad([])
    with pytest.raises(InputError, match="Prompt 1 is empty"):
        tiny.pad([[2], []])
    with pytest.raises(ValueError, match='"left" or "right", got \'both\''):
        tiny.pad([[2]], side="both")


# --- the model's methods -------------------------------------------------------------------------


def test_to_tokens_of_a_string_and_a_list(tiny):
    model = Holder(tiny)
    assert model.to_tokens("the cat").tolist() == [tiny.encode("the cat")]
    assert model.to_tokens("cat", prepend_bos=False).tolist() == [[tiny.single_token("cat")]]
    cat, the = tiny.single_token(" cat"), tiny.single_token(" the")
    tokens, mask = model.to_tokens_and_mask([" the cat", " cat"])
    assert tokens.tolist() == [[2, the, cat], [1, 2, cat]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert model.to_tokens([" the cat", " cat"]).tolist() == tokens.tolist()
    tokens, mask = model.to_tokens_and_mask([" the", " cat"])
    assert tokens.tolist() == [[2, the], [2, cat]] and mask is None


def test_token_tensors_pass_through(tiny):
    model = Holder(tiny)
    for given_ids, expected in (
        (torch.tensor([2, 7]), [[2, 7]]),
        (torch.tensor([[2, 7]], dtype=torch.int32), [[2, 7]]),
    ):
        tokens, mask = model.to_tokens_and_mask(given_ids)
        assert tokens.tolist() == expected and mask is None and tokens.dtype == torch.int64
    assert Holder(None).to_tokens(torch.tensor([2, 7])).tolist() == [[2, 7]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([2.0]), "whole numbers"),
        (torch.tensor([True]), "whole numbers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"\[batch, pos\]"),
        (torch.zeros(0, dtype=torch.long), "empty"),
        (torch.zeros(2, 0, dtype=torch.long), "empty"),
        (torch.tensor([2, 280]), "280.*position 1"),
        (torch.tensor([-1]), "-1"),
    ],
)
def test_bad_token_tensors(tiny, tokens, message):
    with pytest.raises(InputError, match=message):
        Holder(tiny).to_tokens_and_mask(tokens)


def test_empty_prompts(tiny):
    model = Holder(tiny)
    assert model.to_tokens("").tolist() == [[2]]  # as in TransformerLens: </s> alone
    assert model.to_tokens_and_mask(["", "cat"])[1].tolist() == [[0, 1], [1, 1]]
    for prompt in ("", [""], ["cat", ""]):
        with pytest.raises(InputError, match="empty"):
            model.to_tokens(prompt, prepend_bos=False)
    with pytest.raises(InputError, match="empty"):
        model.to_tokens([])


@pytest.mark.parametrize("prompt", [None, 7, [2, 7], ["cat", 7], {"a": 1}])
def test_what_is_no_prompt(tiny, prompt):
    with pytest.raises(TypeError, match="string, a list of strings or a tensor"):
        Holder(tiny).to_tokens(prompt)


def test_tokens_go_to_the_models_device(tiny):
    model = Holder(tiny)
    model.device = torch.device("meta")
    tokens, mask = model.to_tokens_and_mask(["cat", "the cat"])
    assert tokens.device.type == mask.device.type == "meta"


def test_to_string_and_back(tiny):
    model = Holder(tiny)
    assert model.to_string(model.to_tokens("the cat")) == ["</s>the cat"]
    assert model.to_string(torch.tensor([2, 7])) == tiny.decode([2, 7])
    assert model.to_string(torch.tensor(2)) == model.to_string(2) == "</s>"
    assert model.to_string([torch.tensor([2]), torch.tensor([1, 2])]) == ["</s>", "<pad></s>"]
    assert model.to_string([]) == ""


def test_to_str_tokens(tiny):
    model = Holder(tiny)
    assert model.to_str_tokens(" the cat") == ["</s>", " the", " cat"]
    assert model.to_str_tokens(" cat", prepend_bos=False) == [" cat"]
    # Each prompt has its own list: no padding among the labels.
    assert model.to_str_tokens([" the cat", " cat"]) == [["</s>", " the", " cat"], ["</s>", " cat"]]
    assert model.to_str_tokens(torch.tensor([[2, 277]])) == ["</s>", "⟨277⟩"]
    assert model.to_str_tokens(torch.tensor([[2], [1]])) == [["</s>"], ["<pad>"]]


def test_to_single_token(tiny):
    assert Holder(tiny).to_single_token(" cat") == tiny.token_to_id("Ġcat")
    with pytest.raises(InputError, match="expected one"):
        Holder(tiny).to_single_token(" cats")


@pytest.mark.parametrize("method", ["to_tokens", "to_str_tokens", "to_single_token"])
def test_text_without_a_tokenizer(method):
    with pytest.raises(InputError, match="no tokenizer.*from_folder"):
        getattr(Holder(None), method)("cat")
    with pytest.raises(InputError, match="no tokenizer"):
        Holder(None).to_string([2])


def test_a_vocabulary_larger_than_the_models_embedding(tiny):
    assert Holder(tiny, vocab_size=266).to_tokens("cat").shape == (1, 2)
    with pytest.raises(ValueError, match="ids up to 265, the model's embedding only 265 rows"):
        Holder(tiny, vocab_size=265).to_tokens("cat")
