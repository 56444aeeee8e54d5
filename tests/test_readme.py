"""The README keeps its word: its code runs, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from optlens import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_python_block_runs_and_shows_something(tmp_path, monkeypatch, capsys):
    code, patching, writing, tuning = blocks("python")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    rows = len(names["lens"].labels)
    assert printed.count("\n") == 2 + rows + 1
    assert (tmp_path / "recording.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (names["logits"][0] - names["rec"].logits).abs().max() > 0
    exec(compile(patching, "README.md", "exec"), names)
    assert names["result"].normalized.max() > 0.3  # some head brings a good part of the answer back
    exec(compile(writing, "README.md", "exec"), names)
    assert names["text"].startswith("Once upon a time") and len(names["text"]) > 40
    assert " dog" in names["other"].texts[0] and names["result"].recording.attention.shape[0] > 1
    capsys.readouterr()
    exec(compile(tuning, "README.md", "exec"), names)
    first, second = map(
        float, re.findall(r"^perplexity (\S+)", capsys.readouterr().out, re.MULTILINE)
    )
    assert second < first / 2


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake (?:[A-Z_]+=\S+ )*([a-z]+)", TEXT))
    assert {"demo", "test", "lab", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if "optlens " in line]
)
def test_command_lines_are_understood(line):
    program, *arguments = shlex.split(line, comments=True)
    assert program == "optlens"
    options = cli._parser().parse_args(arguments)
    assert options.run


def test_links_lead_to_files():
    found = re.findall(r"\]\(([^)]+)\)", TEXT) + re.findall(r'src(?:set)?="([^"]+)"', TEXT)
    links = [link for link in found if "://" not in link]
    assert len(links) >= 4
    sections = re.findall("^## (.*)$", TEXT, flags=re.MULTILINE)
    anchors = ["#" + section.lower().replace(" ", "-") for section in sections]
    for link in links:
        assert link in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_every_picture_of_the_readme_is_shown():
    for picture in (ROOT / "notebooks" / "images").glob("*.png"):
        assert f"notebooks/images/{picture.name}" in TEXT
