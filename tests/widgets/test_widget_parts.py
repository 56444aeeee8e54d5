"""The numbers behind the views are those of the recording, whatever part of them travels."""

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config

from optlens import circuits, plots
from optlens.recording import NotRecordedError
from optlens.widgets import arrays, attention_part, scores
from optlens.widgets.attention_part import AttentionPart
from optlens.widgets.lens_part import LensPart
from optlens.widgets.part import QuestionError
from optlens.widgets.residual_part import ResidualPart

IDS = torch.tensor([2, 5, 17, 5, 9, 30])
ALL = ("attention", "residual", "logit_lens", "v")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(num_hidden_layers=3))


@pytest.fixture
def recording(model):
    return model.record(IDS, what=ALL)


# --- arrays --------------------------------------------------------------------------------------


def test_pooling_is_that_of_the_figures():
    values = np.random.default_rng(0).random((2, 11, 7)).astype(np.float32)
    small = arrays.pool_max(values, 3)
    for one, whole in zip(small, values, strict=True):
        expected = np.array(
            [
                [whole[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].max() for j in range(3)]
                for i in range(4)
            ]
        )
        np.testing.assert_array_equal(one, expected)
    even = values[0, :6, :6]
    np.testing.assert_array_equal(arrays.pool_max(even, 2), plots.draw.pool_max(even, 3))
    assert [arrays.step_for(*case) for case in ((48, 48), (49, 48), (1024, 48))] == [1, 2, 22]


def test_levels_are_within_half_a_step_and_mask_the_future():
    weights = np.linspace(0, 1, 101)[None, :]
    future = np.zeros((1, 101), bool)
    future[0, 7] = True
    found = arrays.levels(weights, future)
    assert found[0, 7] == arrays.MASKED and (np.delete(found, 7) <= arrays.STEPS).all()
    back = (found / arrays.STEPS) ** 2
    assert np.abs(np.delete(back - weights, 7)).max() < 0.004
    assert arrays.levels(np.array([[np.nan, 1.5]]), np.zeros((1, 2), bool)).tolist() == [[0, 254]]


def test_a_block_is_future_only_if_all_of_it_is():
    future = np.triu(np.ones((5, 5), bool), 1)
    blocks = arrays.pooled_future(future, 2)
    assert blocks.tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_buffers_hold_the_arrays_in_order():
    first, second = np.arange(3, dtype=np.int32), np.ones((2, 2), np.float32)
    content, buffers = arrays.with_buffers({"a": [first, {"b": second}], "c": None})
    assert content["a"][0] == {"dtype": "i4", "shape": [3], "data": 0}
    assert content["a"][1]["b"] == {"dtype": "f4", "shape": [2, 2], "data": 1}
    assert [bytes(buffer) for buffer in buffers] == [first.tobytes(), second.tobytes()]
    strided = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    assert bytes(arrays.with_buffers(strided)[1][0]) == b"\x00\x03\x01\x04\x02\x05"
    assert bytes(arrays.with_buffers(strided[0])[1][0]) == b"\x00\x03"


# --- attention -----------------------------------------------------------------------------------


def test_small_attention_travels_whole_and_exact(recording):
    state = AttentionPart(recording).state(0)
    shown = torch.from_numpy(state["exact"])
    future = torch.ones(6, 6).triu(1).bool()
    assert torch.equal(shown.isnan(), future.expand_as(shown))
    assert torch.equal(shown.nan_to_num(), recording.attention.masked_fill(future, 0))
    assert state["thumbs"].shape == (3, 4, 6, 6) and state["step"] == 1
    assert (state["thumbs"][..., future.numpy()] == arrays.MASKED).all()
    assert (state["layers"], state["heads"]) == ([0, 1, 2], [0, 1, 2, 3])


def test_large_attention_travels_on_request(recording, monkeypatch):
    monkeypatch.setattr(attention_part, "EXACT_CELLS", 0)
    monkeypatch.setattr(attention_part, "EAGER_CELLS", 0)
    monkeypatch.setattr(attention_part, "THUMB", 3)
    part = AttentionPart(recording)
    state = part.state(0)
    assert state["exact"] is None and state["thumbs"] is None and state["step"] == 2
    assert all(score["values"] is None for score in state["scores"])
    pattern = recording.attention[1, 2].numpy()
    thumbs = part.answer(0, "thumbs", layer=1)["levels"]
    np.testing.assert_array_equal(
        thumbs[2], arrays.levels(arrays.pool_max(pattern, 2), np.triu(np.ones((3, 3), bool), 1))
    )
    head = part.answer(0, "head", layer=1, head=2)
    future = np.triu(np.ones((6, 6), bool), 1)
    np.testing.assert_array_equal(head["levels"], arrays.levels(pattern, future))
    row = part.answer(0, "row", layer=1, head=2, query=4)["weights"]
    np.testing.assert_array_equal(row, [*pattern[4, :5], np.nan])


