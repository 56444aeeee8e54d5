from pathlib import Path

import pytest
import torch
from checkpoint_folders import make

from optlens.checkpoints import stored_tensors
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.read import Weights
from optlens.checkpoints.stored_tensors import Stopped, StoredTensors, aligned

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(stored_tensors, "PIECE_BYTES", 104)


def opened(folder: Path) -> tuple[StoredTensors, Weights]:
    weights = Weights(find_layout(folder))
    return StoredTensors(weights, weights.specs), weights


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_tensors_equal_the_mapped_ones(tmp_path: Path, pieces, stored, wanted):
    tensors, weights = opened(make(tmp_path, layout="sharded", dtype=stored))
    for name in weights.specs:
        found = tensors.read(name, wanted, torch.device("cpu"))
        assert torch.equal(found, weights.tensor(name).to(wanted))
        assert found.data_ptr() % 64 == 0 and found.is_contiguous()


def test_the_order_is_that_of_the_files(tmp_path: Path):
    tensors, weights = opened(make(tmp_path, layout="sharded"))
    ordered = tensors.in_file_order(sorted(weights.specs))
    files = [weights.location(name)[0].name for name in ordered]
    assert files == sorted(files) and len(set(files)) > 3
    places = [tensors._places[name] for name in ordered]
    assert all(
        a.file is not b.file or a.start < b.start for a, b in zip(places, places[1:], strict=False)
    )
    assert tensors.nbytes(ordered) == sum(weights.tensor(name).nbytes for name in ordered)


def test_it_stops_between_pieces(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stored_tensors, "PIECE_BYTES", 400)
    tensors, weights = opened(make(tmp_path))
    name = "decoder.layers.0.fc1.weight"
    target, asked = torch.zeros(weights.specs[name].shape), []

    def stopped() -> bool:
        asked.append(True)
        return len(asked) > 3

    with pytest.raises(Stopped):
        tensors.read_into(name, target, stopped)
    assert torch.equal(target.flatten()[:300], weights.tensor(name).flatten()[:300])
    assert (target.flatten()[300:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_starts_at_a_multiple_of_64(dtype: torch.dtype):
    for n in (1, 7, 1000):
        kept = [aligned((n, 3), dtype) for _ in range(4)]
        assert all(tensor.data_ptr() % 64 == 0 and tensor.shape == (n, 3) for tensor in kept)
