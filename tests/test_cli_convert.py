import hashlib
from pathlib import Path

import pytest
import torch
from conftest import random_model, tiny_config

from optlens import OPTForCausalLM
from optlens.checkpoints import conversion, load_model
from optlens.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    random_model(tiny_config()).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_checkpoint_is_converted(source: Path, tmp_path: Path, capsys):
    target = tmp_path / "new"
    command = ["convert", str(source), str(target), "--dtype", "float16", "--shard-size", "20kB"]
    assert main(command) == 0
    said, *listed = capsys.readouterr().out.splitlines()
    assert "float16 in" in said
    for line in listed:
        digest, name = line.split()
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    assert len(listed) == len(list(target.glob("*.safetensors"))) > 1
    assert load_model(OPTForCausalLM, target, dtype="float16").dtype == torch.float16


def test_something_else_there_is_refused_until_restart(source: Path, tmp_path: Path, capsys):
    command = ["convert", str(source), str(tmp_path / "new")]
    assert main(command) == 0
    assert main([*command, "--dtype", "float16"]) == 2
    assert "--restart" in capsys.readouterr().err
    assert main([*command, "--dtype", "float16", "--restart"]) == 0


def test_an_interrupt_says_how_to_go_on(source: Path, tmp_path: Path, capsys, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "write_safetensors", stop)
    assert main(["convert", str(source), str(tmp_path / "new")]) == 130
    assert "the same command goes on" in capsys.readouterr().err
