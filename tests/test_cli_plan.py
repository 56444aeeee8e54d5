import json

import pytest
from conftest import random_model, tiny_config

from optlens import plan
from optlens.cli import main
from optlens.config import SIZES


def test_a_model_is_planned_as_in_python(capsys):
    assert main(["plan", "opt-30b", "--memory", "cuda:0=24GiB, cpu=64GiB", "--tokens", "100"]) == 0
    memory = {"cuda:0": "24GiB", "cpu": "64GiB"}
    assert capsys.readouterr().out == f"{plan('opt-30b', device=memory, prompt_length=100)}\n"


def test_all_published_sizes(capsys):
    assert main(["plan", "--memory", "cpu=1TB", "--record", "--sweep"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "dtype", "weights", "KV", "cache", "activations", "recording",
                            "sweep", "needed", "placement"]  # fmt: skip
    assert [row.split()[0] for row in rows] == [f"opt-{size}" for size in SIZES]
    assert rows[0].split()[2:4] == ["501.0", "MB"]


def test_options_arrive(capsys, tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--memory", "cpu=1GB", "--dtype", "bfloat16", "--quantize"]
    command += ["int8", "--batch", "3", "--tokens", "9", "--record", "attention, z", "--sweep", "z"]
    assert main([*command, "--json"]) == 0
    expected = plan(
        tmp_path,
        device={"cpu": "1GB"},
        dtype="bfloat16",
        quantize="int8",
        batch=3,
        prompt_length=9,
        record=("attention", "z"),
        sweep="z",
    )
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected.to_dict()))
    assert main(["plan", "--json", "--memory", "cpu=1TB", "--device-map", "stream"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [each["placement"] for each in plans] == ["stream on cpu"] * len(SIZES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["opt-9b"], "no OPT named 'opt-9b' was published"),
        (["opt-13b", "--memory", "24GiB"], "give devices and sizes, as cuda:0=24GiB"),
        (["opt-13b", "--memory", "cpu=1GB", "--device", "cpu"], "exclude each other"),
        (["opt-13b", "--device", "cpu", "--tokens", "0"], "prompt of 1 to 2048 tokens"),
    ],
)
def test_wrong_words_are_explained(arguments: list[str], message: str, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
