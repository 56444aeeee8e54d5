"""`optlens generate` prints the text alone; everything else goes to standard error."""

from __future__ import annotations

import optlens
import optlens.generation.decode
from optlens import cli

PROMPT = "Once upon a time"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["generate", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_it_prints_the_text(capsys):
    expected = optlens.load().generate(PROMPT, 12)
    status, out, err = run(capsys, PROMPT, "--max-new-tokens", "12")
    assert (status, out) == (0, expected + "\n")
    assert "12 new tokens, end: length" in err and "seed" not in err
    assert run(capsys, PROMPT, "--max-new-tokens", "12", "--stream")[:2] == (0, expected + "\n")


def test_options_reach_the_model(capsys):
    model = optlens.load()
    sample = model.generate(PROMPT, 9, seed=3, temperature=1.5, top_k=20, top_p=0.9)
    asked = ["--seed", "3", "--temperature", "1.5", "--top-k", "20", "--top-p", "0.9"]
    for more in ([], ["--stream"]):
        status, out, err = run(capsys, PROMPT, "--max-new-tokens", "9", *asked, *more)
        assert (status, out) == (0, sample + "\n") and "seed 3" in err
    stop = model.generate(PROMPT, 4)[-3:]
    out = run(capsys, PROMPT, "--max-new-tokens", "9", "--num-beams", "3", "--stop", stop)[1]
    assert out == model.generate(PROMPT, 9, num_beams=3, stop_strings=stop) + "\n"
    out = run(capsys, PROMPT, "--max-new-tokens", "9", "--stop", stop, "--stop", "?")[1]
    assert out == model.generate(PROMPT, 4) + "\n" != model.generate(PROMPT, 9) + "\n"


def test_mistakes_are_one_sentence(capsys):
    for arguments, message in (
        (["--temperature", "0"], "temperature must be a number above 0"),
        (["--max-new-tokens", "100000"], "has positions for"),
        (["--dtype", "float8"], "--dtype float8: choose one of auto, float32"),
        (["--stream", "--num-beams", "2"], "stream writes one text"),
    ):
        status, out, err = run(capsys, PROMPT, *arguments)
        assert status == 2 and out == "" and message in err and "Traceback" not in err
    assert run(capsys, "")[0] == 2


def test_an_interrupt_keeps_what_is_written(capsys, monkeypatch, recwarn):
    real, steps = optlens.generation.decode.Decoding.step, []

    def stopping(self):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(optlens.generation.decode.Decoding, "step", stopping)
    outputs = []
    for more in (["--stream"], []):
        steps.clear()
        status, out, err = run(capsys, PROMPT, *more)
        assert status == 130 and "3 new tokens, end: interrupted" in err
        outputs.append(out)
    assert not recwarn.list  # said in a sentence, not as a warning with a line of code
    monkeypatch.undo()
    assert outputs == [optlens.load().generate(PROMPT, 3) + "\n"] * 2
