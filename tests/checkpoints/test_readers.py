"""Several readers: the same tensors as one, errors and interrupts that end all of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoint_folders import make, maker
from conftest import tiny_config
from metaseq_folders import write_metaseq

from optlens.checkpoints import CheckpointError, load_model, readers
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.read import Weights
from optlens.checkpoints.readers import read_tensors
from optlens.model import OPTForCausalLM

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PART_BYTES", 104)
    monkeypatch.setattr(readers, "_RELEASE_BYTES", 1000)


def opened(folder: Path) -> Weights:
    return Weights(find_layout(folder))


def read_all(
    folder: Path, dtype: torch.dtype = torch.float32, n_readers: int | None = 3
) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder; they must be handed over once each, in this thread."""
    found: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        assert threading.current_thread() is threading.main_thread() and name not in found
        found[name] = tensor

    weights = opened(folder)
    read_tensors(weights, {name: ("cpu", dtype) for name in weights.specs}, put, n_readers)
    return found


def still_reading() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("optlens-read")]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layout", maker.LAYOUTS)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_any_number_of_readers_gives_what_one_conversion_gives(
    tmp_path: Path, layout: str, stored: torch.dtype, wanted: torch.dtype
):
    weights = opened(make(tmp_path, layout=layout, dtype=stored))
    for n_readers in (1, 2, 4):
        found = read_all(tmp_path, wanted, n_readers)
        assert found.keys() == weights.specs.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, weights.tensor(name).to(wanted))
            assert tensor.is_contiguous() and tensor.dtype == wanted
    assert not still_reading()


@pytest.mark.usefixtures("small_parts")
def test_merged_parts_of_the_original_files(tmp_path: Path):
    write_metaseq(tmp_path, OPTForCausalLM(tiny_config(vocab_size=100)).half(), 2)
    weights = opened(tmp_path)
    for name, tensor in read_all(tmp_path).items():
        assert torch.equal(tensor, weights.tensor(name).float())


@pytest.mark.usefixtures("small_parts")
def test_a_tensor_that_is_stored_transposed(tmp_path: Path):
    values = torch.randn(30, 50).half().T
    torch.save({"decoder.a": values, "decoder.b": torch.ones(7)}, tmp_path / "pytorch_model.bin")
    found = read_all(tmp_path)
    assert torch.equal(found["decoder.a"], values.float()) and found["decoder.a"].is_contiguous()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads", "small_parts")
