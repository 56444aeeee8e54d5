"""The forward pass equals transformers' on every switch of the config, mask, cache and dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from conftest import VARIANTS, random_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from twins import assert_near, examples, twin_of

from optlens.activations import ACTIVATIONS
from optlens.config import OPTConfig
from optlens.model import OPTForCausalLM, OPTModel

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
REAL = PADDED.bool()


# --- random configurations, masks and chunks ----------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> OPTConfig:
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    width = heads * draw(st.sampled_from([4, 5, 8]))
    return OPTConfig(
        vocab_size=61,
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 3)),
        ffn_dim=draw(st.sampled_from([16, 33])),
        max_position_embeddings=24,
        word_embed_proj_dim=draw(st.sampled_from([width, 12, 40])),
        do_layer_norm_before=draw(st.booleans()),
        _remove_final_layer_norm=draw(st.booleans()),
        enable_bias=draw(st.booleans()),
        layer_norm_elementwise_affine=draw(st.booleans()),
        activation_function=draw(st.sampled_from(sorted(ACTIVATIONS))),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=draw(st.sampled_from([1, 0, None])),
    )


@dataclass
class Pass:
    """One way to run a prompt: its ids, its mask, and into which chunks it is cut (one: no cache)."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    ends: list[int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def real(self) -> torch.Tensor:
        return torch.ones_like(self.ids).bool() if self.mask is None else self.mask.bool()

    def logits(self, model: Any) -> torch.Tensor:
        """Run a model, ours or theirs, chunk by chunk, and put its logits together."""
        if len(self.ends) == 1:
            return model(self.ids, attention_mask=self.mask, use_cache=False, **self.options).logits
        parts, cache, start = [], None, 0
        for end in self.ends:
            mask = None if self.mask is None else self.mask[:, :end]
            out = model(
                self.ids[:, start:end],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **self.options,
            )
            parts.append(out.logits)
            cache, start = out.past_key_values, end
        return torch.cat(parts, dim=1)


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    batch, pos = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    ids = draw(st.lists(st.integers(0, 60), min_size=batch * pos, max_size=batch * pos))
    rows = []
    for _ in range(batch):
        row = torch.ones(pos, dtype=torch.long)
        side, count = (
            draw(st.sampled_from(["none", "left", "right"])),
            draw(st.integers(0, pos - 1)),
        )
        if side == "left":
            row[:count] = 0
        if side == "right":
            row[pos - count :] = 0
        rows.append(row)
    mask = torch.stack(rows).to(draw(st.sampled_from([torch.long, torch.bool, torch.float32])))
    if draw(st.booleans()):
        mask = None
    cuts = draw(st.sets(st.integers(1, max(1, pos - 1)), max_size=3)) if draw(st.booleans()) else ()
    return Pass(torch.tensor(ids).view(batch, pos), mask, sorted({*cuts, pos}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(config=configs(), run=passes(), seed=st.integers(0, 10**6), explicit=st.booleans())
@examples(300)
@torch.no_grad()
def test_logits_equal_transformers(dtype, config, run, seed, explicit):
    """Through fused attention, and through the explicit path that recording takes."""
    model = random_model(config, dtype, seed)
    theirs = run.logits(twin_of(model))
    if explicit:
        with model.hooks(fwd_hooks=[(lambda name: True, lambda value, hook: None)]):
            ours = run.logits(model)
    else:
        ours = run.logits(model)
    assert ours.dtype == dtype
    assert_near(ours[run.real], theirs[run.real])
    assert ours.isfinite().all()


@given(config=configs(), run=passes(), seed=st.integers(0, 10**6))
@examples(100)
@torch.no_grad()
def test_padding_and_chunks_change_nothing(config, run, seed):
    """The same prompt alone and whole, padded, and in chunks gives the same numbers."""
    model = random_model(config, torch.float64, seed)
    together = run.logits(model)
    for row, real in enumerate(run.real):
        alone = model(run.ids[row][real]).logits[0]
        assert_near(together[row][real], alone)


@given(config=configs(), run=passes(), seed=st.integers(0, 10**6))
@examples(100)
@torch.no_grad()
def test_base_model_equals_transformers(config, run, seed):
    model = random_model(config, torch.float64, seed).model
    options = {"attention_mask": run.mask, "output_hidden_states": True}
    ours, theirs = model(run.ids, **options), twin_of(model)(run.ids, **options)
    assert_near(ours.last_hidden_state[run.real], theirs.last_hidden_state[run.real])
    assert len(ours.hidden_states) == len(theirs.hidden_states) == config.n_layers + 1
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert mine.shape == other.shape
        assert_near(mine[run.real], other[run.real])


# --- half precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["fused", "explicit"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bfloat16_is_as_exact_as_transformers(variant, path):
    """Root mean square error over all logits of 8 models, so that no single rounding decides.

    Measured: 1.00 for the plain pass, up to 1.18 with everything listened to. The promise is 1.5.
    """
    ours, theirs = [], []
    for seed in range(8):
        model = random_model(tiny_config(**VARIANTS[variant]), torch.bfloat16, seed)
        twin, exact = twin_of(model), random_model(model.config, torch.float64, seed)
        exact.load_state_dict(model.state_dict())  # the rounded weights: only computing differs
        truth = exact(IDS, attention_mask=PADDED).logits[REAL]
        hooks = [(lambda name: True, lambda value, hook: None)] if path == "explicit" else []
        with model.hooks(fwd_hooks=hooks):
            ours.append(model(IDS, attention_mask=PADDED).logits[REAL].double() - truth)
        theirs.append(twin(IDS, attention_mask=PADDED).logits[REAL].double() - truth)
    ratio = torch.cat(ours).square().mean().sqrt() / torch.cat(theirs).square().mean().sqrt()
    assert 0.5 < ratio < 1.5


# --- what passes on the way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, PADDED], ids=["no padding", "padding"])
@torch.no_grad()
def test_patterns_equal_transformers_eager_ones(variant, mask):
    model = random_model(tiny_config(**variant))  # float32, as the eager path is no better
    ours = model(IDS, attention_mask=mask, output_attentions=True)
    theirs = twin_of(model, "eager")(IDS, attention_mask=mask, output_attentions=True)
    real = torch.ones_like(REAL) if mask is None else REAL
    assert len(ours.attentions) == len(theirs.attentions) == 2
    for mine, other in zip(ours.attentions, theirs.attentions, strict=True):
        assert mine.shape == other.shape
        assert_near(mine.transpose(1, 2)[real], other.transpose(1, 2)[real])
    assert_near(ours.logits[real], theirs.logits[real])


@torch.no_grad()
def test_patterns_with_a_cache_cover_the_tokens_before():
    model = random_model(tiny_config())
    past = model(IDS[:, :4]).past_key_values
    out = model(IDS[:, 4:], past_key_values=past, output_attentions=True)
    whole = model(IDS, output_attentions=True)
    for part, pattern in zip(out.attentions, whole.attentions, strict=True):
        assert part.shape == (2, 4, 3, 7)
        assert_near(part, pattern[:, :, 4:])


@torch.no_grad()
def test_hidden_states_end_with_what_the_unembedding_reads(variant):
    model = random_model(tiny_config(**variant), torch.float64)
    out = model(IDS, attention_mask=PADDED, output_hidden_states=True)
    theirs = twin_of(model)(IDS, attention_mask=PADDED, output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == len(theirs) == 3
    for mine, other in zip(out.hidden_states, theirs, strict=True):
        assert mine.shape == other.shape
        assert_near(mine[REAL], other[REAL])
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, rtol=0, atol=0)


@torch.no_grad()
def test_causality():
    """What comes later changes nothing before it."""
    model = random_model(tiny_config(), torch.float64)
    other = IDS.clone()
    other[:, 5:] = 7
    assert_near(model(IDS).logits[:, :5], model(other).logits[:, :5])


# --- the network as it is made ------------------------------------------------------------------------------------------


def test_parameters_have_transformers_names_and_shapes(variant):
    model = random_model(tiny_config(**variant))
    theirs = transformers.OPTForCausalLM(transformers.OPTConfig(**model.config.to_dict()))
    ours = {name: value.shape for name, value in model.state_dict().items()}
    assert ours == {name: value.shape for name, value in theirs.state_dict().items()}
    assert model.config.parameter_count() == sum(p.numel() for p in model.parameters())
    assert model.config.parameter_count() == theirs.num_parameters()


def test_base_model_stands_alone():
    """Names without the `model.` in front, as 350m's checkpoint has them."""
    config = tiny_config(**VARIANTS["post_ln_350m"])
    model = OPTModel(config).eval()
    twin = twin_of(model)
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert_near(model(IDS).last_hidden_state, twin(IDS).last_hidden_state)
    assert model(IDS).last_hidden_state.shape == (2, 7, 16)


def test_random_weights_are_drawn_as_transformers_draws_them(variant):
    """Alike in distribution: standard deviation and mean of every tensor; rows of padding and biases are 0."""
    config = tiny_config(**variant, init_std=0.5, vocab_size=1000, ffn_dim=512)
    ours = OPTForCausalLM(config)
    theirs = transformers.OPTForCausalLM(transformers.OPTConfig(**config.to_dict()))
    for name, mine in ours.named_parameters():
        other = theirs.get_parameter(name)
        if mine.dim() == 1:
            torch.testing.assert_close(mine, other, rtol=0, atol=0, msg=name)
            continue
        # the standard error of a standard deviation is std / sqrt(2 n); the smallest matrix has 512 numbers: 3 %
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.2), name
        assert abs(mine.mean()) < 0.1, name
    assert (ours.decoder.embed_tokens.weight[1] == 0).all()
    tied = ours.lm_head.weight is ours.decoder.embed_tokens.weight
    assert tied == config.tie_word_embeddings
    assert not ours.lm_head.weight.equal(ours.decoder.embed_tokens.weight) or tied


def test_a_tied_unembedding_stays_tied():
    model = random_model(tiny_config())
    model = model.to(torch.float64)
    model.load_state_dict(model.state_dict())
    assert model.lm_head.weight is model.decoder.embed_tokens.weight


def test_config_follows_the_weights():
    model = random_model(tiny_config())
    assert (model.config.dtype, model.config.device) == (torch.float32, torch.device("cpu"))
    model.to(torch.float64)
    assert model.cfg.dtype == model.dtype == torch.float64
    assert model.to("meta").cfg.device == torch.device("meta")


def test_shapes_can_be_rehearsed_without_numbers():
    model = OPTForCausalLM(tiny_config()).to("meta").eval()
    out = model(IDS, attention_mask=PADDED.to("meta"), output_attentions=True)
    assert out.logits.shape == (2, 7, 101)
    assert out.attentions[1].shape == (2, 4, 7, 7)


# --- running a part -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_starting_from_any_layers_residual_gives_equal_logits(variant):
    model = random_model(tiny_config(**variant, num_hidden_layers=3))
    logits, cache = model.run_with_cache(IDS, lambda name: "resid" in name, attention_mask=PADDED)
    clean = model(IDS, attention_mask=PADDED).logits
    torch.testing.assert_close(logits, clean, rtol=0, atol=0)
    for layer in range(3):
        resid = cache["resid_pre", layer]
        for start in (layer, layer - 3):
            again = model(resid, attention_mask=PADDED, start_at_layer=start).logits
            torch.testing.assert_close(again, clean, rtol=0, atol=0)
    last = model(cache["resid_post", 2], start_at_layer=3).logits
    torch.testing.assert_close(last, clean, rtol=0, atol=0)
    torch.testing.assert_close(model.unembed(cache["resid_post", 2]), clean, rtol=0, atol=0)


@torch.no_grad()
def test_stopping_before_a_layer_gives_its_residual(variant):
    model = random_model(tiny_config(**variant, num_hidden_layers=3))
    _, cache = model.run_with_cache(IDS, lambda name: "resid" in name)
    for layer in range(3):
        for stop in (layer, layer - 3):
            for network in (model, model.model):
                resid = network(IDS, stop_at_layer=stop)
                torch.testing.assert_close(resid, cache["resid_pre", layer], rtol=0, atol=0)
    torch.testing.assert_close(model(IDS, stop_at_layer=3), cache["resid_post", 2], rtol=0, atol=0)
    middle = model(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=2)
    torch.testing.assert_close(middle, cache["resid_post", 1], rtol=0, atol=0)


@torch.no_grad()
def test_blocks_not_asked_for_do_not_run():
    model = random_model(tiny_config(num_hidden_layers=3))
    ran: list[int] = []

    def see(value: torch.Tensor, hook: Any) -> None:
        ran.append(hook.layer())

    with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_resid_pre"), see)]):
        resid = model(IDS, stop_at_layer=2)
        model(resid, start_at_layer=2)
    assert ran == [0, 1, 2]


# --- the true shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["125m", "350m"])
@torch.no_grad()
def test_true_shapes_equal_transformers(size):
    """Random weights of the published shapes, in float32."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig.from_name(size))
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    for name, weight in model.named_parameters():
        weight.normal_(1.0 if "norm.weight" in name else 0.0, 0.04)
    config = transformers.OPTConfig(**model.config.to_dict())
    with torch.device("meta"):
        twin = transformers.OPTForCausalLM._from_config(config, attn_implementation="sdpa")
    twin.load_state_dict(model.state_dict(), assign=True)
    ids = torch.randint(4, 50265, (2, 9))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    ours, theirs = model(ids, attention_mask=mask), twin.eval()(ids, attention_mask=mask)
    assert_near(ours.logits[mask.bool()], theirs.logits[mask.bool()])
    assert model.config.parameter_count() == {"125m": 125_239_296, "350m": 331_196_416}[size]
