import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from optlens.checkpoints.safetensors_file import write_safetensors

TENSORS = {
    "half": torch.arange(7).to(torch.float16),
    "wide": torch.randn(3, 4, dtype=torch.float64),
    "brain": torch.randn(5).to(torch.bfloat16),
    "transposed": torch.randn(4, 6).T,
    "one": torch.tensor(3.0),
    "none": torch.empty(0, 4),
}
SPECS = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_the_library_reads_what_is_written(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, SPECS, TENSORS.__getitem__)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_data_are_aligned(tmp_path: Path):
    """The data begin at a multiple of 64, each tensor at a multiple of its item size."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, SPECS, TENSORS.__getitem__)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(content[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_tensors_are_asked_for_one_at_a_time(tmp_path: Path):
    asked = []

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return TENSORS[name]

    write_safetensors(tmp_path / "x.safetensors", SPECS, tensor)
    assert sorted(asked) == sorted(TENSORS)


@pytest.mark.parametrize("wrong", [torch.ones(8, dtype=torch.float16), torch.ones(7)])
def test_tensor_unlike_its_announcement_is_refused(tmp_path: Path, wrong: torch.Tensor):
    specs = {"half": SPECS["half"]}
    with pytest.raises(ValueError, match=r"half was announced as torch.float16 \[7\]"):
        write_safetensors(tmp_path / "x.safetensors", specs, lambda name: wrong)
