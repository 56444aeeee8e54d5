import pytest
import torch
from conftest import VARIANTS, random_model, tiny_config
from live_bytes import LiveBytes

import optlens
from optlens.config import SIZES, OPTConfig
from optlens.footprint import (
    NF4_BLOCK,
    cache_bytes,
    forward_bytes,
    kept_lens_bytes,
    lens_bytes,
    module_bytes,
    recording_run_bytes,
)
from optlens.lens import logit

# What a plan promises: its numbers are this near to a run's.
SHARE = 0.05
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 64), (3, 40), (1, 300)]  # prompts, tokens


def make_model(dtype: torch.dtype = torch.float32, **overrides):
    """Make a model in which no single term of the formulas is much larger than all others."""
    shape = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 3}
    return random_model(
        tiny_config(**{**shape, "max_position_embeddings": 300, **overrides}), dtype
    )


def tokens_of(batch: int, pos: int) -> torch.Tensor:
    return torch.arange(3, 3 + batch * pos).remainder(97).add(3).view(batch, pos)


def peak_of(run) -> int:
    """Return the most bytes that a function's tensors take while it runs."""
    with torch.no_grad(), LiveBytes() as counter:
        kept = run()
    del kept
    return counter.peak


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_the_model(variant: dict, dtype: torch.dtype):
    model = random_model(tiny_config(**variant), dtype)
    counted = module_bytes(model.config, dtype.itemsize)
    assert sum(counted.values()) == sum(p.nbytes for p in model.parameters())
    for name, size in counted.items():
        if name != "lm_head":
            assert size == sum(p.nbytes for p in model.get_submodule(name).parameters()), name
    tied = model.config.tie_word_embeddings
    assert counted["lm_head"] == (0 if tied else model.lm_head.weight.nbytes)


@pytest.mark.parametrize("size", SIZES)
def test_weights_of_published_sizes(size: str):
    config = OPTConfig.from_name(size)
    assert sum(module_bytes(config, 2).values()) == 2 * config.parameter_count()


def test_quantised_weights():
    """int8 has a float32 scale for each row, nf4 one for each block; nothing else is smaller."""
    config = OPTConfig.from_name("opt-6.7b")
    d, mlp = config.d_model, config.d_mlp
    rest = 2 * (5 * d + mlp) + 2 * 4 * d
    numbers = 4 * d * d + 2 * d * mlp
    whole, int8, nf4 = (module_bytes(config, 2, kind) for kind in (None, "int8", "nf4"))
    block = "model.decoder.layers.7"
    assert whole[block] == 2 * numbers + rest
    assert int8[block] == numbers + 4 * (5 * d + mlp) + rest
    assert nf4[block] == numbers // 2 + 4 * numbers // NF4_BLOCK + 6 * 64 + rest
    for name in set(whole) - {f"model.decoder.layers.{n}" for n in range(config.n_layers)}:
        assert whole[name] == int8[name] == nf4[name]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantised_weights_are_what_bitsandbytes_keeps(tmp_path, kind: str, dtype, variant: dict):
    random_model(tiny_config(**variant)).save_pretrained(tmp_path)
    model = optlens.load(tmp_path, device="cpu", dtype=dtype, quantize=kind)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    for parameter in model.parameters():
        if kind == "int8" and parameter.dtype == torch.int8:
            kept += parameter.SCB.nbytes
        elif getattr(parameter, "quant_state", None) is not None:
            kept += parameter.quant_state.absmax.nbytes + parameter.quant_state.code.nbytes
    assert sum(module_bytes(model.config, dtype.itemsize, kind).values()) == kept


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_streamed_model_holds_what_was_planned(tmp_path, layers: int):
    random_model(tiny_config(num_hidden_layers=layers)).save_pretrained(tmp_path)
    model = optlens.load(tmp_path, device="cpu", device_map="stream")
    model(tokens_of(1, 9), return_type="logits")
    kept = sum(p.nbytes for n, p in model.named_parameters() if ".layers." not in n)
    kept += sum(p.nbytes for b in model.placement._buffers for p in b.parameters.values())
    made = optlens.plan(tmp_path, device="cpu", device_map="stream", prompt_length=9)
    assert made.arrangement.weights == {"cpu": kept}


# ------------------------------------------------------------------ a forward pass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "pos"), SHAPES)
def test_kv_cache_is_counted_exactly(dtype: torch.dtype, batch: int, pos: int):
    model = make_model(dtype)
    with torch.no_grad():
        cache = model(tokens_of(batch, pos), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in range(3) for tensor in cache[layer])
    assert cache_bytes(model.config, batch, pos, dtype.itemsize) == held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "pos"), SHAPES)
