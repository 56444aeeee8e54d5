"""`optlens patch`: what it prints and writes, how it takes answers, what it refuses."""

import dataclasses
import json
import re

import pytest
import torch
from sweep_results import HOSTILE, make_result

import optlens
from optlens import cli, cli_patch, metrics
from optlens.metric_targets import as_answer
from optlens.patching import PatchResult
from optlens.report.sweep_facts import gather_sweep
from optlens.report.sweep_terminal import text_of_sweep
from optlens.report.terminal import columns

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
PATCH = ["patch", CLEAN, CORRUPT]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def expected():
    """What the library gives for the same: resid_pre by layer and position."""
    metric = metrics.logit_diff(" Mary", " John")
    return optlens.patch_sweep(optlens.load(), CLEAN, CORRUPT, metric=metric, progress=False)


def run(capsys, *arguments: str) -> tuple[str, str]:
    assert cli.main([*PATCH, *arguments]) == 0
    return capsys.readouterr()


# --- what it prints and writes -------------------------------------------------------------------


def test_table_has_layers_down_and_positions_across(capsys, expected, tmp_path):
    out, err = run(capsys, "--answer", " Mary", "--wrong", " John")
    lines = out.splitlines()
    assert "Differ    11: ·John / ·Mary" in lines
    assert f"  clean     {expected.clean:>10.4g}" in lines
    assert f"  corrupt   {expected.corrupt:>10.4g}" in lines
    assert "positions 0 to 10 change nothing" in lines
    head = next(at for at, line in enumerate(lines) if line.startswith("layer"))
    assert lines[head - 1].split() == ["11", "12", "13", "14", "15"]
    assert lines[head].split() == ["layer", "·Mary", "·gave", "·a", "·drink", "·to"]
    for layer in range(5):
        shown = [float(word) for word in lines[head + 1 + layer].split()]
        assert shown[0] == layer
        wanted = expected.normalized[layer, 11:].tolist()
        assert shown[1:] == pytest.approx(wanted, abs=0.0051)
    best = int(expected.normalized.argmax())
    strongest = next(at for at, line in enumerate(lines) if line.startswith("Strongest"))
    assert lines[strongest + 1].startswith(f"  layer {best // 16}, position {best % 16} ·Mary")
    assert re.fullmatch(r"80 patches in \d+\.\d\d s", lines[-1])
    assert "\x1b" not in out and "patching: " in err
    assert list(tmp_path.iterdir()) == []


def test_without_answers_the_two_predictions_are_compared(capsys):
    out, err = run(capsys)
    assert "logit_diff(' Mary', ' John')" in out
    assert "--answer: ' Mary', the prediction" in err
    assert "--wrong: ' John', the prediction" in err


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        ([], "resid_pre by layer and position"),
        (["--site", "z"], "z by layer and head"),
        (["--site", "embed"], "embed by position"),
        (["--site", "attn_out,mlp_out"], "attn_out, mlp_out by site, layer and position"),
        (["--site", "z", "--over", "head, layer"], "z by head and layer"),
    ],
)
def test_axes_suit_the_site_unless_given(arguments, title, capsys):
    assert f"Activation patching: {title}" in run(capsys, *arguments)[0]


def test_the_neurons_that_matter_are_chosen(capsys):
    metric = metrics.logit_diff(" Mary", " John")
    over = ("layer", "neuron")
    wanted = optlens.patch_sweep(
        optlens.load(), CLEAN, CORRUPT, "mlp_post", over, metric, top_neurons=6, progress=False
    )
    chosen = ["--site", "mlp_post", "--top-neurons", "6"]
    data = json.loads(run(capsys, *chosen, "--json")[0])
    assert data["axes"]["neuron"] == [str(number) for number in wanted.choices["neuron"]]
    torch.testing.assert_close(torch.tensor(data["values"]), wanted.values)
    out, _ = run(capsys, *chosen, "--over", "neuron,layer", "--dry-run")
    assert out.startswith("30 patches")


def test_noise_goes_the_other_way(capsys):
    out, _ = run(capsys, "--direction", "noise", "--over", "layer")
    assert "1: nothing is lost" in out
    assert "layer 0" in out


def test_page_and_result_are_written_with_the_tokens(capsys, expected, tmp_path):
    out, _ = run(capsys, "--html", "p.html", "--save", "r.safetensors")
    assert out.splitlines()[-2:] == [
        f"Result:    {tmp_path / 'r.safetensors'}",
        f"Page:      {tmp_path / 'p.html'}",
    ]
    saved = PatchResult.load("r.safetensors")
    torch.testing.assert_close(saved.values, expected.values)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "·drink" in page and "⟨" not in page


