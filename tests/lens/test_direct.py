"""Direct logit attribution: its terms add up, each is what removing its part alone does, and it finds heads that matter."""

from __future__ import annotations

import pytest
import torch
from conftest import TOL, VARIANTS, padded, random_model, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import optlens
from optlens import Ablate, Knockout, Patch, direct_logit_attribution, metrics, prompts
from optlens.checks import InputError
from optlens.names import get_act_name
from optlens.recording import NotRecordedError

ADDITIVE = [name for name, options in VARIANTS.items() if options.get("do_layer_norm_before", True)]
TOKENS = torch.tensor([2, 10, 20, 30, 10, 50, 60])
WHAT = ("residual", "embed", "pos_embed", "z", "mlp_out")
IOI = "When Mary and John went to the store, John gave a drink to"
CLOSE = TOL[torch.float64]


@pytest.fixture(params=ADDITIVE, ids=str)
def model(request: pytest.FixtureRequest):
    return random_model(tiny_config(**VARIANTS[request.param]), torch.float64)


@pytest.fixture(scope="module")
def demo():
    return optlens.load()


def change_when_alone(model, name: str, edit, column: int, frozen: list[str]) -> torch.Tensor:
    """Return how logits `[d_vocab]` change when one value is edited and others are held as they were."""
    held = [*frozen, *(["ln_final.hook_scale"] if model.config.has_final_layer_norm else [])]
    logits, cache = model.run_with_cache(TOKENS, [name, *held])
    hooks = [(each, lambda value, hook: cache[hook.name]) for each in held]
    edited = model.run_with_hooks(TOKENS, [(name, edit), *hooks])
    return (logits - edited)[0, column]


def writers(model, after: str) -> list[str]:
    """Return what later parts add to the stream, as hook names, from the part `after` on."""
    layers = range(model.config.n_layers)
    names = [get_act_name(site, layer) for layer in layers for site in ("attn_out", "mlp_out")]
    return names[names.index(after) + 1 :] if after in names else names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ADDITIVE)