def test_readers_convert_at_the_same_time_and_compute_alone(tmp_path: Path, monkeypatch):
    make(tmp_path, dtype=torch.float16)
    both, convert, seen = threading.Barrier(2, timeout=20), readers.convert_alone, []

    def meeting(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        if len(seen) <= 2:
            both.wait()  # broken if no other reader comes to convert something else
        convert(targets, sources)

    monkeypatch.setattr(readers, "convert_alone", meeting)
    read_all(tmp_path, n_readers=2)
    names, threads = zip(*seen, strict=True)
    assert len(set(names)) == 2 and set(threads) == {1}


def test_batches_get_smaller_towards_the_end(tmp_path: Path, monkeypatch):
    """So that no reader is left with a large one, and pages of few are in memory then."""
    make(tmp_path, dtype=torch.float16)
    sizes, convert = [], readers.convert_alone

    def weighing(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        sizes.append(sum(source.nbytes for source in sources))
        convert(targets, sources)

    monkeypatch.setattr(readers, "convert_alone", weighing)
    weights = opened(tmp_path)
    largest = max(map(weights.n_bytes, weights.specs))
    read_all(tmp_path, n_readers=2)
    assert max(sizes) < sum(sizes) / 4 + largest and len(sizes) > 4
    assert sorted(sizes[-2:])[0] < largest / 4


@pytest.mark.usefixtures("two_threads", "small_parts")
def test_readers_that_pytorch_will_not_leave_alone_convert_the_same(tmp_path: Path, monkeypatch):
    """They go in steps that PyTorch does not divide, where OpenMP is not to be found."""
    weights = opened(make(tmp_path, dtype=torch.float16))
    monkeypatch.setattr(readers, "stay_on_one_core", lambda: None)
    monkeypatch.setattr(torch, "_foreach_copy_", None)
    for name, tensor in read_all(tmp_path, n_readers=2).items():
        assert torch.equal(tensor, weights.tensor(name).float())


def test_nothing_to_convert_needs_no_readers(tmp_path: Path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(readers, "_Readers", None)
    assert len(read_all(tmp_path)) > 10


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_an_error_of_one_reader_ends_all(tmp_path: Path, monkeypatch, after: int):
    folder = make(tmp_path, dtype=torch.float16)
    tensor, asked = Weights.tensor, []

    def failing(weights: Weights, name: str) -> torch.Tensor:
        asked.append(name)
        if len(asked) > after // 8:
            raise CheckpointError(f"{weights.where(name)} cannot be read: the disk is gone.")
        return tensor(weights, name)

    monkeypatch.setattr(Weights, "tensor", failing)
    with pytest.raises(CheckpointError, match="safetensors: '.*' cannot be read: the disk is gone"):
        read_all(folder)
    assert len(asked) == after // 8 + 1  # no other reader went on
    assert not still_reading()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_readers_stop_when_one_of_them_fails(tmp_path: Path, monkeypatch, error):
    converted, convert, failed = [], readers.convert_alone, threading.Event()

    def failing(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        converted.append(sources)
        if len(converted) == 5:
            failed.set()
            raise error("while converting")
        if failed.is_set():
            time.sleep(0.01)  # the thread that waits gets its turn
        convert(targets, sources)

    monkeypatch.setattr(readers, "convert_alone", failing)
    with pytest.raises(error, match="while converting"):
        read_all(make(tmp_path, dtype=torch.float16))
    assert len(converted) < 50  # of many hundred parts
    assert not still_reading()


@pytest.mark.usefixtures("small_parts")
def test_an_interrupt_ends_all_readers(tmp_path: Path, monkeypatch):
    weights, placed = opened(make(tmp_path, dtype=torch.float16)), []
    convert, converted, interrupted = readers.convert_alone, [], threading.Event()

    def slow_then(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        if interrupted.is_set():
            time.sleep(0.01)
            converted.append(sources)
        convert(targets, sources)

    def put(name: str, tensor: torch.Tensor) -> None:
        placed.append(name)
        if len(placed) == 3:
            interrupted.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(readers, "convert_alone", slow_then)
    with pytest.raises(KeyboardInterrupt):
        read_tensors(weights, {n: ("cpu", torch.float32) for n in weights.specs}, put, 3)
    assert len(placed) == 3 and len(converted) < 50 and not still_reading()


def test_one_reader_waits_until_a_tensor_is_in_its_place(tmp_path: Path):
    """So quantising holds one unquantised matrix at a time."""
    import weakref

    weights, last = opened(make(tmp_path, dtype=torch.float16)), []
    tensor = weights.tensor

    def watching(name: str) -> torch.Tensor:
        assert all(before() is None for before in last)
        return tensor(name)

    weights.tensor = watching
    wanted = {name: ("cpu", torch.float32) for name in weights.specs}
    read_tensors(weights, wanted, lambda name, tensor: last.append(weakref.ref(tensor)), 1)
    assert len(last) == len(wanted)


def test_a_model_loaded_by_several_readers_equals_one_by_one(tmp_path: Path, monkeypatch):
    make(tmp_path, layout="sharded", dtype=torch.float16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    several = load_model(OPTForCausalLM, tmp_path, device="cpu", dtype="float32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = load_model(OPTForCausalLM, tmp_path, device="cpu", dtype="float32")
    assert list(several.state_dict()) == list(one.state_dict())
    for name, tensor in several.state_dict().items():
        assert torch.equal(tensor, one.state_dict()[name])


def test_the_caller_does_something_else_while_readers_convert(tmp_path: Path, monkeypatch):
    weights = opened(make(tmp_path, dtype=torch.float16))
    wanted = {name: ("cpu", torch.float32) for name in weights.specs}
    met, convert, calls = threading.Event(), readers.convert_alone, []

    def late(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        assert met.wait(20)  # no reader goes on before the caller was elsewhere
        convert(targets, sources)

    def meanwhile() -> None:
        calls.append(threading.current_thread())
        met.set()

    monkeypatch.setattr(readers, "convert_alone", late)
    found: dict[str, torch.Tensor] = {}
    read_tensors(weights, wanted, found.__setitem__, 2, meanwhile)
    assert calls == [threading.main_thread()] and found.keys() == wanted.keys()
    read_tensors(weights, wanted, found.__setitem__, 1, meanwhile)
    assert len(calls) == 2


def test_an_error_of_the_caller_ends_all_readers(tmp_path: Path, monkeypatch):
    weights = opened(make(tmp_path, dtype=torch.float16))
    wanted = {name: ("cpu", torch.float32) for name in weights.specs}
    failed, begun = threading.Event(), []

    def slow(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        begun.append(targets)
        assert failed.wait(20)
        time.sleep(0.2)  # the others are told meanwhile

    def fail() -> None:
        failed.set()
        raise CheckpointError("the tokenizer is damaged")

    monkeypatch.setattr(readers, "convert_alone", slow)
    with pytest.raises(CheckpointError, match="tokenizer"):
        read_tensors(weights, wanted, lambda name, tensor: None, 3, fail)
    assert len(begun) <= 3 < len(wanted) and not still_reading()
