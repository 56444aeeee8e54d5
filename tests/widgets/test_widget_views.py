"""The widgets: linked selections, answers to the picture, files, markup for places without JavaScript."""

import re
import struct

import numpy as np
import pytest
import torch
import traitlets
from conftest import random_model, tiny_config
from page_reader import Page

from optlens.recording import NotRecordedError
from optlens.widgets import (
    AttentionView,
    Explorer,
    LensView,
    ResidualView,
    Selection,
    cells,
)
from optlens.widgets.selection import selection_of

IDS = torch.tensor([2, 5, 17, 5, 9])
HOSTILE = {
    2: "</s>",
    5: "<script>alert(1)</script>",
    17: "\"'><img src=http://x/y onerror=alert(2)>",
    9: "\u202eevil\u2066\x1b[31m\x00\u2028</script>",
}
VIEWS = (AttentionView, LensView, ResidualView, Explorer)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


@pytest.fixture
def recording(model):
    return model.record(IDS)


@pytest.fixture
def hostile(recording):
    """A recording whose prompt and tokens are full of markup and invisible characters."""
    recording.metadata["labels"] = {str(token): text for token, text in HOSTILE.items()}
    recording.metadata["prompts"] = ["".join(HOSTILE[token] for token in IDS.tolist())]
    return recording


def ask(view, **question):
    """Send a message as the picture does; return what Python sends back."""
    sent = []
    view.send = lambda content, buffers=None: sent.append((content, buffers))
    place = {"part": 0, "prompt": 0}
    view._answer(view, {"kind": "ask", "id": 7, "question": place | question}, [])
    (reply,) = sent
    return reply


# --- selections ----------------------------------------------------------------------------------


def test_views_of_one_recording_are_linked(model, recording):
    one, two = AttentionView(recording), LensView(recording)
    other = AttentionView(model.record(IDS))
    assert one.selected == {
        "prompt": 0, "layer": 1, "head": 0, "query": 4, "key": None, "token": None,
        "neuron": None,
    }  # fmt: skip
    heard = []
    two.observe(lambda change: heard.append(change["new"]["head"]), "selected")
    one.selected = {"head": 3, "key": 2}
    assert heard == [3] and two.selected["key"] == 2 and two.selected["layer"] == 1
    assert other.selected["head"] == 0
    apart = LensView(recording, selection=Selection(value={"layer": 0}))
    assert apart.selected["head"] is None and apart.selected["layer"] == 0


def test_a_click_is_heard(recording):
    """What the browser sends sets the shared selection, which is all that Python needs to hear."""
    view, heard = Explorer(recording), []
    view.observe(lambda change: heard.append(change["new"]), "selected")
    view.selection.set_state({"value": {**view.selected, "layer": "embed", "token": 9}})
    assert len(heard) == 1 and heard[0]["layer"] == "embed" and heard[0]["token"] == 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 1}, "no 'heads'; it has prompt, layer"),
        ({"head": -1}, "head=-1 cannot be selected"),
        ({"head": "1"}, "head='1' cannot"),
        ({"prompt": None}, "prompt=None cannot"),
        ({"key": True}, "key=True cannot"),
        ({"query": "embed"}, "query='embed' cannot"),
    ],
)
def test_a_selection_refuses_what_is_no_place(recording, wrong, message):
    view = AttentionView(recording)
    before = view.selected
    with pytest.raises(traitlets.TraitError, match=re.escape(message)):
        view.selected = wrong
    assert view.selected == before == view.selection.value


def test_whole_numbers_of_numpy_and_torch_can_be_selected(recording):
    view = AttentionView(recording)
    view.selected = {"layer": np.int64(0), "head": recording.attention[0, :, 4, 0].argmax()}
    assert [type(view.selected[name]) for name in ("layer", "head")] == [int, int]


def test_a_closed_selection_is_replaced(recording):
    first = selection_of(recording)
    assert selection_of(recording) is first
    first.close()
    assert selection_of(recording) is not first


def test_a_selection_beyond_the_prompts_is_refused(recording):
    with pytest.raises(ValueError, match="prompt 2, but the recording has 1"):
        LensView(recording, selection=Selection(value={"prompt": 2}))


# --- what is shown -------------------------------------------------------------------------------


def test_repr_is_the_same_on_every_run(recording):
    shown = [repr(view(recording)) for view in VIEWS]
    assert shown == [
        "AttentionView(layers=2, heads=4, tokens=5)",
        "LensView(rows=3, tokens=5)",
        "ResidualView(rows=3, tokens=5)",
        "Explorer(lens, attention, residual; layers=2, heads=4, tokens=5)",
    ]
    assert repr(Selection(value={"head": 2})) == "Selection(prompt=0, head=2)"


def test_explorer_shows_what_was_recorded(model):
    some = Explorer(model.record(IDS, what=("attention",)))
    assert repr(some).startswith("Explorer(attention; ")
    with pytest.raises(NotRecordedError, match="nothing that the explorer shows"):
        Explorer(model.record(IDS, what=("z",)))
    with pytest.raises(NotRecordedError, match="attention"):
        AttentionView(model.record(IDS, what=("residual",)))
    assert repr(Explorer(model, IDS)) == repr(Explorer(model.record(IDS)))
    for wrong in ((model,), (model.record(IDS), "text")):
        with pytest.raises(TypeError, match="a model with a prompt"):
            Explorer(*wrong)


def test_recording_shows_the_explorer(recording):
    assert isinstance(recording.show(), Explorer)


