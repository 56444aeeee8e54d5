"""The Explorer changes the run: prompt and interventions, from Python and by the picture's questions."""

import re

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config
from torch.testing import assert_close

import optlens
from optlens import Ablate, Freeze, Knockout, Patch, Scale, Steer
from optlens.checks import InputError
from optlens.widgets import AttentionView, Explorer
from optlens.widgets.arrays import packed
from optlens.widgets.contributors import contributors, record_parts
from optlens.widgets.part import QuestionError
from optlens.widgets.recipe import call_of, code_of

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
CUT = Ablate("z", layer=3, head=2)
CLICK = {"do": "ablate", "part": "head", "layer": 3, "head": 2, "pos": None}


@pytest.fixture(scope="module")
def model():
    return optlens.load()


@pytest.fixture
def explorer(model):
    return Explorer(model, TEXT)


def ask(view, what, prompt=0, **more):
    return view.answer({"part": 0, "prompt": prompt, "what": what, **more})


def click(view, *clicks, **more):
    """Ask for what is in force and for these, as the picture does."""
    known = [{"number": each["number"]} for each in state_of(view)["inForce"]]
    return ask(view, "set", wanted=[*known, *clicks], **more)["state"]


def state_of(view):
    return view._parts[0].state(0)


def same_run(one, two):
    """Compare everything that two recordings hold; the same computation, so to the last bit."""
    for name in one._tensors:
        assert_close(one._tensors[name], two._tensors[name], rtol=0, atol=0)


# ------------------------------------------------------------------------------------- from Python


def test_setting_interventions_runs_the_model(explorer, model):
    heard, before = [], explorer.recording
    explorer.observe(
        lambda change: heard.append((change["new"], explorer.recording)), "interventions"
    )
    explorer.interventions = [CUT]
    expected = model.record(TEXT, interventions=[CUT])
    same_run(explorer.recording, expected)
    assert explorer.original is before and explorer.interventions == (CUT,)
    assert heard == [((CUT,), explorer.recording)]  # once, and the run is there already
    assert [part.recording for part in explorer._parts] == [explorer.recording] * 4
    explorer.interventions = [Ablate("z", layer=3, head=2)]  # the same: nothing to do
    assert len(heard) == 1 and len(explorer._run.history) == 2


def test_every_part_is_sent_anew_in_one_message(explorer):
    sent, version = [], explorer.version
    lens = packed(explorer._parts[1].state(0), bytes)
    explorer.send_state = lambda key=None: sent.append(set(key))
    explorer.interventions = [CUT]
    assert {"parts", "prompts", "version"} >= sent[0] >= {"parts", "version"} and len(sent) == 1
    assert explorer.version == version + 1
    assert packed(explorer.parts[1]["state"], bytes)["probs"] != lens["probs"]


