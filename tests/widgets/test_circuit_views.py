"""The attribution view: its numbers are those of the attribution, and they add up."""

import re

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config
from page_reader import Page
from twice import same_when_made_again

import optlens
from optlens.widgets import AttentionView, AttributionView, attribution_part
from optlens.widgets.attribution_part import AttributionPart
from optlens.widgets.part import QuestionError

IDS = torch.tensor([2, 5, 17, 5, 9])
BATCH = torch.tensor([[1, 1, 2, 8, 9], [2, 5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
WHAT = ("residual", "embed", "pos_embed", "z", "mlp_out", "attention", "v")
HOSTILE = {5: "<script>alert(1)</script>", 9: "\u202eevil</script>"}


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(num_hidden_layers=3))


@pytest.fixture
def found(model):
    return optlens.direct_logit_attribution(model, IDS, 5, 17, by_source=True)


@pytest.fixture
def hostile(found):
    """An attribution whose tokens are full of markup and invisible characters."""
    found.prompts.metadata["labels"] = {str(token): text for token, text in HOSTILE.items()}
    found.prompts.metadata["prompts"] = ["".join(HOSTILE.values())]
    found.metadata["metric"] = f"logit({HOSTILE[9]!s})"
    return found


# --- attribution: numbers ------------------------------------------------------------------------


def test_the_state_adds_up_to_the_models_own_logit(found):
    state = AttributionPart(found, found.prompts).state(0)
    np.testing.assert_array_equal(state["values"], found.values)
    own, added, missed = state["total"].tolist()
    assert own == pytest.approx(float(found.total)) and added == pytest.approx(own, abs=1e-5)
    assert missed == pytest.approx(own - added, abs=1e-6)  # float32 on its way
    assert state["labels"] == found.labels and state["size"] == [3, 4]
    place = found.labels.index("L1H2")
    assert [state[name][place] for name in ("kinds", "layers", "heads")] == ["head", 1, 2]
    assert state["position"] == 4 and state["mean"] is None


def test_tokens_that_a_head_read_add_up_to_its_term(found, monkeypatch):
    part = AttributionPart(found, found.prompts)
    heads = torch.from_numpy(part.state(0)["sources"]).sum(-1)
    torch.testing.assert_close(heads, found.heads, rtol=1e-4, atol=1e-5)  # sums in another order
    assert list(part.page_answers(0)) == []
    monkeypatch.setattr(attribution_part, "EAGER_SOURCES", 0)
    assert part.state(0)["sources"] is None
    answer = part.answer(0, "sources", layer=2, head=1)["values"]
    np.testing.assert_array_equal(answer, found.sources[2, 1])
    pages = dict((q["layer"], q["head"]) for q, _ in part.page_answers(0))
    assert set(pages) == {0, 1, 2}
    with pytest.raises(QuestionError, match="no head 4 in layer 0"):
        part.answer(0, "sources", layer=0, head=4)


def test_without_sources_a_head_is_one_number(model):
    plain = optlens.direct_logit_attribution(model, IDS, 5)
    part = AttributionPart(plain, plain.prompts)
    assert not part.state(0)["by_source"]
    with pytest.raises(QuestionError, match="by_source=True"):
        part.answer(0, "sources", layer=0, head=0)


def test_each_prompt_of_a_padded_batch_has_its_own_terms_and_their_mean(model):
    recording = model.record(BATCH, what=WHAT, attention_mask=MASK)
    found = optlens.direct_logit_attribution(model, recording, [5, 6], by_source=True)
    part = AttributionPart(found, recording)
    first, second = part.state(0), part.state(1)
    np.testing.assert_array_equal(first["values"], found.values[0])
    np.testing.assert_array_equal(second["values"], found.values[1])
    assert (first["position"], second["position"]) == (2, 4)
    assert first["sources"].shape == (3, 4, 3)  # without the padding
    np.testing.assert_array_equal(first["sources"], found.sources[0, ..., 2:])
    np.testing.assert_allclose(first["mean"]["values"], found.values.mean(0), rtol=1e-6)
    assert first["mean"]["total"][0] == pytest.approx(float(found.total.mean()))


def test_another_recordings_prompts_are_refused(model, found):
    with pytest.raises(ValueError, match="recording that the attribution was made of"):
        AttributionView(found, model.record(IDS.flip(0)))
    found.prompts = None
    with pytest.raises(ValueError, match="give recording="):
        AttributionView(found)


def test_a_result_keeps_its_tokens_and_no_activation(found):
    assert set(found.prompts._tensors) == {"tokens", "mask"}
    assert found.prompts.tokens.tolist() == IDS.tolist()


# --- attribution: the view -------------------------------------------------------------------------


def test_the_view_is_linked_with_the_views_of_its_recording(model):
    recording = model.record(IDS, what=WHAT)
    found = optlens.direct_logit_attribution(model, recording, 5, 17)
    view, heads = AttributionView(found, recording), AttentionView(recording)
    heads.selected = {"layer": 1, "head": 3}
    assert view.selected["layer"] == 1 and view.selected["head"] == 3
    alone = AttributionView(found)
    largest = divmod(int(found.heads.abs().argmax()), 4)
    assert (alone.selected["layer"], alone.selected["head"]) == largest


def test_views_are_the_same_on_every_run(model, tmp_path):
    view = same_when_made_again(
        lambda: AttributionView(optlens.direct_logit_attribution(model, IDS, 5, 17)), tmp_path
    )
    assert repr(view) == "AttributionView(logit_diff(5, 17), parts=21, tokens=5)"


def test_pictures_are_written_without_a_browser(found, tmp_path):
    view = AttributionView(found)
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        written = []
        for options in ({}, {}, {"style": "dark"}, {"detail": True}):
            getattr(view, f"to_{kind}")(tmp_path / "picture", **options)
            written.append((tmp_path / "picture").read_bytes())
        assert all(data.startswith(start) for data in written)
        assert written[0] == written[1] and len(set(written)) == 3


def test_hostile_text_is_text_in_page_and_plain_markup(hostile, tmp_path):
    view = AttributionView(hostile)
    view.to_html(tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert [script.get("type") for script in page.all("script")] == ["application/json", "module"]
    assert "<" not in source.split('id="contents">')[1].split("</script>")[0]
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", source)
    plain = Page(view._repr_mimebundle_()[0]["text/html"])
    allowed = set("div p b table caption thead tbody tr th td bdi br small img".split())
    assert {tag for tag, _ in plain.tags} <= allowed
    assert plain.all("table") and "</script>" in plain.text


def test_the_plain_table_adds_up(found):
    html = AttributionView(found)._repr_mimebundle_()[0]["text/html"]
    rows = re.findall(r"<tr><th>([^<]+)</th><td>([^<]+)</td></tr>", html)
    numbers = {name: float(value.replace("−", "-")) for name, value in rows}
    total, own = numbers.pop("sum"), numbers.pop("the model&#x27;s own", None)
    own = numbers.pop("the model's own") if own is None else own
    assert total == own == pytest.approx(float(found.total), abs=6e-4)
    assert sum(numbers.values()) == pytest.approx(total, abs=0.0005 * (len(numbers) + 1))
