"""What the attention view says about one score: its parts add up, and its weight is the recorded one."""

import json

import numpy as np
import pytest
import torch
from conftest import VARIANTS, random_model, tiny_config

from optlens import Ablate
from optlens.recording import Recording
from optlens.widgets import AttentionView, attention_part, query_keys
from optlens.widgets.attention_part import AttentionPart
from optlens.widgets.part import QuestionError

IDS = torch.tensor([2, 5, 17, 5, 9, 30])
FULL = ("attention", "q", "k")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


@pytest.fixture
def runs(model, monkeypatch):
    """Count the runs of the model."""
    made, record = [], type(model).record

    def counted(self, *given, **options):
        made.append(options)
        return record(self, *given, **options)

    monkeypatch.setattr(type(model), "record", counted)
    return made


def detail(recording, layer=1, head=2, query=4, prompt=0):
    return AttentionPart(recording).answer(prompt, "detail", layer=layer, head=head, query=query)


def check(answer, weights):
    """The products add up to the scores, whose softmax are the recorded weights."""
    products = answer["q"] * answer["k"] * answer["scale"]  # [key, d_head]
    np.testing.assert_allclose(products.sum(-1), answer["scores"], rtol=1e-5, atol=1e-5)
    softmax = torch.from_numpy(answer["scores"]).softmax(-1)
    torch.testing.assert_close(softmax, weights, rtol=1e-4, atol=1e-6)  # sums in another order
    np.testing.assert_allclose(answer["weights"], softmax, rtol=1e-4, atol=1e-6)
    assert answer["agrees"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("what", ["attention", FULL])
def test_products_add_up_to_the_score_and_its_softmax_is_the_weight(variant, what):
    model = random_model(tiny_config(**VARIANTS[variant]))
    recording = model.record(IDS, what=what)
    for layer in range(2):
        answer = detail(recording, layer)
        check(answer, recording.attention[layer, 2, 4, :5])
        _, cache = model.run_with_cache(IDS[None])
        assert answer["scale"] == 8**-0.5 and answer["q"].dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(answer["q"]), cache["q", layer][0, 4, 2])
        scores = cache["attn_scores", layer][0, 2, 4, :5]
        torch.testing.assert_close(torch.from_numpy(answer["scores"]), scores, rtol=1e-4, atol=1e-5)


def test_the_biases_are_in_query_and_key(model):
    answer = detail(model.record(IDS, what="attention"))
    _, cache = model.run_with_cache(IDS[None])
    attention = model.decoder.layers[1].self_attn
    bias = attention.k_proj.bias.detach()[2 * 8 : 3 * 8]
    read = cache["blocks.1.ln1.hook_normalized"][0, :5]
    norm = model.decoder.layers[1].self_attn_layer_norm
    weight = attention.k_proj.weight.detach()[2 * 8 : 3 * 8]
    expected = (read * norm.weight + norm.bias).detach() @ weight.T + bias
    torch.testing.assert_close(torch.from_numpy(answer["k"]), expected, rtol=1e-4, atol=1e-5)


def test_one_run_serves_all_questions_and_none_is_made_without_need(model, runs, monkeypatch):
    part = AttentionPart(model.record(IDS, what="attention"))
    assert part.state(0)["obstacle"] is None and len(runs) == 1
    for layer, head in ((0, 0), (1, 3), (0, 2)):
        part.answer(0, "detail", layer=layer, head=head, query=3)
    assert len(runs) == 2
    detail(model.record(IDS, what=FULL))
    assert len(runs) == 3
    monkeypatch.setattr(query_keys, "BYTES_KEPT", 0)  # a layer at a time, the last one kept
    for layer in (0, 0, 1, 1):
        part.answer(0, "detail", layer=layer, head=1, query=3)
    assert [run["layers"] for run in runs[3:]] == [[0], [1]] and len(part.query_keys._runs) == 1