def test_terms_add_up_to_the_models_own_logit(name, dtype):
    model = random_model(tiny_config(**VARIANTS[name]), dtype)
    logits = model(TOKENS).logits[0].detach()
    for pos in (-1, 3):
        one = direct_logit_attribution(model, TOKENS, 7, pos=pos)
        torch.testing.assert_close(one.total, logits[pos, 7], **TOL[dtype])
        torch.testing.assert_close(one.sum, logits[pos, 7], **TOL[dtype])
        both = direct_logit_attribution(model, TOKENS, 7, 8, pos=pos)
        torch.testing.assert_close(both.sum, logits[pos, 7] - logits[pos, 8], **TOL[dtype])
        assert one.error.abs() < (1e-5 if dtype == torch.float32 else 1e-12)
        assert one.values.dtype == dtype


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(ADDITIVE),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 8]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_terms_add_up_on_any_model_and_padded_batch(
    name, dtype, n_layers, n_heads, lengths, left, seed
):
    sizes = {"num_hidden_layers": n_layers, "num_attention_heads": n_heads}
    model = random_model(tiny_config(**VARIANTS[name], **sizes), dtype, seed)
    tokens, mask = padded(lengths, left, seed)
    rec = model.record(tokens, what=(*WHAT, "attention", "v"), attention_mask=mask)
    found = direct_logit_attribution(model, rec, 5, 6, by_source=True)
    assert found.error.abs().max() < (1e-4 if dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(found.sources.sum(-1), found.heads, **TOL[dtype])
    for number in range(len(lengths)):
        real = mask[number].bool()
        alone = direct_logit_attribution(model, tokens[number][real], 5, 6, by_source=True)
        torch.testing.assert_close(found.values[number], alone.values, **TOL[dtype])
        torch.testing.assert_close(found.sources[number][..., real], alone.sources, **TOL[dtype])
        assert (found.sources[number][..., ~real] == 0).all()


def test_each_term_is_what_removing_that_part_alone_does(model):
    column = 4
    logits_of = [7, 8]
    found = direct_logit_attribution(model, TOKENS, 7, 8, pos=column)
    checked = {"ln_final.bias"}

    def check(part: str, name: str, edit, frozen: list[str]) -> None:
        change = change_when_alone(model, name, edit, column, frozen)
        expected = change[logits_of[0]] - change[logits_of[1]]
        torch.testing.assert_close(found[part], expected, **CLOSE)
        checked.add(part)

    def erase(value, hook):
        value[:, column] = 0.0

    for part in ("embed", "pos_embed"):
        check(part, f"hook_{part}", erase, writers(model, "all"))
    for layer, block in enumerate(model.decoder.layers):
        out = get_act_name("attn_out", layer)
        for head in range(model.config.n_heads):

            def erase_head(z, hook, head=head):
                z[:, column, head] = 0.0

            check(f"L{layer}H{head}", get_act_name("z", layer), erase_head, writers(model, out))
        bias = block.self_attn.out_proj.bias
        if bias is not None:

            def without_bias(value, hook, bias=bias):
                value[:, column] -= bias.detach()

            check(f"b_O{layer}", out, without_bias, writers(model, out))
        name = get_act_name("mlp_out", layer)
        check(f"mlp{layer}", name, erase, writers(model, name))
    assert checked >= set(found.labels)


def test_each_source_is_what_its_value_alone_does(model):
    column = 4
    found = direct_logit_attribution(model, TOKENS, 7, 8, pos=column, by_source=True)
    frozen = writers(model, get_act_name("attn_out", 1))
    for head in range(model.config.n_heads):
        for key in (0, 2, column):

            def erase(v, hook, head=head, key=key):
                v[:, key, head] = 0.0

            change = change_when_alone(model, get_act_name("v", 1), erase, column, frozen)
            torch.testing.assert_close(found.sources[1, head, key], change[7] - change[8], **CLOSE)
    assert (found.sources[..., column + 1 :] == 0).all()


def test_several_acceptable_answers_count_by_their_mean(model):
    parts = [direct_logit_attribution(model, TOKENS, token, 8).values for token in (7, 9)]
    both = direct_logit_attribution(model, TOKENS, [[7, 9]], 8)
    torch.testing.assert_close(both.values, (parts[0] + parts[1]) / 2, **CLOSE)


def test_parts_that_a_model_has_not_are_absent():
    def names(**options):
        return direct_logit_attribution(random_model(tiny_config(**options)), TOKENS, 7).labels

    heads = [f"L0H{head}" for head in range(4)]
    start = ["embed", "pos_embed", *heads]
    assert names(num_hidden_layers=1) == [*start, "b_O0", "mlp0", "ln_final.bias"]
    assert names(num_hidden_layers=1, enable_bias=False) == [*start, "mlp0", "ln_final.bias"]
    for option in ({"layer_norm_elementwise_affine": False}, {"_remove_final_layer_norm": True}):
        assert names(num_hidden_layers=1, **option) == [*start, "b_O0", "mlp0"]


def test_a_bias_of_the_unembedding_has_its_term(tiny_model):
    plain = direct_logit_attribution(tiny_model, TOKENS, 7, 8)
    tiny_model.lm_head.bias = torch.nn.Parameter(torch.arange(101.0))
    found = direct_logit_attribution(tiny_model, TOKENS, 7, 8)
    assert float(found["b_U"]) == -1.0
    torch.testing.assert_close(found.values[:-1], plain.values)
    assert found.error.abs() < 1e-4


def test_result_sorts_the_terms_by_kind_and_layer(model):
    found = direct_logit_attribution(model, TOKENS, 7, 8)
    assert found.heads.shape == (2, 4)
    torch.testing.assert_close(found.heads[1, 2], found["L1H2"])
    torch.testing.assert_close(found.mlps[1], found["mlp1"])
    constant = found["ln_final.bias"] if "ln_final.bias" in found.labels else 0.0
    start = found["embed"] + found["pos_embed"] + constant
    torch.testing.assert_close(found.accumulated[0], start)
    torch.testing.assert_close(found.accumulated.diff(), found.layers)
    torch.testing.assert_close(found.accumulated[-1], found.total, **CLOSE)


def test_accumulated_reads_every_row_with_the_final_scale(model):
    """The logit lens, with the scale of the last row."""
    rec = model.record(TOKENS, what=WHAT)
    found = direct_logit_attribution(model, rec, 7, 8)
    h, norm = rec.residual[:, -1], model.decoder.final_layer_norm
    if norm is not None:
        scale = (h[-1].var(correction=0) + norm.eps).sqrt()
        h = (h - h.mean(-1, keepdim=True)) / scale
        if norm.weight is not None:
            h = h * norm.weight + norm.bias
    logits = (h @ model.W_U if model.decoder.project_out is None else
              model.decoder.project_out(h) @ model.lm_head.weight.T).detach()  # fmt: skip
    torch.testing.assert_close(found.accumulated, logits[:, 7] - logits[:, 8], **CLOSE)


# --- on the demo checkpoint --------------------------------------------------------------------


@pytest.mark.parametrize(("task", "finds"), [("ioi", 1), ("gender", 1), ("facts", 2)])
def test_heads_that_write_the_answer_are_those_whose_ablation_costs_most(demo, task, finds):
    """In the layers that only the last MLP reads, direct terms and full ablations name the same heads."""
    pairs = getattr(prompts, task)(demo, 12, seed=1)
    found = direct_logit_attribution(demo, pairs.clean, pairs.answers, pairs.wrong)
    assert found.error.abs().max() < 1e-4
    metric = metrics.logit_diff(pairs.answers, pairs.wrong)
    ablated = optlens.ablate_sweep(
        demo, pairs.clean, "z", mode="zero", metric=metric, layers=[3, 4]
    )
    cost = ablated.clean - ablated.values
    direct = found.heads.mean(0)[3:]
    strongest = set(direct.flatten().topk(finds).indices.tolist())
    assert strongest == set(cost.flatten().topk(finds).indices.tolist())
    assert (cost.flatten()[list(strongest)] > direct.flatten()[list(strongest)]).all()


def test_the_token_that_the_answer_is_read_from_is_the_one_whose_cut_costs_it(demo):
    """This model brings the other name to where the first one stands again, and L3H0 reads it there."""
    pairs = prompts.ioi(demo, 6, seed=1)
    for pair in pairs:
        metric = metrics.logit_diff(pair.answer, pair.wrong)
        found = direct_logit_attribution(demo, pair.clean, pair.answer, pair.wrong, by_source=True)
        key = int(found.sources[3, 0].argmax())
        assert key == pair.spans["S2"]
        assert found.sources[3, 0, key] > 0.99 * found.heads[3, 0]
        with demo.intervene([Knockout(layers=3, query=-1, key=key, heads=0)]):
            cut = metric.of(demo, pair.clean)
        assert found.total - cut > found.sources[3, 0, key]


def test_a_batch_of_texts_equals_the_texts_alone(demo):
    texts = [IOI, "Then, while Anna and Mark were at the school, Anna gave a book to"]
    answers, wrong = [" Mary", " John"], [" John", " Mary"]
    both = direct_logit_attribution(demo, texts, answers, wrong, by_source=True)
    assert both.is_batch and both.heads.shape == (2, 5, 8) and both.error.shape == (2,)
    for number, text in enumerate(texts):
        alone = direct_logit_attribution(demo, text, answers[number], wrong[number], by_source=True)
        assert not alone.is_batch
        torch.testing.assert_close(both.values[number], alone.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.heads[number], alone.heads, rtol=1e-4, atol=1e-5)
        n = alone.sources.shape[-1]
        torch.testing.assert_close(both.sources[number, ..., -n:], alone.sources, rtol=1e-4, atol=1e-5)  # fmt: skip


def test_table_figure_and_words(demo):
    one = direct_logit_attribution(demo, IOI, " Mary", " John")
    pytest.importorskip("pandas")
    table = one.to_dataframe()
    assert list(table.columns) == ["component", "kind", "layer", "head", "value"]
    assert table.value.sum() == pytest.approx(float(one.total), abs=1e-4)
    row = table[table.component == "L3H1"].iloc[0]
    assert (row.kind, row.layer, row["head"]) == ("head", 3, 1)
    assert table.kind.nunique() == 6 and table.layer.isna().sum() == 3
    both = direct_logit_attribution(demo, [IOI, IOI], " Mary", " John")
    assert both.to_dataframe().groupby("prompt").value.sum().shape == (2,)

    figure = one.plot(most=5)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[:-2] == [name for name in one.labels if name in dict(one.top(5))]
    assert figure.axes[0].texts[-1].get_text() == f"{float(one.total):.2f}"
    assert both.plot().axes[0].texts[-1].get_text() == f"{float(one.total):.2f}"
    assert one.top(1)[0][0] == "mlp4" and "mlp4" in repr(one) and "2 prompts" in repr(both)


# --- recordings, and what is refused -----------------------------------------------------------


def test_recordings_are_enough(tiny_model, tmp_path):
    direct = direct_logit_attribution(tiny_model, TOKENS, 7, 8, by_source=True)
    rec = tiny_model.record(TOKENS, what=(*WHAT, "attention", "v"))
    rec.save(tmp_path / "rec.safetensors")
    loaded = optlens.Recording.load(tmp_path / "rec.safetensors")
    spelt = tiny_model.record(
        TOKENS,
        what=["residual", "hook_embed", "hook_pos_embed"]
        + [get_act_name(n, i) for n in ("z", "mlp_out", "pattern", "v") for i in (0, 1)],
    )
    for recording in (rec, loaded, spelt):
        found = direct_logit_attribution(tiny_model, recording, 7, 8, by_source=True)
        torch.testing.assert_close(found.values, direct.values)
        torch.testing.assert_close(found.sources, direct.sources)
    part = tiny_model.record(TOKENS, what=WHAT, pos=[2, -1])
    torch.testing.assert_close(
        direct_logit_attribution(tiny_model, part, 7, 8).values, direct.values
    )


def test_what_a_recording_lacks_is_named(tiny_model):
    for missing in WHAT:
        rec = tiny_model.record(TOKENS, what=[name for name in WHAT if name != missing])
        name = missing if missing not in ("embed", "pos_embed") else f"hook_{missing}"
        with pytest.raises(NotRecordedError, match=f"not '{name}'"):
            direct_logit_attribution(tiny_model, rec, 7)
    with pytest.raises(NotRecordedError, match="not 'attention'"):
        direct_logit_attribution(
            tiny_model, tiny_model.record(TOKENS, what=WHAT), 7, by_source=True
        )
    with pytest.raises(NotRecordedError, match="without layers="):
        direct_logit_attribution(tiny_model, tiny_model.record(TOKENS, what=WHAT, layers=[1]), 7)
    with pytest.raises(NotRecordedError, match="without heads="):
        direct_logit_attribution(tiny_model, tiny_model.record(TOKENS, what=WHAT, heads=[1]), 7)
    with pytest.raises(NotRecordedError, match=r"reads pos=3.*positions \[2, 6\] only"):
        direct_logit_attribution(
            tiny_model, tiny_model.record(TOKENS, what=WHAT, pos=[2, -1]), 7, pos=3
        )
    rec = tiny_model.record(TOKENS, what=(*WHAT, "attention", "v"), pos=-1)
    with pytest.raises(NotRecordedError, match="all 7 positions"):
        direct_logit_attribution(tiny_model, rec, 7, by_source=True)


def test_what_makes_no_sense_is_refused(tiny_model):
    with pytest.raises(InputError, match="post-LN"):
        post = random_model(tiny_config(**VARIANTS["post_ln_350m"]))
        direct_logit_attribution(post, TOKENS, 7)
    with pytest.raises(InputError, match="both answer and wrong answer"):
        direct_logit_attribution(tiny_model, TOKENS, 7, 7)
    with pytest.raises(InputError, match="pos=7"):
        direct_logit_attribution(tiny_model, TOKENS, 7, pos=7)
    with pytest.raises(InputError, match="no part 'L9H9'; parts are named like embed, pos_embed"):
        direct_logit_attribution(tiny_model, TOKENS, 7)["L9H9"]
    with pytest.raises(InputError, match="model is None"):
        optlens.lens.source.recording_of(None, TOKENS, WHAT)
    other = random_model(tiny_config(), seed=1)
    with pytest.raises(ValueError, match="not the model that was recorded"):
        direct_logit_attribution(other, tiny_model.record(TOKENS, what=WHAT), 7)
    with pytest.raises(InputError, match="ln_final"):
        with tiny_model.hooks([("ln_final.hook_scale", lambda scale, hook: 2 * scale)]):
            direct_logit_attribution(tiny_model, TOKENS, 7)


def test_interventions_on_parts_show_in_their_terms_and_others_in_the_error(tiny_model):
    with tiny_model.intervene([Ablate("z", layer=1, head=2, mode="zero")]):
        found = direct_logit_attribution(tiny_model, TOKENS, 7, 8)
    assert found["L1H2"] == 0 and found.error.abs() < 1e-5
    with tiny_model.intervene([Patch("resid_post", layer=0, pos=-1, value=torch.ones(32).sin())]):
        found = direct_logit_attribution(tiny_model, TOKENS, 7, 8)
    assert found.error.abs() > 1e-2
