"""A text of any length becomes windows: each token once, in order, the same from every source."""

from itertools import islice

import pytest
import torch
from conftest import random_model, tiny_config

import optlens
from optlens.checks import InputError
from optlens.neurons import windows
from optlens.neurons.windows import _pieces, batches, reading, watch

TEXT = """The cat sat on the mat.  It's   warm\t\tthere, isn't it?

Two  blank lines, then Müller's 中文 字 and 12 345 numbers </s> a special one.
 A line that begins with a blank, and ends so \n\n\n   \nThe end"""


@pytest.fixture(scope="module")
def demo():
    return optlens.load()


def cut(model, text, window=8, batch_size=3, prepend_bos=True):
    return list(batches(model, text, reading(model, window, batch_size, prepend_bos, False)))


def counted_tokens(found, document: int = 0) -> list[int]:
    """Return the counted tokens of a document, from all batches, by their place in it."""
    tokens = {}
    for batch in found:
        for row, pos in batch.counted.nonzero().tolist():
            if int(batch.documents[row]) == document:
                place = int(batch.starts[row]) + pos
                assert place not in tokens
                tokens[place] = int(batch.tokens[row, pos])
    return [tokens[place] for place in sorted(tokens)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 1000])
def test_pieces_have_the_tokens_of_the_whole_text(demo, monkeypatch, size):
    monkeypatch.setattr(windows, "PIECE", size)
    whole = demo.tokenizer.encode(TEXT, prepend_bos=False)
    assert counted_tokens(cut(demo, TEXT)) == whole


def test_text_is_cut_only_before_a_blank(monkeypatch):
    monkeypatch.setattr(windows, "PIECE", 4)
    parts = iter(["abcd", "efgh", " ijk", "   l", "mn"])
    assert list(_pieces(lambda size: next(parts, ""))) == ["abcdefgh", " ijk", "   lmn"]


def test_a_text_without_blanks_is_cut_somewhere(monkeypatch):
    monkeypatch.setattr(windows, "PIECE", 4)
    monkeypatch.setattr(windows, "LONGEST_WORD", 10)
    parts = iter(["abcd", "efgh", "ijkl", "mnop"])
    assert list(_pieces(lambda size: next(parts, ""))) == ["abcdefghijkl", "mnop"]


def test_every_window_begins_with_one_bos_that_is_not_counted(demo):
    found = cut(demo, TEXT, window=8)
    assert all((batch.tokens[:, 0] == 2).all() for batch in found)
    assert not any(batch.counted[:, 0].any() for batch in found)
    lengths = torch.cat([batch.lengths for batch in found]).tolist()
    assert set(lengths[:-1]) == {8}
    n_tokens = len(demo.tokenizer.encode(TEXT, prepend_bos=False))
    assert sum(lengths) == n_tokens + len(lengths)


def test_without_bos_every_token_is_a_windows_own(demo):
    ids = demo.tokenizer.encode("The cat sat on the mat and the dog ran.", prepend_bos=False)
    found = cut(demo, torch.tensor(ids), window=4, prepend_bos=False)
    assert counted_tokens(found) == ids
    assert found[0].tokens[0].tolist() == ids[:4]


def test_ids_that_begin_with_bos_get_no_second_one(demo):
    found = cut(demo, torch.tensor([2, 10, 11, 12]), window=3)
    assert [row.tolist() for batch in found for row in batch.tokens] == [[2, 10, 11], [2, 12, 2]]
    assert counted_tokens(found) == [10, 11, 12]
    assert found[0].starts.tolist() == [0, 2]  # so that 12 stands at place 3


