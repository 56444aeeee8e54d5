import pytest

from optlens.checkpoints.arrangement import (
    USABLE,
    Demand,
    arrange,
    as_given,
    balanced,
    filled,
    on_one,
    streamed,
)

EMBEDDING, POSITIONS, HEAD = (
    "model.decoder.embed_tokens",
    "model.decoder.embed_positions",
    "lm_head",
)
BLOCKS = [f"model.decoder.layers.{n}" for n in range(6)]


def demand(block: int = 100, working: int = 20, cache: int = 60, kept: int = 0) -> Demand:
    """Six blocks and an embedding of 50 that is also the unembedding."""
    modules = {EMBEDDING: 50, POSITIONS: 10, **dict.fromkeys(BLOCKS, block), HEAD: 0}
    return Demand(modules, cache, working, kept, tied=True)


def room(needed: int) -> int:
    """Return a memory of which so much may be used."""
    return -int(-needed // USABLE)


def test_one_gpu_comes_first():
    found = arrange(demand(), {"cuda:0": room(740), "cpu": room(10_000)}, may_stream=True)
    assert (found.kind, found.device_map, found.fits) == ("one device", {"": "cuda:0"}, True)
    assert found.weights == {"cuda:0": 660}
    assert found.needed == {"cuda:0": 660 + 20 + 60}


def test_then_several_gpus_as_few_as_will_do():
    memory = dict.fromkeys(("cuda:0", "cuda:1", "cuda:2"), room(430)) | {"cpu": room(10_000)}
    found = arrange(demand(), memory, may_stream=True)
    assert (found.kind, list(found.weights)) == ("several devices", ["cuda:0", "cuda:1"])
    devices = [found.device_map[name] for name in BLOCKS]
    assert devices == sorted(devices)
    assert found.device_map[HEAD] == found.device_map[EMBEDDING]
    assert sum(found.weights.values()) == 660
    # each computes, and holds the keys and values of its own blocks
    assert sum(found.needed.values()) == 660 + 2 * 20 + 60


def test_then_gpus_and_cpu():
    found = arrange(demand(), {"cuda:0": room(320), "cpu": room(600)}, may_stream=True)
    assert found.kind == "several devices"
    assert found.weights == {"cuda:0": 260, "cpu": 400}
    assert found.needed["cuda:0"] == 260 + 20 + 20 <= 320


def test_then_the_cpu():
    found = arrange(demand(), {"cpu": room(740)}, may_stream=True)
    assert found.device_map == {"": "cpu"}


def test_then_the_disk():
    found = arrange(demand(), {"cpu": room(400)}, may_stream=True)
    assert found.kind == "stream"
    assert found.needed == {"cpu": 60 + 2 * 100 + 20 + 60}
    assert found.device_map == {"": "cpu", "model.decoder.layers": "disk"}
    assert not arrange(demand(), {"cpu": room(400)}, may_stream=False).fits


def test_what_lacks_least_is_returned_where_nothing_fits():
    found = arrange(demand(), {"cuda:0": room(30), "cpu": room(300)}, may_stream=True)
    assert (found.kind, found.fits) == ("stream", False)
    assert found.short == {"cpu": 340 - int(room(300) * USABLE)}


def test_recordings_lie_on_the_cpu():
    memory = {"cuda:0": room(740), "cpu": room(99)}
    found = on_one(demand(kept=100), "cuda:0", memory)
    assert found.needed == {"cuda:0": 740, "cpu": 100}
    assert set(found.short) == {"cpu"}
    assert on_one(demand(kept=90), "cuda:0", memory).fits


def test_unknown_memory_counts_as_enough():
    assert on_one(demand(), "cpu", {"cpu": None}).fits
    assert filled(demand(), ["cpu"], {"cpu": None}).fits


def test_balanced_shares_differ_by_less_than_a_block():
    memory = dict.fromkeys(("cuda:0", "cuda:1", "cuda:2", "cuda:3"), 1)
    found = balanced(demand(), list(memory), memory)
    assert set(found.weights) == set(memory)
    assert max(found.weights.values()) - min(found.weights.values()) <= 110


def test_an_untied_head_goes_where_it_falls():
    modules = {EMBEDDING: 50, **dict.fromkeys(BLOCKS, 100), HEAD: 50}
    devices = {"cuda:0": 1, "cuda:1": 1}
    found = balanced(Demand(modules, 0, 0, 0, tied=False), list(devices), devices)
    assert found.device_map[HEAD] == "cuda:1"


def test_a_given_map_is_judged():
    memory = {"cuda:0": room(340), "cpu": room(600)}
    given = {"": "cpu", EMBEDDING: 0, "model.decoder.layers.1": "cuda:0"}
    found = as_given(demand(), given, memory)
    assert found.weights == {"cuda:0": 150, "cpu": 510}
    assert [name for name, device in found.device_map.items() if device == "cuda:0"] == [
        EMBEDDING,
        BLOCKS[1],
        HEAD,
    ]
    on_disk = as_given(demand(), {"": "cpu", BLOCKS[0]: "disk"}, memory)
    assert on_disk.weights == {"cpu": 560}


def test_a_name_is_matched_whole():
    """layers.1 is not layers.10."""
    modules = {EMBEDDING: 1, "model.decoder.layers.1": 1, "model.decoder.layers.10": 1, HEAD: 0}
    given = {"": "cpu", "model.decoder.layers.1": "cuda:0"}
    found = as_given(Demand(modules, 0, 0, 0, True), given, {"cuda:0": None, "cpu": None})
    assert found.device_map["model.decoder.layers.10"] == "cpu"


def test_maps_that_say_too_little_or_name_no_device():
    memory = {"cpu": None}
    with pytest.raises(ValueError, match="says nothing of 'model.decoder.embed_tokens'"):
        as_given(demand(), {"model.decoder.layers": "cpu"}, memory)
    with pytest.raises(ValueError, match="on 'cuda:3'; known devices are cpu and disk"):
        as_given(demand(), {"": 3}, memory)


def test_streaming_holds_two_blocks():
    assert streamed(demand(kept=7), "cuda:0", {}).needed == {"cuda:0": 340, "cpu": 7}
