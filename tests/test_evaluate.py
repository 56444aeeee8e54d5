"""Perplexity: the protocol as stated, equal to a loop over transformers, resumed without a trace, refusing what cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from conftest import random_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from twins import examples, twin_of

import optlens
from optlens import Ablate, evaluate
from optlens.checks import InputError
from optlens.evaluate import _plan, perplexity
from optlens.window_log import Window, WindowLog

TOKENS = torch.randint(3, 101, (151,), generator=torch.manual_seed(5))
TEXT = "The cat sat on the mat. Then Mary gave the ball to John, and John was happy. " * 4


@pytest.fixture(scope="module")
def model():
    return optlens.load()


@pytest.fixture
def tiny():
    return random_model(tiny_config(), torch.float64)


@torch.no_grad()
def loop(twin: Any, ids: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    """The sliding window as transformers' documentation writes it: sum of nats, and tokens scored."""
    nats, scored, before = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        end = min(start + window, ids.shape[1])
        part = ids[:, start:end]
        labels = part.clone()
        labels[:, : -(end - before)] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            nats += twin(part, labels=labels).loss.item() * count
        scored, before = scored + count, end
        if end == ids.shape[1]:
            return nats, scored


# --- the protocol --------------------------------------------------------------------------------------------------------


@given(n=st.integers(2, 150), window=st.integers(2, 64), data=st.data(), batch=st.integers(1, 5))
@examples(40)
def test_equal_to_a_loop_over_transformers(n, window, data, batch):
    stride = data.draw(st.integers(1, window))
    tiny = random_model(tiny_config(), torch.float64)
    result = perplexity(tiny, TOKENS[:n], window, stride, batch_size=batch)
    ids = torch.cat([torch.tensor([2]), TOKENS[:n]])[None]
    nats, scored = loop(twin_of(tiny), ids, window, stride)
    assert result.tokens == scored
    assert result.nats == pytest.approx(nats, rel=1e-6)  # their float64 loss is rounded to float32
    assert result.perplexity == pytest.approx(math.exp(nats / scored), rel=1e-5)


@given(n=st.integers(1, 80), window=st.integers(2, 20), data=st.data())
@examples(200)
def test_every_token_is_scored_once_with_its_context(n, window, data):
    bos = data.draw(st.sampled_from(["text", "window", "none"]))
    room = window - (bos == "window")
    stride = data.draw(st.integers(1, room))
    plan = _plan(n, window, stride, bos)
    scored = [i for each in plan for i in range(each.end - each.scored, each.end)]
    assert len(set(scored)) == len(scored) and scored == sorted(scored)
    without_context = (
        set() if bos == "window" else set(range(0, n, stride)) if stride == window else {0}
    )
    assert set(range(n)) - set(scored) == without_context
    for each in plan:
        assert each.end - each.start <= room
        context = each.end - each.scored - each.start
        assert each.start == 0 or context >= room - stride


def test_bos_stands_where_it_is_said(tiny):
    """Compared with one plain pass over each window, `</s>` in front or not."""

    def nats(ids: torch.Tensor, count: int) -> float:
        return tiny.loss(ids, per_token=True)[0, -count:].sum().item()

    bos, ids = torch.tensor([2]), TOKENS[:20]
    text = torch.cat([bos, ids])
    expected = nats(text[:12], 11) + nats(text[6:18], 6) + nats(text[12:], 3)
    assert perplexity(tiny, ids, 12, 6).nats == pytest.approx(expected, rel=1e-12)
    assert perplexity(tiny, text, 12, 6).nats == pytest.approx(expected, rel=1e-12)  # never twice
    expected = nats(ids[:12], 11) + nats(ids[6:18], 6) + nats(ids[12:], 2)
    assert perplexity(tiny, ids, 12, 6, bos="none").nats == pytest.approx(expected, rel=1e-12)
    windows = [torch.cat([bos, ids[at : at + 11]]) for at in (0, 6, 12)]
    expected = nats(windows[0], 11) + nats(windows[1], 6) + nats(windows[2], 3)
    result = perplexity(tiny, ids, 12, 6, bos="window")
    assert result.nats == pytest.approx(expected, rel=1e-12) and result.tokens == 20
    assert [window for window, _ in result.windows] == [(0, 11, 11), (6, 17, 6), (12, 20, 3)]


def test_batches_give_the_same(model):
    alone = perplexity(model, TEXT, window=16, stride=5)
    for size in (2, 7, 100):
        together = perplexity(model, TEXT, window=16, stride=5, batch_size=size)
        assert together.tokens == alone.tokens
        assert together.nats == pytest.approx(alone.nats, rel=1e-5)


def test_many_positions_at_once_give_the_same(tiny, monkeypatch):
    whole = perplexity(tiny, TOKENS, 64, 64)
    monkeypatch.setattr(evaluate, "_POSITIONS_AT_ONCE", 5)
    assert perplexity(tiny, TOKENS, 64, 64).nats == pytest.approx(whole.nats, rel=1e-12)