def test_json_is_all_of_standard_output(capsys, expected):
    data = json.loads(run(capsys, "--json")[0])
    torch.testing.assert_close(torch.tensor(data["values"]), expected.values)
    torch.testing.assert_close(torch.tensor(data["normalized"]), expected.normalized)
    assert data["axes"]["layer"] == ["0", "1", "2", "3", "4"]
    assert data["clean"]["tokens"][11] == "·John" and data["corrupt"]["tokens"][11] == "·Mary"
    assert data["clean"]["metric"] == pytest.approx(expected.clean)
    assert data["strongest"][0]["index"] == [
        int(at) for at in torch.unravel_index(expected.normalized.argmax(), (5, 16))
    ]
    assert data["complete"] is True and data["html"] is None
    assert data["fingerprint"] == expected.metadata["model"]


def test_json_has_no_word_for_nan(capsys, monkeypatch):
    result = make_result("layer", "head")
    result.per_prompt[0] = torch.nan
    monkeypatch.setattr(cli_patch, "_sweep", lambda *_: result)
    assert cli.main([*PATCH, "--json"]) == 130
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert data["values"][0] == data["normalized"][0] == [None] * 4
    assert data["complete"] is False


def test_dry_run_says_what_it_would_cost(capsys):
    plan = optlens.patch_sweep(
        optlens.load(),
        CLEAN,
        CORRUPT,
        metric=metrics.logit_diff(" Mary", " John"),
        dry_run=True,
    )
    out, err = run(capsys, "--dry-run")
    assert out == f"{plan}\n" and "patching" not in err
    assert json.loads(run(capsys, "--dry-run", "--json")[0]) == dataclasses.asdict(plan)


