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


def sections() -> dict[str, str]:
    """Return the Python code below each heading; the blocks follow on one another, as in a notebook."""
    parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)[1:]
    code = zip(parts[::2], map("\n".join, map(python_in, parts[1::2])), strict=True)
    return {heading: block for heading, block in code if block}


def python_in(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def shows_ten_lines(names, printed, folder):
    assert printed.count("\n") == 2 + len(names["lens"].labels) + 1
    assert (folder / "recording.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (names["logits"][0] - names["rec"].logits).abs().max() > 0


def shows_views(names, printed, folder):
    assert names["heads"].selected["layer"] == 3
    assert printed.startswith("now at {'prompt': 0, 'layer': 3, ")
    assert (folder / "heads.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def shows_stages(names, printed, folder):
    assert names["drawn"].selected["layer"] == names["heads"].selected["layer"] == 3
    assert "blocks.3.attn.hook_z" in names["drawn"]._parts[0].measured[0]
    assert (folder / "model.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def shows_a_cause(names, printed, folder):
    assert names["result"].normalized.max() > 0.3  # some head brings a good part of the answer back


def shows_who_wrote(names, printed, folder):
    assert abs(names["parts"].error) < 1e-4
    assert any(edge.part.startswith("L") for edge in names["ways"].routes())


def shows_neurons(names, printed, folder):
    assert "[·to]" in printed
    assert names["difference"].changed[-1]


def shows_writing(names, printed, folder):
    assert names["text"].startswith("Once upon a time") and len(names["text"]) > 40
    assert " dog" in names["other"].texts[0] and names["result"].recording.attention.shape[0] > 1


def shows_streaming(names, printed, folder):
    assert "streamed from disk" in str(names["streamed"].placement)


def shows_training(names, printed, folder):
    first, second = map(float, re.findall(r"^perplexity (\S+)", printed, re.MULTILINE))
    assert second < first / 2


SHOWS = {
    "Ten lines": shows_ten_lines,
    "See it in a notebook": shows_views,
    "The model, stage by stage": shows_stages,
    "What causes the answer": shows_a_cause,
    "Who wrote the answer": shows_who_wrote,
    "Neurons, and two runs side by side": shows_neurons,
    "Writing on": shows_writing,
    "Models larger than the machine": shows_streaming,
    "Train it, and look again": shows_training,
}


def test_the_python_blocks_run_and_show_something(tmp_path, monkeypatch, capsys):
    assert list(sections()) == list(SHOWS)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for heading, code in sections().items():
        exec(compile(code, f"README.md, {heading}", "exec"), names)
        SHOWS[heading](names, capsys.readouterr().out, tmp_path)


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