def test_setting_the_prompt_runs_the_model(explorer, model):
    explorer.interventions = [CUT]
    explorer.selected = {"layer": 2, "head": 5, "query": 14, "token": 9}
    explorer.prompt = "The cat sat on the"
    same_run(explorer.recording, model.record("The cat sat on the", interventions=[CUT]))
    same_run(explorer.original, model.record("The cat sat on the"))
    chosen = explorer.selected
    assert (chosen["layer"], chosen["head"], chosen["query"], chosen["token"]) == (2, 5, 5, None)
    assert AttentionView(explorer.recording).selection is explorer.selection
    assert len(explorer.prompts[0]["tokens"]) == 6


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", InputError, "The prompt is empty"),
        ([], InputError, "The prompt is empty"),
        ("a " * 600, InputError, "positions for 512 only; shorten the prompt"),
        (7, TypeError, "got int"),
        ("The cat", InputError, "pos asks for position 14, but the prompt has 3 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_run_changes_nothing(explorer, prompt, error, message):
    explorer.interventions = [Scale("z", layer=1, pos=14, factor=2)]
    before = explorer.recording, explorer.parts, explorer.version, explorer.interventions
    with pytest.raises(error, match=message):
        explorer.prompt = prompt
    assert (explorer.recording, explorer.parts, explorer.version, explorer.interventions) == before
    assert explorer.prompt == TEXT and len(explorer._run.history) == 2


def test_interventions_that_do_not_fit_change_nothing(explorer):
    before = explorer.recording, explorer.version
    with pytest.raises(InputError, match="there are 8"):
        explorer.interventions = [Ablate("z", layer=3, head=9)]
    with pytest.raises(TypeError, match="Expected interventions"):
        explorer.interventions = ["z"]
    assert (explorer.recording, explorer.version) == before and explorer.interventions == ()


def test_undo_and_redo(explorer):
    first = explorer.recording
    for problem in (explorer.undo, explorer.redo):
        with pytest.raises(InputError, match="nothing to"):
            problem()
    explorer.interventions = [CUT]
    explorer.prompt = "The cat"
    explorer.undo()
    assert (explorer.prompt, explorer.interventions) == (TEXT, (CUT,))
    explorer.undo()
    assert explorer.interventions == ()
    same_run(explorer.recording, first)
    explorer.redo()
    explorer.redo()
    assert (explorer.prompt, explorer.interventions) == ("The cat", (CUT,))
    explorer.undo()
    explorer.interventions = ()  # another way on: what was undone is gone
    with pytest.raises(InputError, match="nothing to redo"):
        explorer.redo()


def test_explorer_begins_with_interventions(model):
    explorer = Explorer(model, TEXT, interventions=[CUT])
    assert repr(explorer).endswith("tokens=16, interventions=1)")
    same_run(explorer.recording, model.record(TEXT, interventions=[CUT]))
    same_run(explorer.original, model.record(TEXT))
    explorer.interventions = ()
    assert explorer.recording is explorer.original
    with pytest.raises(TypeError, match="Expected interventions"):
        Explorer(model, TEXT, interventions=[3])
    with pytest.raises(TypeError, match="set explorer.interventions afterwards"):
        Explorer(explorer.recording, interventions=[CUT])


def test_a_batch_and_its_prompts(model):
    explorer = Explorer(model, [TEXT, "The cat sat on the"])
    explorer.interventions = [CUT]
    ask(explorer, "set", prompt=1, wanted=[], text="A dog ran")
    assert explorer.prompt == [TEXT, "A dog ran"]
    same_run(explorer.recording, model.record([TEXT, "A dog ran"]))
    assert ask(explorer, "live", prompt=1)["state"]["prompt"] == '"A dog ran"'


def test_what_was_recorded_is_recorded_again(model):
    rec = model.record(TEXT, what=("attention", "z"), layers=[1, 3], heads=[0, 2], pos=[4, -1])
    explorer = Explorer(rec)
    explorer.interventions = [CUT]
    again = explorer.recording
    assert (again.what, again.layers, again.heads, again.positions) == (
        ["attention", "z"], [1, 3], [0, 2], [4, 15],
    )  # fmt: skip
    assert_close(again.attention, explorer.original.attention)  # layer 3 reads before its z is cut
    explorer.prompt = "The cat sat"
    assert explorer.recording.positions == [0, 1, 2, 3]  # the chosen ones mean nothing there


def test_padded_token_ids_are_run_with_their_mask():
    model = random_model(tiny_config())
    tokens = torch.tensor([[1, 1, 2, 5, 6], [2, 7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    explorer = Explorer(model.record(tokens, attention_mask=mask))
    explorer.interventions = [Scale("mlp_out", layer=0, factor=0.0)]
    expected = model.record(tokens, attention_mask=mask, interventions=explorer.interventions)
    same_run(explorer.recording, expected)
    names = {"model": model}
    exec(explorer.code, names)
    same_run(names["rec"], expected)


# ------------------------------------------------------------------------------------ the obstacles


def test_a_loaded_recording_says_what_it_needs(model, tmp_path):
    model.record(TEXT).save(tmp_path / "rec.safetensors")
    loaded = optlens.Recording.load(tmp_path / "rec.safetensors")
    explorer = Explorer(loaded)
    live = ask(explorer, "live")
    assert live["live"] is False and "rec.attach(model).show()" in live["state"]["obstacle"]
    best = live["state"]["prediction"]["ids"][-1, 0]
    assert best == loaded.logit_lens().top_tokens[-1, -1, 0]
    for change in ("interventions", "prompt"):
        with pytest.raises(InputError, match="loaded without its model"):
            setattr(explorer, change, [CUT] if change == "interventions" else "The cat")
    with pytest.raises(QuestionError, match="loaded without its model"):
        ask(explorer, "set", wanted=[CLICK])
    with pytest.raises(QuestionError, match="loaded without its model"):
        ask(explorer, "contributors", layer=4, query=15, token=5)


def test_a_recording_made_under_interventions_is_not_run_without_them(model):
    explorer = Explorer(model.record(TEXT, interventions=[CUT]))
    with pytest.raises(
        InputError, match=re.escape("made under Ablate('z', layer=3, head=2), which")
    ):
        explorer.interventions = [Scale("z", layer=0, factor=2)]
    assert ask(explorer, "live")["live"] is False


def test_post_ln_has_no_writers_but_can_be_changed():
    model = random_model(tiny_config(do_layer_norm_before=False))
    explorer = Explorer(model, torch.tensor([2, 5, 17, 9]))
    with pytest.raises(QuestionError, match="post-LN"):
        ask(explorer, "contributors", layer=1, query=3, token=5)
    explorer.interventions = [Ablate("z", layer=1, head=0)]
    assert "contributors" not in {q["what"] for q, _ in explorer._parts[0].page_answers(0)}


def test_a_recording_without_the_stream_has_no_prediction(model):
    explorer = Explorer(model.record(TEXT, what="attention"))
    assert state_of(explorer)["prediction"] is None
    assert [answer for _, answer in explorer._parts[0].page_answers(0)][0]["ablations"] is None


# ----------------------------------------------------------------------------- the picture's questions


def test_clicks_become_interventions(explorer):
    stream = {"part": "stream", "layer": 2, "head": None, "pos": 14}
    for one in (
        CLICK,
        {**CLICK, "do": "scale", "factor": 0.5, "part": "mlp"},
        {**CLICK, "do": "mean", "part": "attention", "other": None},
        {**stream, "do": "patch", "other": OTHER},
        {**stream, "layer": "embed", "do": "ablate"},
    ):
        state = click(explorer, one)
    assert explorer.interventions == (
        CUT,
        Scale("mlp_out", layer=3, factor=0.5),
        Ablate("attn_out", layer=3, mode="mean", reference=TEXT),
        Freeze("resid_post", layer=2, pos=14, source=OTHER),
        Ablate("resid_pre", layer=0, pos=14),
    )
    told = [
        {name: each.get(name) for name in ("do", "part", "layer", "head", "pos")}
        for each in state["inForce"]
    ]
    assert told == [
        CLICK,
        {"do": "scale", "part": "mlp", "layer": 3, "head": None, "pos": None},
        {"do": "mean", "part": "attention", "layer": 3, "head": None, "pos": None},
        {"do": "patch", **stream},
        {"do": "ablate", **stream, "layer": "embed"},
    ]  # fmt: skip
    assert state["heads"] == [[3, head] for head in range(8)]
    assert (state["at"], state["count"]) == (5, 6)


def test_a_question_that_comes_twice_runs_once(explorer):
    click(explorer, CLICK)
    ask(explorer, "set", wanted=[CLICK])
    assert explorer.interventions == (CUT,) and explorer.version == 1
    state = ask(explorer, "go", at=0)["state"]
    ask(explorer, "go", at=0)
    assert explorer.interventions == () and explorer.version == 2 and state["count"] == 2


def test_other_interventions_stay_as_they_are(explorer):
    """What Python has set is kept by a click, as the object that it is, and shown as its call."""
    vector = torch.ones(256)
    explorer.interventions = [Steer(layer=1, vector=vector), Knockout(query=-1, key=3)]
    state = click(explorer, CLICK)
    assert explorer.interventions[0].vector is vector and explorer.interventions[2] == CUT
    assert [each["do"] for each in state["inForce"]] == [None, None, "ablate"]
    assert state["inForce"][1]["call"] == "Knockout(query=-1, key=3)"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"do": "patch", "other": "The cat"}, "has 3 tokens and this one 16.*</s> The ·cat"),
        ({"do": "patch", "other": None}, "Type the prompt to patch from"),
        ({"layer": "embed"}, "Before the first layer there is no head"),
        ({"head": 8}, "there are 8"),
        ({"do": "scale", "factor": None}, "Scale needs factor="),
    ],
)
def test_a_click_that_cannot_be_run_says_why(explorer, wrong, message):
    click(explorer, CLICK)
    before = explorer.recording
    with pytest.raises(QuestionError, match=message):
        click(explorer, CLICK | {"head": 1} | wrong)
    assert explorer.recording is before and explorer.interventions == (CUT,)


