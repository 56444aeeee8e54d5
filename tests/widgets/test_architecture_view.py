"""The architecture view: numbers are those of a run with a cache, lines of code those of the source."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VARIANTS, padded, random_model, tiny_config
from twice import has_three_pictures, same_when_made_again

import optlens
from optlens import names
from optlens.checks import InputError
from optlens.model import LayerNorm, OPTAttention, OPTDecoderLayer
from optlens.recording import NotRecordedError
from optlens.widgets import ArchitectureView, LensView, branches
from optlens.widgets.activation_stats import MEASURES, SHOWN
from optlens.widgets.architecture_part import code_of
from optlens.widgets.code_lines import lines_calling
from optlens.widgets.stages import COPIES, stages_of

IDS = torch.tensor([2, 5, 17, 5, 9, 30])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


def by_name(view, prompt=0) -> dict:
    return view._parts[0].measured[prompt]


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_number_is_that_of_a_run_with_a_cache(name):
    model = random_model(tiny_config(**VARIANTS[name]))
    view = ArchitectureView(model, IDS)
    logits, cache = model.run_with_cache(IDS, lambda name: True)
    _, optional = model.run_with_cache(IDS, lambda name: name.endswith("hook_result"))
    values = {
        **{name: cache[name] for name in cache},
        **{name: optional[name] for name in optional},
    }
    values["lm_head"] = logits
    found = by_name(view)
    wanted = {n for n in names.hook_names(model.config) if n.rpartition(".")[2] not in COPIES}
    assert {n for n in found if "hook" in n} == wanted
    for tensor in wanted | {"lm_head"}:
        value, got = values[tensor][0], found[tensor]
        assert got.shape == tuple(value.shape), tensor
        seen = value[value > -torch.inf]
        expected = [seen.mean(), seen.std(correction=0), seen.min(), seen.max(), seen.norm()]
        expected += [(value == 0).float().mean(), (value == -torch.inf).float().mean()]
        # sums in another order, of numbers that may cancel
        np.testing.assert_allclose(got.measures, torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert got.counts.sum() == seen.numel()
    assert view._parts[0].parameters() == sum(p.numel() for p in model.parameters())


def test_the_first_numbers_are_those_of_the_last_token_and_of_head_0(model):
    found = by_name(ArchitectureView(model, IDS))
    _, cache = model.run_with_cache(IDS)
    for name, place in (
        ("hook_resid_mid", (-1,)),
        ("attn.hook_z", (-1, 0)),
        ("attn.hook_pattern", (0, -1)),
    ):
        value = cache[f"blocks.1.{name}"][0][place]
        np.testing.assert_allclose(
            found[f"blocks.1.{name}"].shown, value[:SHOWN], rtol=1e-5, atol=1e-6
        )


def test_stages_stand_in_the_order_in_which_the_model_computes_them(model):
    fired = []
    with model.recorders(model.hook_dict.values(), lambda value, hook: fired.append(hook.name)):
        model(IDS)
    view = ArchitectureView(model, IDS)
    part = view._parts[0]
    order = [part.stages[number].name(layer) for number, layer in part.order]
    assert [name for name in order if "hook" in name] == [
        name for name in fired if name.rpartition(".")[2] not in COPIES
    ]
    assert order[-1] == "lm_head"


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_in_no_number(model, left):
    tokens, mask = padded([3, 6], left=left, seed=1)
    view = ArchitectureView(model.record(tokens, attention_mask=mask))
    real = mask.bool()
    for prompt in range(2):
        alone = by_name(ArchitectureView(model, tokens[prompt][real[prompt]]))
        for name, one in by_name(view, prompt).items():
            assert one.shape == alone[name].shape, name
            np.testing.assert_allclose(one.measures, alone[name].measures, rtol=1e-3, atol=1e-4)
    state = view._parts[0].state(1)
    assert state["measures"].shape == (len(state["order"]), len(MEASURES))


def test_it_measures_under_interventions_and_refuses_a_recording_made_with_them(model):
    cut = optlens.Ablate("mlp_out", layer=1, mode="zero")
    with model.intervene([cut]):
        view = ArchitectureView(model, IDS)
    assert by_name(view)["blocks.1.hook_mlp_out"].measures[MEASURES.index("zeros")] == 1
    with pytest.raises(InputError, match="inside of the same `with model.intervene"):
        ArchitectureView(model.record(IDS, interventions=[cut]))


def test_the_model_runs_once_under_its_lock_and_is_left_as_it_was(model, monkeypatch):
    recording = model.record(IDS)
    held = []
    forward = type(model).forward

    def watched(self, *given, **more):
        held.append(branches.lock_of(model)._is_owned())
        return forward(self, *given, **more)

    monkeypatch.setattr(type(model), "forward", watched)
    model.train()
    ArchitectureView(recording)
    assert held == [True]
    assert model.training and not any(p.listening for p in model.hook_dict.values())
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()


# --- the source ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_stage_shows_the_lines_that_name_it_as_they_stand_in_the_source(name):
    model = random_model(tiny_config(**VARIANTS[name]))
    for stage in stages_of(model.config):
        code = code_of(model, stage)
        assert code, stage.key
        named = stage.key.rpartition(".")[2] + "("
        marked = [line for _, line, marked in code[0].lines if marked]
        assert marked and all(f"self.{named}" in line for line in marked), stage.key
        for excerpt in code:
            source = (ROOT / excerpt.file).read_text(encoding="utf-8").splitlines()
            for number, line, _ in excerpt.lines:
                assert source[number - 1].strip() == line.strip()
        assert stage.formula and stage.meaning


def test_lines_come_with_what_made_their_arguments():
    def text(owner, attribute):
        return [line for _, line, _ in lines_calling(owner, attribute)[0].lines]

    assert text(LayerNorm, "hook_scale")[0].startswith("scale = inverse.reciprocal()")
    assert text(OPTDecoderLayer, "hook_pre")[1:3] == [
        "if self.pre_ln:", "    mlp_in = self.final_layer_norm(mlp_in)",
    ]  # fmt: skip
    assert (
        text(OPTDecoderLayer, "hook_resid_post")[-1]
        == "return self.hook_resid_post(resid_post), pattern"
    )
    z = text(OPTAttention, "hook_z")
    assert z[2] == "else:" and "scaled_dot_product_attention" in z[3]
    scores = lines_calling(OPTAttention, "hook_attn_scores")
    assert [each.function for each in scores] == [
        "OPTAttention._attend_explicitly",
        "AttentionMask.scores",
    ]
    assert lines_calling(OPTAttention, "hook_nothing") == []


def test_a_matrix_that_another_function_applies_is_shown_too(model):
    stages = {stage.key: stage for stage in stages_of(model.config)}
    text = [line for each in code_of(model, stages["hook_attn_out"]) for _, line, _ in each.lines]
    assert any("self.out_proj(" in line for line in text)


# --- the view ------------------------------------------------------------------------------------


def test_it_takes_a_recording_or_a_model_with_a_prompt(model):
    recording = model.record(IDS)
    view, lens = ArchitectureView(recording), LensView(recording)
    lens.selected = {"layer": 0}
    assert view.selected["layer"] == 0
    alone = ArchitectureView(model, IDS)
    assert set(alone.recording._tensors) == {"tokens", "mask"}
    with pytest.raises(TypeError, match="takes a recording alone"):
        ArchitectureView(recording, IDS)
    with pytest.raises(TypeError, match="a model with a prompt"):
        ArchitectureView(model)


def test_a_recording_without_its_model_is_refused(model, tmp_path):
    model.record(IDS).save(tmp_path / "rec.safetensors")
    loaded = optlens.Recording.load(tmp_path / "rec.safetensors")
    with pytest.raises(NotRecordedError, match="attach"):
        ArchitectureView(loaded)


def test_pages_names_and_pictures_are_the_same_on_every_run(tmp_path):
    model = random_model(tiny_config(**VARIANTS["post_ln_350m"]))
    view = same_when_made_again(lambda: ArchitectureView(model, IDS), tmp_path)
    has_three_pictures(view, tmp_path)
    assert repr(view) == "ArchitectureView(post-LN, layers=2, heads=4, tokens=6)"
    html = view._repr_mimebundle_()[0]["text/html"]
    rows = re.findall(r"<tr><th>([^<]+)</th><td>([^<]+)</td>", html)
    assert ("blocks.0.attn.hook_pattern", "4 × 6 × 6") in rows and ("project_out", "6 × 16") in rows
    assert len(rows) == len(stages_of(model.config))
