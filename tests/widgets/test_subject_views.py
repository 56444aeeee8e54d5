"""The views of neurons and of sweeps: their numbers, their selection, their files."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config
from sweep_results import HOSTILE, make_result

from optlens import checks, neurons
from optlens.widgets import LensView, NeuronsView, PatchingView, neurons_part
from optlens.widgets.neurons_part import NeuronsPart
from optlens.widgets.page import contents
from optlens.widgets.part import QuestionError
from optlens.widgets.patching_part import PatchingPart

TEXT = torch.arange(2, 62).remainder(41)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


@pytest.fixture(scope="module")
def examples(model):
    found = neurons.top_examples(model, TEXT, k=3, window=12, progress=False)
    found.metadata["labels"] = {str(token): text for token, text in HOSTILE.items()}
    return found


@pytest.fixture(scope="module")
def effect(model):
    return neurons.vocabulary_effect(model, k=4)


# --- neurons -------------------------------------------------------------------------------------


def test_a_neuron_is_shown_with_its_examples_and_its_effect(model, examples, effect):
    part = NeuronsPart(examples, effect)
    answer = part.answer(0, "neuron", layer=1, neuron=3)
    expected = examples.of(1, 3)
    assert [each["ids"] for each in answer["examples"]] == [each.tokens for each in expected]
    for shown, each in zip(answer["examples"], expected, strict=True):
        assert shown["activations"][shown["index"]] == shown["activation"]
        np.testing.assert_allclose(shown["activations"], each.activations, rtol=1e-5)
    direct = neurons.direct_effect(model, 1, 3)
    (token, _, value), *_ = answer["effect"]["promoted"]
    assert token == int(direct.argmax())
    assert value == pytest.approx(float(direct.max() - direct.mean()), rel=1e-4)
    (token, _, value), *_ = answer["effect"]["suppressed"]
    assert token == int(direct.argmin()) and value < 0


def test_the_list_has_the_strongest_activation_and_its_token(examples):
    part = NeuronsPart(examples)
    shown = part.answer(0, "list", layer=1)
    for column, neuron in enumerate(examples.neurons):
        found = examples.of(1, neuron)
        if found:
            best = found[0]
            assert shown["tops"][column] == pytest.approx(best.activation)
            assert shown["triggers"][column] == best.tokens[best.index]
        else:
            assert (shown["tops"][column], shown["triggers"][column]) == (0, -1)
    assert part.answer(0, "neuron", layer=1, neuron=3)["effect"] is None
    for wrong in ({"what": "list", "layer": 9}, {"what": "neuron", "layer": 9, "neuron": 0}):
        with pytest.raises(QuestionError, match="not looked at"):
            part.answer(0, **wrong)


def test_a_page_holds_the_strongest_neurons_of_every_layer_as_far_as_they_fit(
    examples, monkeypatch
):
    monkeypatch.setattr(neurons_part, "_EAGER_LISTED", 0)
    monkeypatch.setattr(neurons_part, "_EAGER_SHOWN", 0)
    part = NeuronsPart(examples)
    assert part.state(0)["lists"] is None and part.state(0)["shown"] == []
    asked = [question for question, _ in part.page_answers(0)]
    assert len(asked) == len(examples.layers) * (1 + len(examples.neurons))
    sizes = [len(json.dumps(a)) for q, a in part.page_answers(0) if q["what"] == "neuron"]
    monkeypatch.setattr(neurons_part, "_PAGE", sum(sizes[:4]))
    shown = [q for q, _ in part.page_answers(0) if q["what"] == "neuron"]
    assert [question["layer"] for question in shown] == [0, 1, 0, 1]
    best = examples.neurons[int(examples.values[1, :, 0].argmax())]
    assert shown[1]["neuron"] == best


def test_results_that_do_not_belong_together_are_refused(model, examples, effect):
    with pytest.raises(TypeError, match="top_examples returns, not VocabularyEffect"):
        NeuronsView(effect)
    with pytest.raises(TypeError, match="vocabulary_effect returns, not str"):
        NeuronsView(examples, "effect")
    other = neurons.vocabulary_effect(random_model(tiny_config(), seed=5), k=4)
    with pytest.raises(ValueError, match="different weights"):
        NeuronsView(examples, other)
    few = neurons.vocabulary_effect(model, neurons=[0], k=4)
    some = neurons.top_examples(model, TEXT, neurons=[1, 2], progress=False)
    with pytest.raises(ValueError, match="No neuron has both"):
        NeuronsView(some, few)


# --- patching ------------------------------------------------------------------------------------


def test_values_are_those_of_the_result():
    result = make_result("layer", "pos", prompts=4)
    result.per_prompt = result.per_prompt * torch.linspace(0.5, 1.5, 4)  # shares differ
    part = PatchingPart(result)
    state = part.state(0)
    np.testing.assert_array_equal(state["values"], result.values)
    np.testing.assert_allclose(state["normalized"], result.normalized, rtol=1e-6)
    low, high = result.interval()
    np.testing.assert_allclose(state["low"], low, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["normalized_high"], result.normalized_interval()[1], rtol=1e-5)
    assert (state["low"] <= high.numpy()).all()
    assert (state["clean"], state["corrupt"]) == (2.0, -2.0) and state["n_prompts"] == 4
    strongest = tuple(state["top"][0])
    assert abs(result.normalized[strongest]) == result.normalized.abs().max()


def test_an_ablation_has_no_corrupt_run():
    state = PatchingPart(make_result("layer", "head", corrupt=float("nan"))).state(0)
    assert state["normalized"] is None and state["corrupt"] is None
    assert state["base"] == state["clean"] == 2.0 and state["pairs"][0]["other"] is None


def test_a_partial_result_says_so():
    result = make_result("layer", "head")
    result.per_prompt[1] = torch.nan
    view = PatchingView(result)
    assert repr(view) == "PatchingView(z: layer=3, head=4, 4 not computed)"
    assert PatchingPart(result).state(0)["missing"] == 4
    assert "Not complete: 4 patches" in str(view._fallback())
    result.undefined = result.per_prompt.isnan().any(-1)  # that is what the metric says
    view = PatchingView(result)
    assert repr(view) == "PatchingView(z: layer=3, head=4)"
    assert PatchingPart(result).state(0)["missing"] == 0
    assert "Not complete" not in str(view._fallback())


def test_a_table_of_four_axes_is_drawn_where_the_metric_is_nan():
    result = make_result("component", "layer", "head", "pos")
    result.per_prompt[0, 1, 2, 3] = torch.nan
    result.undefined = result.per_prompt.isnan().any(-1)
    assert PatchingPart(result).figure({}, "light", False).axes


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(TypeError, match="result of a sweep"):
        PatchingView(torch.zeros(3))
    result = make_result("layer", "head")
    result.per_prompt = torch.zeros(300, 1001, 1)
    with pytest.raises(checks.InputError, match="300,300 patches"):
        PatchingView(result)


def test_the_selection_names_the_patch_and_is_linked_to_other_views(model):
    result = make_result("layer", "head", "pos")
    view = PatchingView(result)
    last = {"layer": 2, "head": 3, "query": 4}  # the strongest
    assert view.selected | last == view.selected
    assert PatchingView(result).selection is view.selection
    recording = model.record(torch.tensor([2, 5, 17, 5, 9]))
    lens = LensView(recording)
    linked = PatchingView(make_result("layer", "head"), selection=lens.selection)
    lens.selected = {"layer": 1, "head": 2}
    assert linked.selected["head"] == 2
    assert linked._parts[0]._index(linked.selected) == (1, 2)


# --- both ----------------------------------------------------------------------------------------


@pytest.fixture(params=["neurons", "patching", "three axes", "one axis"])
def view(request, examples, effect):
    if request.param == "neurons":
        return NeuronsView(examples, effect)
    axes = {"patching": ("layer", "pos"), "three axes": ("component", "layer", "pos")}
    return PatchingView(make_result(*axes.get(request.param, ("pos",)), labels=HOSTILE))


def test_files_are_written_and_the_same_twice(view, tmp_path):
    for kind in ("html", "png", "svg"):
        paths = [tmp_path / f"{number}.{kind}" for number in range(2)]
        for path in paths:
            getattr(view, f"to_{kind}")(path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    for detail in (False, True):
        assert view.figure("dark", detail).get_facecolor()[0] < 0.2
    page = (tmp_path / "0.html").read_text(encoding="utf-8")
    assert "default-src &#x27;none&#x27;" in page and "\u202e" not in page
    assert not re.search(r"<script>document|<img src=http", page)
    json.dumps(contents(view), allow_nan=False)


def test_plain_markup_is_a_table_of_text(view):
    bundle, _ = view._repr_mimebundle_()
    assert "<table" in bundle["text/html"] and bundle["text/plain"] == repr(view)
    assert "<script" not in bundle["text/html"] and "0x" not in repr(view)
    assert re.fullmatch(r"<.*View\(.*\), static>", repr(view.static()))