def test_state_is_small_and_the_module_is_one(recording):
    view = AttentionView(recording)
    state = view.get_state()
    assert state["_esm"].count("export default") == 1
    assert not re.search(r"^\s*import\b", state["_esm"], re.MULTILINE)
    assert [part["kind"] for part in state["parts"]] == ["attention"]
    assert state["selection"] == f"IPY_MODEL_{view.selection.model_id}"
    assert "lensView" not in state["_esm"] and "lensView" in Explorer(recording)._esm


# --- questions -----------------------------------------------------------------------------------


def test_a_question_is_answered_with_buffers(recording):
    content, buffers = ask(AttentionView(recording), what="row", layer=1, head=2, query=3)
    assert content["kind"] == "answer" and content["id"] == 7
    assert content["content"]["weights"] == {"dtype": "f4", "shape": [5], "data": 0}
    found = struct.unpack("5f", buffers[0])
    torch.testing.assert_close(torch.tensor(found[:4]), recording.attention[1, 2, 3, :4])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"what": "row", "layer": 9, "head": 0, "query": 0}, "no layer 9"),
        ({"what": "nothing"}, "cannot answer"),
        ({"what": "row"}, "missing"),
        ({"what": "head", "part": 5, "layer": 0, "head": 0}, "index out of range"),
    ],
)
def test_what_cannot_be_answered_is_said_in_the_view(recording, question, message):
    content, _ = ask(AttentionView(recording), **question)
    assert (content["kind"], content["id"]) == ("error", 7) and message in content["message"]


def test_the_state_of_another_prompt_is_an_answer(model):
    both = model.record(torch.stack([IDS, IDS.flip(0)]))
    view = AttentionView(both)
    assert repr(view) == "AttentionView(layers=2, heads=4, 2 prompts, tokens=5)"
    content, buffers = ask(view, what="state", prompt=1)
    exact = content["content"]["exact"]
    values = torch.frombuffer(bytearray(buffers[exact["data"]]), dtype=torch.float32)
    shown = values.view(exact["shape"]).nan_to_num()
    torch.testing.assert_close(shown, both.attention[1])


def test_other_messages_are_left_alone(recording):
    view = AttentionView(recording)
    view.send = lambda *_: pytest.fail("answered")
    view._answer(view, {"kind": "anywidget-command"}, [])


# --- files and plain markup ------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_pictures_are_written_without_a_browser(view, recording, tmp_path):
    shown = view(recording)
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        sizes = []
        for name, options in (
            ("a", {}), ("b", {}), ("dark", {"style": "dark"}), ("detail", {"detail": True}),
        ):  # fmt: skip
            path = tmp_path / f"{name}.{kind}"
            getattr(shown, f"to_{kind}")(path, **options)
            sizes.append(path.read_bytes())
        assert all(data.startswith(start) for data in sizes)
        assert sizes[0] == sizes[1] and len(set(sizes)) == 3
    assert not list(tmp_path.glob(".optlens*"))


@pytest.mark.parametrize("view", VIEWS)
def test_page_is_the_same_on_every_run(view, model, tmp_path):
    for name in ("a", "b"):
        view(model.record(IDS)).to_html(tmp_path / name)
    first, second = ((tmp_path / name).read_text(encoding="utf-8") for name in ("a", "b"))
    # torch draws another seed in every process, and it is no part of the view
    assert first == second and first.startswith("<!DOCTYPE html>\n<html lang")


@pytest.mark.parametrize("view", VIEWS)
def test_a_hostile_prompt_is_text_in_the_page(view, hostile, tmp_path):
    path = tmp_path / "page.html"
    view(hostile).to_html(path)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert [script.get("type") for script in page.all("script")] == ["application/json", "module"]
    data = source.split('id="contents">')[1].split("</script>")[0]
    assert "<" not in data and "\\u003cscript>alert(1)" in data
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\x00-\x08\x1b]", source)
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.parametrize("view", VIEWS)
def test_plain_markup_survives_a_sanitiser(view, hostile):
    bundle, _ = view(hostile)._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    page = Page(bundle["text/html"])
    allowed = set("div p b table caption thead tbody tr th td bdi br small img".split())
    assert {tag for tag, _ in page.tags} <= allowed
    assert all(set(attributes) <= {"src", "alt"} for _, attributes in page.tags)
    assert all(a["src"].startswith("data:image/png") and a["alt"] for a in page.all("img"))
    assert page.all("table") and "<script>alert(1)</script>" in page.text


def test_plain_markup_is_the_same_on_every_run(model):
    texts = [Explorer(model.record(IDS))._repr_mimebundle_()[0]["text/html"] for _ in range(2)]
    assert texts[0] == texts[1]


def test_static_is_no_widget(recording):
    still = Explorer(recording).static()
    assert not hasattr(still, "_repr_mimebundle_")
    assert repr(still).endswith(", static>")
    assert still._repr_html_() == Explorer(recording)._repr_mimebundle_()[0]["text/html"]


# --- cells -----------------------------------------------------------------------------------------


def test_a_cell_run_again_frees_what_it_showed(recording, monkeypatch):
    monkeypatch.setattr(cells, "_SHOWN", {})

    def show(view, cell, run):
        monkeypatch.setattr(cells, "_running", lambda: (cell, run))
        view._repr_mimebundle_()

    first, beside, both, kept, later = (LensView(recording) for _ in range(5))
    show(first, "cell", "run 1")
    show(beside, "cell", "run 1")
    show(both, "cell", "run 1")
    show(both, "another cell", "run 2")
    show(kept, "cell", "run 1")
    assert first.comm is not None
    show(kept, "cell", "run 3")
    show(later, "cell", "run 3")
    assert [view.comm is None for view in (first, beside, both, kept, later)] == [
        True, True, False, False, False,
    ]  # fmt: skip
    show(later, None, "")  # outside of notebooks nothing is closed
    assert later.comm is not None