def test_a_typed_prompt_is_run(explorer):
    state = click(explorer, CLICK, text=OTHER)
    assert (explorer.prompt, explorer.interventions) == (OTHER, (CUT,))
    assert state["prompt"] == f'"{OTHER}"'
    for text, message in (("", "empty"), ("a " * 600, "shorten")):
        with pytest.raises(QuestionError, match=message):
            click(explorer, text=text)
    assert explorer.prompt == OTHER


def test_an_error_of_the_model_is_a_sentence_in_the_view(explorer, monkeypatch):
    sent = []
    explorer.send = lambda content, buffers=None: sent.append(content)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(explorer.recording.model), "record", fail)
    question = {"part": 0, "prompt": 0, "what": "set", "wanted": [CLICK]}
    explorer._answer(explorer, {"kind": "ask", "id": 3, "question": question}, [])
    assert sent == [{"kind": "error", "id": 3, "message": "out of memory"}]
    assert explorer.interventions == ()


def test_predictions_before_and_after(explorer, model):
    found = click(explorer, CLICK, {**CLICK, "head": 0}, {**CLICK, "head": 1})["prediction"]
    runs = {"before": (), "after": [Ablate("z", layer=3, head=head) for head in (2, 0, 1)]}
    logs = {k: model.record(TEXT, interventions=v).logits.log_softmax(-1) for k, v in runs.items()}
    for name, log in logs.items():
        shown = log.gather(-1, torch.as_tensor(found["ids"]).long()).exp()
        assert_close(torch.as_tensor(found[name]), shown, rtol=1e-5, atol=1e-7)
    kl = (logs["before"].exp() * (logs["before"] - logs["after"])).sum(-1)
    assert_close(torch.as_tensor(found["kl"]), kl, rtol=1e-4, atol=1e-6)
    for log in logs.values():  # the first of either run is in the list
        assert int(log[-1].argmax()) in found["ids"][-1]
    assert (np.diff(found["after"], axis=-1) <= 0).all()