@pytest.mark.parametrize("what", ["attention", FULL])
def test_a_prompt_of_a_padded_batch_has_its_own_scores(model, what):
    ids = torch.tensor([[1, 1, 2, 8, 9], [2, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    both = model.record(ids, what=what, attention_mask=mask)
    short = detail(both, query=2, prompt=0)
    check(short, both.attention[0, 1, 2, 4, 2:])
    check(detail(both, query=4, prompt=1), both.attention[1, 1, 2, 4])
    alone = detail(model.record(ids[0, 2:], what=what), query=2)
    np.testing.assert_allclose(short["k"], alone["k"], rtol=1e-4, atol=1e-5)


def test_a_part_of_the_recording_is_named_by_its_own_numbers(model):
    recording = model.record(IDS, what=FULL, layers=[1], heads=[3], pos=[1, 4])
    check(detail(recording, head=3, query=1), recording.attention[0, 0, 1, :5])
    for wrong, message in (
        ({"layer": 0, "head": 3}, "no layer 0"),
        ({"head": 0}, "no head 0"),
        ({"head": 3, "query": 2}, "no recorded query 2"),
    ):
        with pytest.raises(QuestionError, match=message):
            detail(recording, **wrong)


def test_half_precision_agrees_within_its_rounding():
    model = random_model(tiny_config(), dtype=torch.bfloat16)
    for what in ("attention", FULL):
        assert detail(model.record(IDS, what=what))["agrees"]


# --- what cannot be computed ---------------------------------------------------------------------


def test_a_run_under_interventions_is_not_run_again(model):
    cut = Ablate("z", layer=0, head=1)
    recording = model.record(IDS, what="attention", interventions=[cut])
    part = AttentionPart(recording)
    assert "interventions" in part.state(0)["obstacle"]
    with pytest.raises(QuestionError, match=r"what=\('attention', 'q', 'k'\), interventions="):
        part.answer(0, "detail", layer=1, head=2, query=4)
    held = model.record(IDS, what=FULL, interventions=[cut])
    check(detail(held), held.attention[1, 2, 4, :5])
    assert AttentionPart(held).state(0)["obstacle"] is None
    changed = model.record(IDS, what=FULL, interventions=[Ablate("pattern", layer=1, head=2)])
    assert not detail(changed)["agrees"] and detail(changed, head=1)["agrees"]


def test_a_recording_without_its_model_says_what_to_do(model, tmp_path):
    model.record(IDS, what="attention").save(tmp_path / "rec.safetensors")
    loaded = Recording.load(tmp_path / "rec.safetensors")
    with pytest.raises(QuestionError, match=r"rec\.attach\(model\)"):
        detail(loaded)
    check(detail(loaded.attach(model)), loaded.attention[1, 2, 4, :5])


def test_a_model_that_has_changed_since_is_noticed():
    model = random_model(tiny_config())
    part = AttentionPart(model.record(IDS, what="attention"))
    wanted = {"layer": 1, "head": 2, "query": 4}
    with model.hooks([("blocks.0.hook_resid_pre", lambda value, hook: 2 * value)]):
        with pytest.raises(QuestionError, match="hooks are attached"):
            part.answer(0, "detail", **wanted)
    weight = model.decoder.layers[0].fc2.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3.0)
    with pytest.raises(QuestionError, match="other weights than this recording"):
        part.answer(0, "detail", **wanted)
    with torch.no_grad():
        weight.copy_(before)
    assert part.answer(0, "detail", **wanted)["agrees"]


# --- pages ---------------------------------------------------------------------------------------


def test_a_page_holds_the_last_query_of_each_head_where_that_is_little(
    model, tmp_path, monkeypatch
):
    def asked(part: AttentionPart) -> list[dict]:
        return [q for q, _ in part.page_answers(0) if q["what"] == "detail"]

    recording = model.record(IDS, what="attention")
    expected = [
        {"what": "detail", "layer": layer, "head": head, "query": 5}
        for layer in range(2)
        for head in range(4)
    ]
    assert asked(AttentionPart(recording)) == expected
    view = AttentionView(recording)
    view.to_html(tmp_path / "a.html")
    view.to_html(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert json.dumps("detail") in (tmp_path / "a.html").read_text()
    cut = model.record(IDS, what="attention", interventions=[Ablate("z", layer=0, head=1)])
    assert asked(AttentionPart(cut)) == []
    numbers = 2 * 4 * 7 * 8  # layers, heads, the query with its keys, d_head
    monkeypatch.setattr(attention_part, "DETAIL_BYTES", 4 * numbers)
    assert asked(AttentionPart(recording)) == expected
    monkeypatch.setattr(attention_part, "DETAIL_BYTES", 4 * numbers - 1)
    assert asked(AttentionPart(recording)) == []