def test_an_interrupted_sweep_shows_and_writes_what_it_found(capsys, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    assert cli.main([*PATCH, "--dry-run", "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["runs"]
    assert 0 < needed < 80
    monkeypatch.setattr("optlens.patching.wave.Wave.run", interrupt)
    assert cli.main([*PATCH, "--html", "p.html"]) == 130
    out, err = capsys.readouterr()
    assert f"NOT COMPLETE: {needed} of 80 patches not computed" in out
    assert f"{80 - needed} patches in" in out
    assert "interrupted; what was found by then follows" in err and "Warning" not in err
    assert "Not complete" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_nan_of_the_metric_is_no_interruption(capsys, monkeypatch):
    """All was computed: the status is 0, and it is said what NaN is."""

    def nothing(logits):
        return logits[:, -1, 0] * torch.nan

    monkeypatch.setattr(cli_patch, "_metric", lambda *_: nothing)
    assert cli.main([*PATCH, "--json"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out, parse_constant=pytest.fail)
    assert data["complete"] is True and data["values"][0] == [None] * 16
    assert "optlens: custom(nothing) is NaN, not a number, for 80 of 80 patches" in err
    assert "interrupted" not in err
    assert cli.main(PATCH) == 0
    assert "NOT COMPLETE" not in capsys.readouterr().out


def test_a_prompt_may_come_from_standard_input(capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(CORRUPT + "\n"))
    assert cli.main(["patch", CLEAN, "-", "--over", "layer"]) == 0
    assert "Differ    11: ·John / ·Mary" in capsys.readouterr().out


# --- answers -------------------------------------------------------------------------------------


def test_a_word_without_its_space_is_understood(capsys):
    out, err = run(capsys, "--answer", "Mary", "--wrong", "John", "--over", "layer")
    assert "logit_diff(' Mary', ' John')" in out
    assert "--answer 'Mary': taken as ' Mary'" in err
    assert "--wrong 'John': taken as ' John'" in err


def test_of_two_spellings_the_likelier_is_taken(capsys):
    model = optlens.load()
    both = [model.to_single_token(text) for text in ("s", " s")]
    for best in (0, 1):
        logits = torch.zeros(model.config.vocab_size)
        logits[both[best]] = 1.0
        assert cli_patch._answer(model, "s", "--answer", logits) == both[best]
        assert ("taken as" in capsys.readouterr().err) == (best == 1)
        assert cli_patch._answer(model, " s", "--answer", logits) == both[1]


def test_a_token_that_is_no_text_of_its_own_is_given_by_its_id():
    model = optlens.load()
    half = model.tokenizer.encode("é", prepend_bos=False)[0]
    assert as_answer(model, half) == half
    assert as_answer(model, model.to_single_token(" Mary")) == " Mary"


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patch", "", CORRUPT], "the clean prompt is empty"),
        (["patch", CLEAN, ""], "the corrupt prompt is empty"),
        (["patch", "-", "-"], "only one of the two prompts"),
        (
            [*PATCH, "--site", "residual"],
            "No site is called 'residual'; there are embed, resid_pre",
        ),
        ([*PATCH, "--over", "layer,"], '--over "layer,": give names'),
        ([*PATCH, "--over", "layer,head"], "a sweep over 'head' means nothing there"),
        ([*PATCH, "--over", "layer,token"], "names 'token'; the axes are"),
        ([*PATCH, "--site", "embed", "--over", "layer"], "comes once, not in every layer"),
        ([*PATCH, "--dry-run", "--html", "x.html"], "--dry-run finds nothing to write"),
        ([*PATCH, "--html", "a", "--save", "./a"], "--html and --save name one file"),
        ([*PATCH, "--html", "no_folder/x.html"], "no_folder"),
    ],
)
def test_what_is_wrong_at_once_is_found_before_loading(arguments, message, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.startswith("optlens: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patch", CLEAN, CLEAN], "the two prompts are the same"),
        ([*PATCH, "--answer", " John"], "--answer and --wrong are the same token, ' John'"),
        ([*PATCH, "--answer", " "], '--answer " ": give the token'),
        ([*PATCH, "--wrong", "Constantinople"], "--wrong: 'Constantinople' is 6 tokens (C | on |"),
        ([*PATCH, "--wrong", "Constantinople"], "try its first, ' C'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path):
    assert cli.main([*arguments, "--html", "p.html"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("optlens: ") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_prompts_of_unequal_length_are_shown_token_by_token(capsys):
    assert cli.main(["patch", CLEAN, CORRUPT + " Bob\x1b"]) == 2
    err = capsys.readouterr().err
    assert "have 16 and 19 tokens" in err
    assert "</s> | W | hen |  Mary" in err and "to |  B | ob | ⟨U+001B⟩" in err
    assert "\x1b" not in err, "a prompt's own escapes must not act"


def test_unknown_direction_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*PATCH, "--direction", "sideways"])
    assert stop.value.code == 2
    assert "denoise" in capsys.readouterr().err


# --- the text itself -----------------------------------------------------------------------------

SHAPES = [
    ("layer",),
    ("neuron",),
    ("layer", "pos"),
    ("layer", "neuron"),
    ("layer", "head", "pos"),
]


@pytest.mark.parametrize("width", [40, 64, 80, 200])
@pytest.mark.parametrize("axes", SHAPES, ids="-".join)
def test_no_line_is_wider_than_the_terminal(axes, width):
    result = make_result(*axes, labels=HOSTILE, prompts=3)
    result.per_prompt[0] = torch.nan
    text = text_of_sweep(gather_sweep(result), width)
    assert max(columns(line) for line in text.splitlines()) <= width
    assert not set(text) & {"\x1b", "\x00", "\u202e"}


def test_wide_tables_are_folded_and_lose_nothing():
    layers = gather_sweep(make_result("layer", "pos"))
    for width in (80, 40):
        text = text_of_sweep(layers, width)
        shown = [w for w in re.findall(r"-?\d\.\d\d\b", text.split("Strongest")[0])]
        assert sorted(map(float, shown)) == sorted(float(f"{v:.2f}") for v in layers.shown.flat)
    assert text_of_sweep(layers, 40).count("\nlayer ") == 2


def test_colour_marks_the_strong_and_takes_no_room():
    facts = gather_sweep(make_result("layer", "head"))
    plain, colored = text_of_sweep(facts, 80), text_of_sweep(facts, 80, color=True)
    assert re.search(r"\x1b\[33m +1\.00\x1b\[0m", colored)
    for code in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[33m"):
        colored = colored.replace(code, "")
    assert colored == plain


def test_what_is_left_out_is_said():
    text = text_of_sweep(gather_sweep(make_result("layer", "neuron")))
    assert "300 columns are too many for a table" in text and "layer 2, neuron 299" in text
    assert "300 rows are too many" in text_of_sweep(gather_sweep(make_result("neuron")))
    three = text_of_sweep(gather_sweep(make_result("layer", "head", "pos")))
    assert "each cell: the strongest over every position" in three


def test_a_terminal_without_the_glyphs_gets_ascii():
    text = text_of_sweep(gather_sweep(make_result("layer")), encoding="ascii")
    assert text.isascii() and "#" in text


def test_runs_that_hardly_differ_are_not_normalized():
    text = text_of_sweep(gather_sweep(make_result("layer", "head", corrupt=2.0)))
    assert "the runs hardly differ" in text and "change  logit_diff" in text


def test_an_ablation_has_one_run_and_no_corrupt_prompt():
    text = text_of_sweep(gather_sweep(make_result("layer", "head", corrupt=float("nan"))))
    assert text.startswith("Prompt   </s>".replace("   ", "    "))
    assert "  unpatched " in text and "orrupt" not in text
