import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make

from optlens.checkpoints import stored_tensors
from optlens.checkpoints.errors import CheckpointError
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
        tensors.fill({name: target}, stopped)
    assert torch.equal(target.flatten()[:300], weights.tensor(name).flatten()[:300])
    assert (target.flatten()[300:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_starts_at_a_multiple_of_64(dtype: torch.dtype):
    for n in (1, 7, 1000):
        kept = [aligned((n, 3), dtype) for _ in range(4)]
        assert all(tensor.data_ptr() % 64 == 0 and tensor.shape == (n, 3) for tensor in kept)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def converting(tmp_path: Path, monkeypatch) -> tuple[StoredTensors, dict[str, torch.Tensor]]:
    """Return float16 tensors in small pieces, and float32 ones to fill with them."""
    monkeypatch.setattr(stored_tensors, "PIECE_BYTES", 104)
    tensors, weights = opened(make(tmp_path, dtype=torch.float16))
    return tensors, {name: torch.full(spec.shape, -1.0) for name, spec in weights.specs.items()}


def test_one_thread_converts_while_another_reads(tmp_path: Path, monkeypatch):
    tensors, targets = converting(tmp_path, monkeypatch)
    both, convert, seen = threading.Barrier(2, timeout=20), stored_tensors.convert, []

    def meeting(raw: torch.Tensor, target: torch.Tensor) -> None:
        seen.append(threading.current_thread().name)
        if len(seen) <= 2:
            both.wait()  # broken if no other thread comes to convert something else
        convert(raw, target)

    monkeypatch.setattr(stored_tensors, "convert", meeting)
    tensors.fill(targets)
    assert len(set(seen)) == 2
    expected = Weights(find_layout(tmp_path))
    assert all(torch.equal(x, expected.tensor(n).float()) for n, x in targets.items())


@pytest.mark.parametrize("after", [0, 1, 2, 7])
def test_an_error_in_either_thread_ends_both(tmp_path: Path, monkeypatch, after: int):
    tensors, targets = converting(tmp_path, monkeypatch)
    reads, read = [], stored_tensors._File.read

    def failing(file, start: int, target: torch.Tensor) -> None:
        reads.append(start)
        if len(reads) == after + 1:
            raise CheckpointError("The disk is gone.")
        read(file, start, target)

    monkeypatch.setattr(stored_tensors._File, "read", failing)
    with pytest.raises(CheckpointError, match="The disk is gone"):
        tensors.fill(targets)
    assert len(reads) <= after + 2  # the other thread may have been about to read
    assert not [t for t in threading.enumerate() if t.name.startswith("optlens-read")]


@pytest.mark.usefixtures("two_threads")
def test_reading_threads_compute_alone_and_change_nothing_for_others(tmp_path, monkeypatch):
    inside, convert = set(), stored_tensors.convert
    tensors, targets = converting(tmp_path, monkeypatch)

    def noting(raw: torch.Tensor, target: torch.Tensor) -> None:
        inside.add(torch.get_num_threads())
        convert(raw, target)

    monkeypatch.setattr(stored_tensors, "convert", noting)
    tensors.fill(targets)
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    assert inside == {1}


@pytest.mark.usefixtures("two_threads")
def test_without_openmp_it_converts_in_small_steps(tmp_path: Path, monkeypatch):
    def missing() -> None:
        raise OSError("no such library")

    monkeypatch.setattr(stored_tensors, "_openmp", missing)
    monkeypatch.setattr(stored_tensors, "_ONE_THREAD", 7)
    tensors, targets = converting(tmp_path, monkeypatch)
    tensors.fill(targets)
    expected = Weights(find_layout(tmp_path))
    assert all(torch.equal(x, expected.tensor(n).float()) for n, x in targets.items())