def test_contributors_add_up_to_the_cells_logit(explorer, model):
    """Of every row, under interventions too: the lens computes each row's scale afresh."""
    explorer.interventions = [CUT, Scale("mlp_out", layer=1, factor=0.5)]
    lens = explorer.recording.logit_lens(5)
    parts = record_parts(explorer.recording, explorer._run.now)
    for row, layer in enumerate(["embed", 0, 1, 2, 3, 4]):
        token = int(lens.top_tokens[row, 12, 0])
        terms = contributors(parts, layer, 12, token)
        # the sum of some fifty float32 terms of size up to twenty
        assert abs(sum(term.value for term in terms) - float(lens.logit(token)[row, 12])) < 1e-3
    answer = ask(explorer, "contributors", layer=4, query=12, token=token)
    by_name = {
        (part["part"], part["layer"], part["head"]): part["value"] for part in answer["parts"]
    }
    assert ("head", 3, 2) not in by_name  # silenced: it wrote nothing
    assert abs(sum(by_name.values()) + answer["rest"] - answer["total"]) < 1e-4
    strengths = [abs(value) for value in by_name.values()]
    assert strengths == sorted(strengths, reverse=True)


def test_a_page_holds_every_heads_ablation(explorer, model):
    explorer.interventions = [Scale("mlp_out", layer=0, factor=0.5)]
    answers = {question["what"]: answer for question, answer in explorer._parts[0].page_answers(0)}
    found = answers["live"]["ablations"]
    assert answers["live"]["live"] is False and found["query"] == 15
    for layer, head in ((0, 0), (3, 2), (4, 7)):
        given = [*explorer.interventions, Ablate("z", layer=layer, head=head)]
        probs = model.record(TEXT, interventions=given).logits[-1].softmax(-1)
        top = probs.topk(6)
        assert found["ids"][layer, head].tolist() == top.indices.tolist()
        # runs in a batch round otherwise than alone
        assert_close(torch.as_tensor(found["probs"][layer, head]), top.values, rtol=1e-4, atol=1e-6)
        kept = torch.as_tensor(found["kept"][layer, head])
        assert_close(kept, probs[found["chosen"]], rtol=1e-4, atol=1e-6)
    assert found["code"].endswith("optlens.Ablate('z', layer=9871, head=9872),\n    ],\n)")


