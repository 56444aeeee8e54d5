import pytest

from optlens.checkpoints.shards import index_of, parse_size, split


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [(7, 7), ("500MB", 500_000_000), ("1.5 kb", 1500), ("2gb", 2_000_000_000), ("9B", 9)],
)
def test_sizes(size: int | str, n_bytes: int):
    assert parse_size(size, "shard_size") == n_bytes


def test_what_is_no_size_is_refused():
    with pytest.raises(ValueError, match="shard_size='five' is no size"):
        parse_size("five", "shard_size")


def test_tensors_stay_in_order_and_files_small():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 1}
    files = split(sizes, limit=6)
    assert list(files.values()) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(files)[2] == "model-00003-of-00003.safetensors"
    index = index_of(files, sizes)
    assert index["metadata"]["total_size"] == 17
    assert index["weight_map"]["d"] == "model-00003-of-00003.safetensors"


def test_one_file_has_no_number():
    assert split({"a": 3, "b": 3}, limit=6) == {"model.safetensors": ["a", "b"]}