def test_a_part_of_the_recording_is_named_by_its_own_numbers(model):
    recording = model.record(IDS, what=("attention",), layers=[2, 0], heads=[3], pos=[1, -1])
    part = AttentionPart(recording)
    assert part.state(0)["positions"] == [1, 5]
    head = part.answer(0, "row", layer=0, head=3, query=1)["weights"]
    np.testing.assert_array_equal(head, recording.attention[recording.layers.index(0), 0, 1])
    masked = part.answer(0, "row", layer=2, head=3, query=0)["weights"]
    assert np.isnan(masked).tolist() == [False, False, True, True, True, True]
    for wrong in ({"layer": 1, "head": 3}, {"layer": 0, "head": 0}):
        with pytest.raises(QuestionError, match="has no"):
            part.answer(0, "head", **wrong)
    with pytest.raises(QuestionError, match="no recorded query 2"):
        part.answer(0, "row", layer=0, head=3, query=2)
    with pytest.raises(QuestionError, match="cannot answer 'colour'"):
        part.answer(0, "colour")


def test_weights_times_value_lengths_are_shares_of_what_the_head_writes(model, recording):
    part = AttentionPart(recording)
    assert part.state(0)["weighable"]
    layer, head, query = 1, 2, 4
    value = recording["v", layer][:, head]  # [pos, d_head]
    written = (value @ model.W_O[layer, head].detach()).norm(dim=-1)
    weighed = recording.attention[layer, head, query] * written
    row = part.answer(0, "row", layer=layer, head=head, query=query, weighted=True)["weights"]
    expected = (weighed / weighed.sum())[:5]
    np.testing.assert_allclose(row[:5], expected.numpy(), rtol=1e-5)  # float32 sums in other order
    given = AttentionPart(recording, value_norms=part.norms)
    np.testing.assert_array_equal(
        given.answer(0, "head", layer=1, head=0, weighted=True)["levels"],
        part.answer(0, "head", layer=1, head=0, weighted=True)["levels"],
    )
    with pytest.raises(ValueError, match=r"shape \[2, 2\]; it must be \[3, 4, 6\]"):
        AttentionPart(recording, value_norms=np.ones((2, 2)))


def test_without_values_there_is_nothing_to_weigh_by(model):
    part = AttentionPart(model.record(IDS, what=("attention",)))
    assert not part.state(0)["weighable"]
    with pytest.raises(QuestionError, match="Record 'v'"):
        part.answer(0, "head", layer=0, head=0, weighted=True)
    some = model.record(IDS, what=("attention", "v"), pos=[0, 3])
    assert AttentionPart(some).norms is None  # the lengths of the other keys are not known