def test_a_page_leaves_out_what_is_long_or_drawn(model, monkeypatch):
    explorer = Explorer(
        model, TEXT, interventions=[Ablate("z", layer=0, mode="resample", reference=OTHER)]
    )
    assert next(explorer._parts[0].page_answers(0))[1]["ablations"] is None
    monkeypatch.setattr("optlens.widgets.head_ablations.MOST_HEADS", 39)
    assert next(Explorer(model, TEXT)._parts[0].page_answers(0))[1]["ablations"] is None


# ---------------------------------------------------------------------------------- code and pictures


def test_the_code_runs_and_gives_the_same_recording(explorer, model):
    click(explorer, CLICK, {**CLICK, "do": "mean", "other": OTHER}, {**CLICK, "do": "patch", "part": "stream", "other": OTHER, "pos": 9})  # fmt: skip
    explorer.interventions = [
        *explorer.interventions,
        Steer(layer=1, vector=torch.linspace(-1, 1, 256), scale=0.5, start=3),
        Patch("z", layer=2, head=1, pos=(" John", 1), value=torch.zeros(32)),
        Knockout(layers=range(2), query=slice(4, None), key=[1, 2]),
    ]
    names = {"model": model}
    exec(explorer.code, names)
    same_run(names["rec"], explorer.recording)
    assert names["rec"].metadata["interventions"] == explorer.recording.metadata["interventions"]


def test_what_cannot_be_written_is_taken_from_the_view(explorer, model):
    source = model.record(OTHER, what="z")
    explorer.interventions = [
        Steer(layer=1, vector=torch.randn(16, 256)),
        Freeze("z", layer=2, source=source),
    ]
    assert "vector=explorer.interventions[0].vector" in explorer.code
    assert "source=explorer.interventions[1].source" in explorer.code
    names = {"model": model, "explorer": explorer}
    exec(explorer.code, names)
    same_run(names["rec"], explorer.recording)


def test_code_of_texts_and_numbers():
    text = 'say "hi"\n\u202e'
    names = {"model": type("Echo", (), {"record": staticmethod(lambda *a, **k: (a, k))})}
    cut = Patch("attn_scores", layer=0, value=float("-inf"), query=2, key=1)
    exec(code_of([text, "b"], [cut], {"dtype": torch.float16, "layers": [0, 1]}), names)
    assert names["rec"] == (([text, "b"],), {"interventions": [cut], "dtype": torch.float16, "layers": [0, 1]})  # fmt: skip
    assert "\u202e" not in code_of(text)
    assert call_of(Steer(layer=1, vector=2.0), 0) == "Steer(layer=1, vector=2.0)"


def test_pictures_and_the_static_form(explorer, tmp_path):
    before = explorer.static()._repr_html_()
    explorer.interventions = [CUT]
    after = explorer.static()._repr_html_()
    assert "The next token before and under the interventions" in after and "Ablate(" in after
    assert "interventions" not in before
    explorer.to_png(tmp_path / "view.png")  # the lens, as before
    assert (tmp_path / "view.png").stat().st_size > 10_000