def test_the_numbers_of_a_result(model):
    result = perplexity(model, TEXT)
    assert result.settings["window"] == 512 and result.settings["stride"] == 256
    assert result.tokens == model.to_tokens(TEXT).shape[1] - 1 and len(result.windows) == 1
    assert result.nats_per_token == pytest.approx(model.loss(TEXT).item(), rel=1e-5)
    assert result.n_bytes == len(TEXT.encode())
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / len(TEXT))
    assert f"perplexity {result.perplexity:.4f} (" in str(result) and "bits per byte" in str(result)
    frame = perplexity(model, TEXT, window=32).to_dataframe()
    assert list(frame.columns) == ["start", "end", "scored", "nats", "perplexity"]
    assert frame.scored.sum() == result.tokens


def test_bytes_are_those_of_the_scored_tokens(model):
    """Whatever characters are cut in two by the tokenizer or by the windows."""
    text = "naïve 我们 🎈 </s> Ŀ\n\tend"
    assert perplexity(model, text).n_bytes == len(text.encode())
    ids = model.to_tokens(text, prepend_bos=False)[0]
    first = len(model.tokenizer.bytes_of(int(ids[0])))
    assert perplexity(model, text, bos="none").n_bytes == len(text.encode()) - first
    tiny = random_model(tiny_config())
    assert perplexity(tiny, TOKENS).bits_per_byte is None
    tiny.tokenizer = SimpleNamespace(bytes_of=lambda index: "é".encode())
    assert perplexity(tiny, TOKENS).n_bytes == 2 * len(TOKENS)
    tiny.tokenizer = SimpleNamespace(bytes_of=lambda index: None)  # ids that no token has
    assert perplexity(tiny, TOKENS).bits_per_byte is None


def test_a_file_gives_what_its_text_gives(model, tmp_path):
    path = tmp_path / "with a space.txt"
    path.write_text(TEXT, encoding="utf-8")
    expected = perplexity(model, TEXT).nats
    assert perplexity(model, path).nats == perplexity(model, str(path)).nats == expected


def test_what_is_attached_acts_and_training_mode_does_not(model):
    clean = perplexity(model, TEXT).perplexity
    with model.intervene(Ablate("z", layer=1, mode="zero")):
        assert abs(perplexity(model, TEXT).perplexity / clean - 1) > 0.01
    noisy = random_model(tiny_config(dropout=0.5))
    quiet = perplexity(noisy, TOKENS[:40]).nats
    assert perplexity(noisy.train(), TOKENS[:40]).nats == quiet and noisy.training


# --- going on ------------------------------------------------------------------------------------------------------------


class Stop:
    """Let a model run so many times, then interrupt as a user would."""

    def __init__(self, model: Any, runs: int) -> None:
        self.left, self.handle = runs, model.register_forward_pre_hook(self)

    def __call__(self, module: Any, inputs: Any) -> None:
        if self.left == 0:
            self.handle.remove()
            raise KeyboardInterrupt
        self.left -= 1


def test_an_interrupted_run_goes_on(tiny, tmp_path):
    expected = perplexity(tiny, TOKENS, 16, 4)
    path = tmp_path / "run.json"
    Stop(tiny, 10)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        perplexity(tiny, TOKENS, 16, 4, checkpoint=path)
    assert "Interrupted after 10 of 35 windows" in interrupt.value.__notes__[0]
    assert f"They are in {path}" in interrupt.value.__notes__[0]
    assert json.loads(path.read_text())["nats"] == [nats for _, nats in expected.windows[:10]]
    Stop(tiny, 25)  # no more runs than are left
    again = perplexity(tiny, TOKENS, 16, 4, checkpoint=path)
    assert again.windows == expected.windows and again.nats == expected.nats
    tiny._forward_pre_hooks.clear()
    Stop(tiny, 0)  # none at all when all is done
    assert perplexity(tiny, TOKENS, 16, 4, checkpoint=path).nats == expected.nats
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_without_a_file_an_interrupted_run_says_how_far_it_came(tiny):
    Stop(tiny, 3)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        perplexity(tiny, TOKENS, 16, 4)
    assert "after 3 of 35 windows (perplexity" in interrupt.value.__notes__[0]
    assert "With checkpoint= the same call would go on" in interrupt.value.__notes__[0]


def test_the_file_is_written_on_the_way(tiny, tmp_path, monkeypatch):
    """A machine that stops for good loses no more than `save_every` seconds."""
    written = []
    save = WindowLog.save
    monkeypatch.setattr(
        WindowLog, "save", lambda self: (save(self), written.append(len(self.nats)))
    )
    perplexity(tiny, TOKENS, 16, 16, checkpoint=tmp_path / "run.json", save_every=0)
    assert written == [*range(1, 11), 10]
    written.clear()
    perplexity(tiny, TOKENS, 16, 8, checkpoint=tmp_path / "other.json", save_every=1000)
    assert len(written) == 1