def test_sources_of_one_text_agree(demo, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    whole = counted_tokens(cut(demo, TEXT))
    assert counted_tokens(cut(demo, file)) == whole
    with open(file, encoding="utf-8") as opened:
        assert counted_tokens(cut(demo, opened)) == whole
    assert counted_tokens(cut(demo, [TEXT])) == whole
    assert counted_tokens(cut(demo, torch.tensor(whole))) == whole


def test_documents_do_not_share_windows(demo):
    texts = ["The cat sat.", "A dog", "The cat sat on the mat and the dog ran away."]
    found = cut(demo, texts)
    for number, text in enumerate(texts):
        assert counted_tokens(found, number) == demo.tokenizer.encode(text, prepend_bos=False)


def test_endless_documents_are_read_as_they_are_needed(demo):
    read = []

    def documents():
        while True:
            read.append(1)
            yield "The cat sat."

    how = reading(demo, 8, 4, True, False)
    first = list(islice(batches(demo, documents(), how), 2))
    assert [len(batch.tokens) for batch in first] == [4, 4]
    assert len(read) <= 9


def test_filling_changes_no_activation(variant):
    """Windows of other lengths beside it leave a window's activations as they are alone."""
    model = random_model(tiny_config(**variant), torch.float64)
    rows = torch.randint(3, 101, (19,), generator=torch.Generator().manual_seed(1))
    seen = {}

    def see(row, activations, batch):
        for i, length in enumerate(batch.lengths.tolist()):
            seen[int(batch.starts[i]), row] = activations[i, :length]

    how = reading(model, 8, 8, True, False)
    assert watch(model, rows, [0, 1], list(range(64)), how, see) == 19
    for (start, layer), values in seen.items():
        own = torch.cat([torch.tensor([2]), rows[start + 1 : start + 8]])
        _, cache = model.run_with_cache(own[None])
        expected = cache["mlp_post", layer][0].detach().float()
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


def test_layers_behind_the_last_chosen_one_are_not_run(demo):
    ran = []
    with demo.hooks(fwd_hooks=[(f"blocks.{i}.hook_resid_post", lambda x, hook: ran.append(hook.layer())) for i in range(5)]):  # fmt: skip
        watch(demo, "The cat", [1], [0], reading(demo, 8, 1, True, False), lambda *seen: None)
    assert ran == [0, 1]


def test_training_mode_and_gradients_are_as_before():
    """Dropout is off while neurons are watched, and on again behind it."""
    model = random_model(tiny_config(dropout=0.5))
    seen = []
    for mode in (True, False):
        model.train(mode)
        how = reading(model, 8, 1, True, False)
        watch(model, torch.arange(3, 9), [1], [0], how, lambda *given: seen.append(given[1]))
        assert model.training is mode and torch.is_grad_enabled()
    assert torch.equal(*seen)
    assert not any(point.recorders for point in model.hook_dict.values())


def test_progress_is_shown_only_if_asked_for(demo, capfd):
    for progress in (True, False):
        how = reading(demo, 8, 1, True, progress)
        watch(demo, "The cat", [0], [0], how, lambda *seen: None)
        assert ("token" in capfd.readouterr().err) is progress


@pytest.mark.parametrize("text", ["", [], ["", ""], torch.tensor([2])])
def test_a_text_without_tokens_is_refused(demo, text):
    with pytest.raises(InputError, match="no tokens to count"):
        watch(demo, text, [0], [0], reading(demo, 8, 1, True, False), lambda *seen: None)


def test_options_that_fit_no_run_are_refused(demo):
    with pytest.raises(InputError, match="window=513 does not fit: this model reads 2 to 512"):
        reading(demo, 513, 1, True, False)
    with pytest.raises(InputError, match="window=1 "):
        reading(demo, 1, 1, True, False)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        reading(demo, 8, 0, True, False)


def test_what_is_no_text_is_refused(demo, tmp_path):
    with pytest.raises(TypeError, match="Document 1 is an int, expected text"):
        cut(demo, ["The cat", 3])
    with pytest.raises(TypeError, match="got an int"):
        cut(demo, 3)
    with pytest.raises(InputError, match="Token id 9999"):
        cut(demo, torch.tensor([9999]))
    damaged = tmp_path / "latin.txt"
    damaged.write_bytes("Müller".encode("latin-1"))
    with pytest.raises(InputError, match="latin.txt is not UTF-8 text.*encoding="):
        cut(demo, damaged)
    with pytest.raises(InputError, match="no tokenizer"):
        cut(random_model(tiny_config()), "The cat")