def test_prompts_of_a_padded_batch_are_those_recorded_alone(model):
    ids = torch.tensor([[1, 1, 2, 8, 9], [2, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    both = model.record(ids, what=ALL, attention_mask=mask)
    alone = model.record(ids[0, 2:], what=ALL)
    for kind in (AttentionPart, LensPart, ResidualPart):
        together, single = kind(both).state(0), kind(alone).state(0)
        for name, value in single.items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32:
                # padding changes the order in which products are summed
                np.testing.assert_allclose(together[name], value, rtol=1e-3, atol=1e-5)
    assert AttentionPart(both).prompts[0].ids == [2, 8, 9]


def test_a_page_holds_all_that_the_state_leaves_out(recording, monkeypatch):
    def asked(part) -> list[str]:
        return [question["what"] for question, _ in part.page_answers(0)]

    monkeypatch.setattr(attention_part, "DETAIL_BYTES", 0)  # see test_query_keys.py
    part = AttentionPart(recording)
    assert asked(part) == (["thumbs"] + ["head"] * 4) * 3  # weighted by values, nothing else
    monkeypatch.setattr(attention_part, "EXACT_CELLS", 0)
    assert asked(part).count("head") == 2 * 12
    monkeypatch.setattr(attention_part, "EAGER_CELLS", 0)
    assert asked(part).count("thumbs") == 2 * 3 and asked(part)[-6:] == ["scores"] * 6
    monkeypatch.setattr(attention_part, "PAGE_BYTES", 12 * 36)
    steps = {answer["step"] for question, answer in part.page_answers(0) if "head" in question}
    assert steps == {2}  # the weights are there twice, so half the room is for each


def test_scores_are_those_of_the_circuits(recording, model):
    state, found = AttentionPart(recording).state(0), circuits.head_scores(model, recording)
    assert {score["key"] for score in state["scores"]} == set(circuits.heads.KINDS)
    for score in state["scores"]:
        np.testing.assert_array_equal(score["values"], found[score["key"]])
    induction = next(score for score in state["scores"] if score["key"] == "induction")
    assert not np.isnan(induction["values"]).any()  # token 5 stands there twice


def test_scores_of_a_padded_prompt_are_its_own(model):
    ids = torch.tensor([[1, 1, 2, 8, 9], [2, 5, 6, 5, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    both = model.record(ids, what=("attention",), attention_mask=mask)
    found, part = circuits.head_scores(model, both), AttentionPart(both)
    for prompt in range(2):
        for key in scores.SCORES:
            np.testing.assert_array_equal(part.scores(prompt, key), found[key][prompt])
    assert np.isnan(part.scores(0, "induction")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_pictures_of_half_precision_are_those_of_its_numbers(recording, monkeypatch, dtype):
    monkeypatch.setattr(attention_part, "THUMB", 3)
    recording._tensors["attention"] = recording.attention[None].to(dtype)
    half = AttentionPart(recording).state(0)["thumbs"]
    recording._tensors["attention"] = recording._tensors["attention"].float()
    np.testing.assert_array_equal(half, AttentionPart(recording).state(0)["thumbs"])
    assert len(np.unique(half)) > 10


def test_plain_markup_of_a_long_prompt_reads_one_layer(recording, monkeypatch):
    monkeypatch.setattr(attention_part, "EAGER_CELLS", 0)
    asked = []
    real = attention_part.scores_of
    monkeypatch.setattr(
        attention_part, "scores_of", lambda *given: asked.append(given[2]) or real(*given)
    )
    image, table = AttentionPart(recording).fallback(0)
    assert asked == [[2]] and "layer 2" in image and "<td>2</td>" in table


# --- lens and residual ---------------------------------------------------------------------------


def test_lens_state_is_the_lens(recording):
    lens, state = recording.logit_lens(top_k=7), LensPart(recording, top_k=7).state(0)
    np.testing.assert_array_equal(state["ids"], lens.top_tokens)
    np.testing.assert_array_equal(state["probs"], lens.top_probs)
    np.testing.assert_array_equal(state["entropy"], lens.entropy)
    np.testing.assert_array_equal(state["kl"], lens.kl)
    assert state["rows"] == ["embed", "0", "1", "2"] and state["layers"] == ["embed", 0, 1, 2]
    assert set(state["words"]) == set(map(str, lens.top_tokens.unique().tolist()))


def test_lens_reads_sub_layers_where_they_were_recorded(model):
    recording = model.record(IDS, what=("residual", "resid_mid"))
    state = LensPart(recording, sublayers=True).state(0)
    assert state["layers"] == ["embed", 0, 0, 1, 1, 2, 2]
    with pytest.raises(NotRecordedError, match="resid_mid"):
        LensPart(model.record(IDS), sublayers=True)


def test_a_followed_token_has_its_rank_and_probability_everywhere(recording):
    part, lens = LensPart(recording), recording.logit_lens()
    answer = part.answer(0, "follow", token=17)
    np.testing.assert_array_equal(answer["rank"], lens.rank(17))
    np.testing.assert_array_equal(answer["prob"], lens.prob(17))
    assert (answer["token"], answer["label"]) == (17, recording.label(17))
    with pytest.raises(QuestionError, match="out of range"):
        part.answer(0, "follow", token=101)
    held = [question["token"] for question, _ in part.page_answers(0)]
    assert held[:5] == lens.top_tokens[-1, -1].tolist() and len(set(held)) == len(held)


def test_a_text_is_followed_if_it_is_one_token():
    import optlens

    model = optlens.load()
    part = LensPart(model.record("When Mary and John went"))
    answer = part.answer(0, "follow", text=" Mary")
    assert answer["token"] == model.to_single_token(" Mary")
    with pytest.raises(QuestionError, match="expected one"):
        part.answer(0, "follow", text=" incomprehensibilities")


def test_without_its_model_a_recording_follows_what_it_stores(recording, tmp_path):
    from optlens import Recording

    recording.save(tmp_path / "rec.safetensors")
    part = LensPart(Recording.load(tmp_path / "rec.safetensors"))
    outside = next(i for i in range(101) if not (recording.logit_lens(10).top_tokens == i).any())
    with pytest.raises(QuestionError, match=r"rec\.attach"):
        part.answer(0, "follow", token=outside)
    list(part.page_answers(0))  # leaves out what it cannot know


def test_residual_state_is_lengths_and_cosines(recording):
    state = ResidualPart(recording).state(0)
    stream = recording.residual
    np.testing.assert_allclose(state["norms"], stream.norm(dim=-1), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity
    np.testing.assert_allclose(state["before"][1:], cosine(stream[1:], stream[:-1], -1), atol=1e-6)
    assert np.isnan(state["before"][0]).all()
    np.testing.assert_allclose(state["last"], cosine(stream, stream[-1:], -1), atol=1e-6)
    pairs = cosine(stream[:, None, 3], stream[None, :, 3], -1)
    np.testing.assert_allclose(state["cosines"][3], pairs, atol=1e-6)
    answer = ResidualPart(recording).answer(0, "cosines", column=3)
    np.testing.assert_allclose(answer["cosines"], pairs, atol=1e-6)
    with pytest.raises(QuestionError, match="no position 6"):
        ResidualPart(recording).answer(0, "cosines", column=6)


def test_a_vector_of_length_zero_has_no_direction(recording):
    recording._tensors["residual"][0, 1, 2] = 0
    state = ResidualPart(recording).state(0)
    assert np.isnan(state["last"][1, 2]) and state["norms"][1, 2] == 0
    assert np.isnan(state["cosines"][2, 1]).all()