@pytest.mark.parametrize("vocabulary", [101, 3000])
def test_forward_pass(dtype: torch.dtype, batch: int, pos: int, vocabulary: int):
    """With a small vocabulary most is held in a block, with a large one at the logits."""
    model, tokens = make_model(dtype, vocab_size=vocabulary), tokens_of(batch, pos)
    shape = model.config, batch, pos, dtype.itemsize
    without = peak_of(lambda: model(tokens, use_cache=False))
    assert forward_bytes(*shape) == pytest.approx(without, rel=SHARE)
    both = peak_of(lambda: model(tokens, use_cache=True))
    assert forward_bytes(*shape) + cache_bytes(*shape) == pytest.approx(both, rel=SHARE)


@pytest.mark.parametrize("vocabulary", [101, 3000])
def test_forward_pass_of_every_variant(variant: dict, vocabulary: int):
    if "word_embed_proj_dim" in variant:
        variant = {**variant, "word_embed_proj_dim": 32}
    model = make_model(vocab_size=vocabulary, **variant)
    measured = peak_of(lambda: model(tokens_of(2, 50), use_cache=False))
    assert forward_bytes(model.config, 2, 50, 4) == pytest.approx(measured, rel=SHARE)


@pytest.mark.parametrize("size", ["125m", "350m"])
def test_forward_pass_of_true_widths(size: str):
    """Two layers of a published size, with its vocabulary."""
    config = OPTConfig.from_name(size, num_hidden_layers=2)
    model = random_model(config)
    measured = peak_of(lambda: model(tokens_of(1, 40), use_cache=False))
    assert forward_bytes(config, 1, 40, 4) == pytest.approx(measured, rel=SHARE)


# ------------------------------------------------------------------ recording


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "pos"), SHAPES)
@pytest.mark.parametrize("name", ["post_ln_350m", "pre_ln"])
@pytest.mark.parametrize(
    ("what", "heads"),
    [("residual", None), ("attention", None), ("attention", [1, 2]), ("attn_scores", None)],
)
def test_run_of_a_recording(dtype, batch: int, pos: int, name: str, what: str, heads):
    model, tokens = make_model(dtype, **VARIANTS[name]), tokens_of(batch, pos)
    kept = sum(t.nbytes for t in model.record(tokens, what=what, heads=heads)._tensors.values())
    measured = peak_of(lambda: model.record(tokens, what=what, heads=heads)) - kept
    patterns = what != "residual"
    found = recording_run_bytes(
        model.config, batch, pos, dtype.itemsize, patterns, heads=len(heads or ())
    )
    assert found == pytest.approx(measured, rel=SHARE)


@pytest.mark.parametrize("n_heads", [4, 16])
def test_run_that_records_what_each_head_adds(n_heads: int):
    model, tokens = make_model(num_attention_heads=n_heads), tokens_of(1, 64)
    kept = sum(t.nbytes for t in model.record(tokens, what="result")._tensors.values())
    measured = peak_of(lambda: model.record(tokens, what="result")) - kept
    found = recording_run_bytes(model.config, 1, 64, 4, patterns=False, results=True)
    assert found == pytest.approx(measured, rel=SHARE)


def test_patterns_do_not_pile_up_beside_their_recording():
    """One layer's scores and pattern are alive at a time, however many layers there are."""
    tokens, extra = tokens_of(1, 300), []
    for layers in (2, 6):
        model = make_model(num_hidden_layers=layers)
        kept = sum(t.nbytes for t in model.record(tokens, what="attention")._tensors.values())
        extra.append(peak_of(lambda model=model: model.record(tokens, what="attention")) - kept)
    assert extra[0] == extra[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "pos"), SHAPES)
@pytest.mark.parametrize("chunk", [logit.CHUNK_BYTES, 200_000])
def test_stored_lens(dtype: torch.dtype, batch: int, pos: int, chunk: int, monkeypatch):
    monkeypatch.setattr(logit, "CHUNK_BYTES", chunk)
    model, tokens = make_model(dtype, vocab_size=3000), tokens_of(batch, pos)
    what = ("residual", "logit_lens")
    recording = model.record(tokens, what=what)._tensors
    lens = {name: t for name, t in recording.items() if name.startswith("lens_")}
    kept = sum(tensor.nbytes for tensor in lens.values())
    assert kept_lens_bytes(batch, pos, rows=4, top_k=10) == kept
    measured = peak_of(lambda: model.record(tokens, what=what))
    measured -= sum(t.nbytes for t in recording.values())
    found = lens_bytes(model.config, batch, pos, dtype.itemsize, rows=4, chunk_bytes=chunk)
    run = recording_run_bytes(model.config, batch, pos, dtype.itemsize, patterns=False)
    # the run is over before there is memory for the lens
    assert max(found, run - kept) == pytest.approx(measured, rel=SHARE)
