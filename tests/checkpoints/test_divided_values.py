"""A divided model gives the numbers of one that is not, also where values decide what is done next."""

import subprocess
import sys
from pathlib import Path

import pretended_gpus
import pytest
from checkpoint_folders import make
from conftest import tiny_config

PROGRAM = Path(__file__).parents[1] / "divided_values.py"


@pytest.mark.skipif(pretended_gpus.REGISTER is None, reason="needs a newer PyTorch")
@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("apart", {"tie_word_embeddings": False}),
        ("apart", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
        ("lent", {}),
    ],
    ids=["untied", "350m", "lent to a GPU"],
)
def test_divided_models_compute_what_whole_ones_do(tmp_path: Path, how: str, changes: dict):
    folder = make(tmp_path, tiny_config(num_hidden_layers=3, **changes), layout="single")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), str(folder), how],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