def test_a_file_of_another_run_is_refused(tiny, tmp_path):
    path = tmp_path / "run.json"
    perplexity(tiny, TOKENS, 16, 4, checkpoint=path)
    before = path.read_bytes()
    other = random_model(tiny_config(), torch.float64, seed=1)
    adapted = random_model(tiny_config(), torch.float64)
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=["q_proj"]), adapted)
    for name, call in {
        "stride": (tiny, TOKENS, 16, 5),
        "window": (tiny, TOKENS, 17, 4),
        "text": (tiny, TOKENS[1:], 16, 4),
        "model": (other, TOKENS, 16, 4),
        "dtype": (random_model(tiny_config()), TOKENS, 16, 4),
        "adapters": (adapted, TOKENS, 16, 4),
    }.items():
        with pytest.raises(ValueError, match=f"belongs to another run: it differs in .*{name} "):
            perplexity(*call, checkpoint=path)
    with pytest.raises(ValueError, match="differs in bos"):
        perplexity(tiny, TOKENS, 16, 4, bos="none", checkpoint=path)
    with tiny.intervene(Ablate("z", layer=1, mode="zero")):
        with pytest.raises(ValueError, match="differs in interventions"):
            perplexity(tiny, TOKENS, 16, 4, checkpoint=path)
    assert path.read_bytes() == before
    kind = '{"kind": "optlens perplexity"'
    for content, message in (
        ("{", "is damaged or no checkpoint"),
        ("[]", "is no checkpoint of"),
        (f"{kind}}}", "is damaged: it lacks settings or nats"),
        (f'{kind}, "settings": [], "nats": []}}', "is damaged: it lacks settings or nats"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            perplexity(tiny, TOKENS, 16, 4, checkpoint=path)


def test_a_file_that_could_not_be_written_is_refused_before_anything_runs(tiny, tmp_path):
    handle = tiny.register_forward_pre_hook(lambda module, inputs: pytest.fail("it ran"))
    with pytest.raises(FileNotFoundError, match="there is no folder .*missing; create it first"):
        perplexity(tiny, TOKENS, 16, 4, checkpoint=tmp_path / "missing" / "run.json")
    with pytest.raises(IsADirectoryError, match="it is a folder; name a file in it"):
        perplexity(tiny, TOKENS, 16, 4, checkpoint=tmp_path)
    handle.remove()


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 65}, "window=65 must be 2 to 64, the number of this model's positions"),
        ({"window": 1}, "window=1 must be 2 to 64"),
        (
            {"window": 8, "stride": 9},
            "stride=9 is longer than the 8 tokens of text in a window of 8",
        ),
        ({"window": 8, "stride": 8, "bos": "window"}, "stride=8 is longer than the 7 tokens"),
        ({"stride": 0}, "stride must be a positive whole number, got 0"),
        ({"window": 8.0}, "window must be a positive whole number, got 8.0"),
        ({"batch_size": 0}, "batch_size must be a positive whole number"),
        ({"bos": "front"}, 'bos must be "text", "window" or "none", got \'front\''),
    ],
)
def test_settings_that_cannot_be(tiny, options, message):
    with pytest.raises(InputError, match=message):
        perplexity(tiny, TOKENS, **options)


def test_texts_that_cannot_be_scored(model, tiny, tmp_path):
    for empty in ("", TOKENS[:0]):
        with pytest.raises(InputError, match="empty"):
            perplexity(model, empty)
    with pytest.raises(InputError, match="nothing to score: the text is a single token"):
        perplexity(tiny, TOKENS[:1], bos="none")
    with pytest.raises(
        FileNotFoundError, match=r"Cannot read missing\.txt: .* pass model.to_tokens"
    ):
        perplexity(model, "missing.txt")
    with pytest.raises(FileNotFoundError, match="Cannot read .*missing.txt"):
        perplexity(model, Path(tmp_path, "missing.txt"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match="The text is empty"):
        perplexity(model, tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match=r"is no UTF-8 text \(byte 3 is 0xE9\)"):
        perplexity(model, tmp_path / "latin.txt")
    with pytest.raises(InputError, match=r"must have shape \[pos\], got \(1, 151\)"):
        perplexity(tiny, TOKENS[None])
    with pytest.raises(InputError, match="An OPTModel predicts no tokens; use an OPTForCausalLM"):
        perplexity(tiny.model, TOKENS)
    with pytest.raises(InputError, match="no tokenizer"):
        perplexity(tiny, "some text")
    with pytest.raises(TypeError, match="Expected a text, a file or token ids, got a list"):
        perplexity(model, ["a", "b"])


def test_a_window_is_read_by_name():
    assert Window(0, 8, 7)._asdict() == {"start": 0, "end": 8, "scored": 7}
