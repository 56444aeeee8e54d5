"""The patching view of a running sweep: what it answers, and what it shows of single patches."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config
from sweep_results import make_result

import optlens
from optlens import Ablate, Patch
from optlens.checks import InputError
from optlens.metrics import logit_diff
from optlens.patching import PatchResult
from optlens.widgets import PatchingView, patching_runs
from optlens.widgets.branches import lock_of
from optlens.widgets.page import contents
from optlens.widgets.part import QuestionError

CLEAN = torch.tensor([[2, 5, 17, 9, 11, 30]])
CORRUPT = torch.tensor([[2, 5, 9, 17, 11, 30]])
AXES = ("layer", "head", "pos")
PLACE = {"part": 0, "prompt": 0}


@pytest.fixture
def model():
    return random_model(tiny_config())


def sweep(model, over=AXES, **options):
    options = {"progress": False} | options
    return optlens.patch_sweep(model, CLEAN, CORRUPT, "z", over, logit_diff(5, 6), **options)


def ask(view, what, **more):
    return view.answer(PLACE | {"what": what} | more)


def slowly(view, monkeypatch):
    """Let each answer compute one patch."""
    monkeypatch.setattr("optlens.widgets.patching_fill.SECONDS", 1e-9)
    monkeypatch.setattr(type(view._parts[0].filling).step, "__defaults__", (1e-9,))


def pull(view, since=0, times=1, turn=0, by="a"):
    for _ in range(times):
        found = ask(view, "more", since=since, by=by, turn=turn)
    return found


def known(view):
    return int((~view.result.per_prompt.isnan()).sum())


# --- filling in ----------------------------------------------------------------------------------


def test_answers_bring_what_is_new_until_all_is_there(model, monkeypatch):
    whole, view = sweep(model), PatchingView(sweep(model, stream=True))
    slowly(view, monkeypatch)
    state = view._parts[0].state(0)
    assert state["filling"]["state"] == "running" and state["filling"]["to"] == 0
    values, shares = state["values"].copy(), state["normalized"].copy()
    since, steps, found = 0, 0, state["filling"]
    while found["state"] == "running":
        found = pull(view, since)
        assert found["since"] == since
        values.flat[found["cells"]] = found["values"]
        shares.flat[found["cells"]] = found["normalized"]
        assert found["done"] == int((~np.isnan(values)).sum()) == known(view)
        since, steps = found["to"], steps + 1
    assert steps > 10 and found["state"] == "done" and found["share"] == 1
    np.testing.assert_allclose(values, whole.values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shares, whole.normalized, rtol=1e-4, atol=1e-5)
    assert view.result.complete


def test_an_answer_that_was_lost_is_in_the_next_one(model, monkeypatch):
    view = PatchingView(sweep(model, stream=True))
    slowly(view, monkeypatch)
    pull(view, times=3)
    found = pull(view)  # the picture still has nothing
    assert len(found["cells"]) == found["to"] >= 4
    again = pull(view, since=2)
    assert again["cells"].tolist() == view._parts[0].filling.stream.filled[2:]


def test_a_cancel_keeps_what_was_done_and_a_press_goes_on(model, monkeypatch):
    view = PatchingView(sweep(model, stream=True))
    slowly(view, monkeypatch)
    pull(view, times=3)
    assert ask(view, "pause")["state"] == "paused"
    done = known(view)
    assert pull(view)["state"] == "paused" and known(view) == done
    assert pull(view, turn=1)["state"] == "running" and known(view) > done
    view.cancel()
    assert pull(view, turn=1)["state"] == "paused"  # that turn was heard before
    assert pull(view, turn=1, by="another picture")["state"] == "running"
    assert view.run(progress=False) is view.result and view.result.complete
    assert pull(view)["state"] == "done"


def test_a_cancel_that_comes_late_does_not_undo_the_press_after_it(model, monkeypatch):
    view = PatchingView(sweep(model, stream=True))
    slowly(view, monkeypatch)
    pull(view, turn=2)
    assert ask(view, "pause", by="a", turn=1)["state"] == "running"
    assert ask(view, "pause", by="a", turn=3)["state"] == "paused"
    assert pull(view, turn=3)["state"] == "paused"  # sent before it, or sent again
    assert pull(view, turn=4)["state"] == "running"


def test_an_error_in_the_middle_is_told_and_loses_nothing(model, monkeypatch):
    view = PatchingView(sweep(model, stream=True))
    slowly(view, monkeypatch)
    pull(view, times=4)
    done = known(view)
    with model.intervene(Ablate("z", layer=0)):
        found = pull(view)
        assert found["state"] == "failed" and "Hook functions are attached" in found["trouble"]
        assert len(found["cells"]) == found["to"] and known(view) == done
        assert pull(view, turn=1)["state"] == "failed"
        with pytest.raises(InputError, match="Hook functions"):
            view.run(progress=False)
    assert pull(view)["state"] != "running"  # it waits to be told
    assert pull(view, turn=2)["state"] == "running"
    with torch.no_grad():
        model.decoder.layers[0].fc1.weight.mul_(1.5)
    assert "altered" in pull(view)["trouble"]
    assert not view.result.complete


def test_a_saved_view_shows_what_was_done_by_then(model, monkeypatch):
    view = PatchingView(sweep(model, stream=True))
    slowly(view, monkeypatch)
    shown = lambda: view.parts[0]["state"]  # noqa: E731
    assert shown()["missing"] == shown()["filling"]["all"] - shown()["filling"]["done"]
    before = shown()["filling"]["done"]
    monkeypatch.setattr("optlens.widgets.patching_view._SAVED_EVERY", 1e9)
    pull(view, times=2)
    ask(view, "pause")
    assert shown()["filling"]["state"] == "paused" and shown()["filling"]["done"] > before
    values = np.frombuffer(bytes(shown()["values"]["data"]), np.float32)
    assert int((~np.isnan(values)).sum()) == shown()["filling"]["done"] == known(view)
    pull(view, times=2, turn=1)
    assert shown()["filling"]["done"] < known(view)
    monkeypatch.setattr("optlens.widgets.patching_view._SAVED_EVERY", -1.0)
    pull(view)
    assert shown()["filling"]["done"] == known(view)
    assert repr(view).endswith(f"{int(view.result.values.isnan().sum())} not computed)")
    assert "Not complete" in str(view._fallback())


def test_what_is_pushed_follows_what_was_pushed_before(model, monkeypatch):
    view = PatchingView(sweep(model, stream=True))
    sent = []
    monkeypatch.setattr(view, "send", lambda content, buffers=None: sent.append(content))
    slowly(view, monkeypatch)
    pull(view)
    view.run(progress=False)
    news = [message["content"] for message in sent]
    assert [message["kind"] for message in sent] == ["news"] * len(sent)
    assert [one["since"] for one in news[1:]] == [one["to"] for one in news[:-1]]
    assert {one["state"] for one in news[:-1]} <= {"python"} and news[-1]["state"] == "done"


def test_the_strongest_patch_is_chosen_in_the_end_unless_someone_looks_elsewhere(model):
    looked = PatchingView(sweep(model, stream=True))
    looked.selected = {"layer": 1, "head": 2, "query": 4}
    looked.run(progress=False)
    assert (looked.selected["head"], looked.selected["query"]) == (2, 4)
    view = PatchingView(sweep(model, stream=True))
    view.run(progress=False)
    best = view._parts[0].facts.top[0]
    assert [view.selected[place] for place in ("layer", "head", "query")] == list(best)


def test_an_interrupt_returns_what_was_done(model, monkeypatch):
    view = PatchingView(sweep(model, stream=True))
    slowly(view, monkeypatch)
    pull(view, times=2)
    done = known(view)

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(view._parts[0].filling.stream, "advance", interrupted)
    with pytest.warns(UserWarning, match=f"Interrupted: {done} of"):
        assert view.run(progress=False) is view.result
    assert view.parts[0]["state"]["filling"]["state"] == "paused"


def test_computing_waits_for_its_turn(model):
    view = PatchingView(sweep(model, stream=True))
    lock, held = lock_of(model), []
    stream = view._parts[0].filling.stream
    advance = stream.advance

    def watched(seconds):
        held.append(lock._is_owned())
        advance(seconds)

    stream.advance = watched
    pull(view)
    ask(view, "predictions", index=[0, 0, 0], which=0)
    assert held == [True]


def test_intervals_come_in_the_end(model):
    prompts = torch.cat([CLEAN, CLEAN.roll(1)]), torch.cat([CORRUPT, CORRUPT.roll(1)])
    over = ("layer", "head")
    view = PatchingView(
        optlens.patch_sweep(model, *prompts, "z", over, logit_diff(5, 6), stream=True)
    )
    part = view._parts[0]
    assert part.state(0)["low"] is None
    view.run(progress=False)
    state, low = part.state(0), view.result.interval()[0]
    np.testing.assert_allclose(state["low"], low, rtol=1e-5, atol=1e-6)
    assert state["normalized_low"] is not None and state["n_prompts"] == 2


@pytest.mark.parametrize("kind", ["ablation", "knockout", "tracing", "equal ends"])
def test_other_sweeps_fill_in_too(model, kind):
    same = {"metric": logit_diff(5, 6), "stream": True}
    stream = {
        "ablation": lambda: optlens.ablate_sweep(model, CLEAN, mode="zero", **same),
        "knockout": lambda: optlens.knockout_sweep(model, CLEAN, **same),
        "tracing": lambda: optlens.causal_trace(model, CLEAN, [1, 2], samples=2, **same),
        "equal ends": lambda: optlens.patch_sweep(model, CLEAN, CLEAN, "z", ("layer", "head"), **same),
    }[kind]()  # fmt: skip
    view = PatchingView(stream)
    state = view._parts[0].state(0)
    assert (state["normalized"] is None) is (kind != "tracing")
    view.run(progress=False)
    assert view.result.complete and repr(view).endswith(")") and "not computed" not in repr(view)
    assert (view._parts[0].state(0)["normalized"] is None) is (kind != "tracing")


def test_a_result_has_nothing_to_run():
    view = PatchingView(make_result("layer", "head"))
    for act in (view.run, view.cancel):
        with pytest.raises(RuntimeError, match="stream=True"):
            act()
    assert ask(view, "outlook")["filling"] is None


# --- single patches ------------------------------------------------------------------------------


def test_predictions_are_those_of_the_intervention(model):
    view = PatchingView(sweep(model, stream=True), top_k=4)
    found = ask(view, "predictions", index=[1, 2, 3], which=0)
    _, cache = model.run_with_cache(CLEAN)
    patch = Patch("z", layer=1, head=2, pos=3, value=cache["z", 1][0, 3, 2])
    with model.intervene(patch):
        patched = model(CORRUPT).logits
    expected = [model(CLEAN).logits, model(CORRUPT).logits, patched]
    assert [(run["role"], run["name"]) for run in found["runs"]] == [
        ("source", "clean"), ("base", "corrupt"), ("patched", "corrupt")
    ]  # fmt: skip
    for run, logits in zip(found["runs"], expected, strict=True):
        probs, ids = logits[0, -1].softmax(-1).topk(4)
        assert run["ids"] == ids.tolist()
        assert run["probs"] == pytest.approx(probs.tolist(), abs=2e-6)
    assert found["at"] == 5


def test_predictions_are_made_once(model, monkeypatch):
    view, made = PatchingView(sweep(model, stream=True)), []
    run = patching_runs.final_logits
    monkeypatch.setattr(patching_runs, "final_logits", lambda *a: made.append(a[-1]) or run(*a))
    for index in ([0, 0, 3], [0, 0, 3], [1, 2, 3]):
        ask(view, "predictions", index=index, which=0)
    assert made == ["source", "base", "patched", "patched"]


def test_a_result_shows_predictions_with_its_model_alone(model, tmp_path):
    result = sweep(model)
    result.save(tmp_path / "r.safetensors")
    result = PatchResult.load(tmp_path / "r.safetensors")
    view = PatchingView(result)
    assert "PatchingView(result, model)" in ask(view, "outlook")["predictions"]
    with pytest.raises(QuestionError, match="this view has none"):
        ask(view, "predictions", index=[0, 0, 0], which=0)
    assert (
        "patch = Freeze('z', layer=0, pos=0, head=0, source=clean)"
        in (ask(view, "code", index=[0, 0, 0], which=0)["code"])
    )
    other = PatchingView(result, model)
    assert ask(other, "outlook")["predictions"] == ""
    live = PatchingView(sweep(model, stream=True))
    question = {"index": [1, 1, 4], "which": 0}
    assert ask(other, "predictions", **question) == ask(live, "predictions", **question)
    with pytest.raises(InputError, match="other weights"):
        PatchingView(result, random_model(tiny_config(), seed=3))
    with torch.no_grad():
        model.decoder.layers[0].fc1.weight.mul_(1.5)
    with pytest.raises(QuestionError, match="altered"):
        ask(other, "predictions", index=[1, 1, 3], which=0)


def test_a_sweep_under_interventions_needs_them(model):
    given = [Ablate("z", layer=0, head=1)]
    result = sweep(model, interventions=given)
    with pytest.raises(InputError, match="ran under 1 interventions"):
        PatchingView(result, model)
    with pytest.raises(QuestionError, match="interventions="):
        ask(PatchingView(result), "code", index=[0, 0, 0], which=0)
    view = PatchingView(result, model, interventions=given)
    code = ask(view, "code", index=[1, 0, 0], which=0)["code"]
    assert "standing = [Ablate('z', layer=0, head=1)]" in code and "[*standing, patch]" in code
    live = PatchingView(sweep(model, interventions=given, stream=True))
    question = {"index": [1, 0, 3], "which": 0}
    assert ask(live, "predictions", **question) == ask(view, "predictions", **question)


def test_kinds_without_single_interventions_say_so(model):
    traced = optlens.causal_trace(model, CLEAN, [1], logit_diff(5, 6), samples=2, progress=False)
    found = ask(PatchingView(traced, model), "outlook")
    assert "draws of noise" in found["predictions"] and "draws of noise" in found["code"]


# --- pages ---------------------------------------------------------------------------------------


def held(view, what):
    return [question for question, _ in contents(view)["answers"] if question["what"] == what]


def test_a_page_holds_predictions_where_they_are_few(model, monkeypatch):
    view = PatchingView(sweep(model), model)
    count = view.result.values.numel()
    assert len(held(view, "predictions")) == len(held(view, "code")) == count
    answers = {json.dumps(q, sort_keys=True): a for q, a in contents(view)["answers"]}
    question = PLACE | {"what": "predictions", "index": [1, 2, 3], "which": 0}
    assert answers[json.dumps(question, sort_keys=True)] == view.answer(question)
    for name, value, reason in (
        ("PAGE_PATCHES", count - 1, f"{count - 1} patches at most, and here are {count}"),
        ("PAGE_PRODUCTS", 1.0, "take too long"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(patching_runs, name, value)
            assert held(view, "predictions") == []
            (found,) = [a for q, a in contents(view)["answers"] if q["what"] == "outlook"]
            assert reason in found["predictions"] and found["code"] == ""


def test_a_page_without_a_model_holds_the_code(monkeypatch):
    view = PatchingView(make_result("layer", "pos"))
    assert len(held(view, "code")) == view.result.values.numel()
    assert held(view, "predictions") == []
    monkeypatch.setattr(patching_runs, "PAGE_CODES", 3)
    assert held(view, "code") == []


def test_a_page_of_a_sweep_that_was_cut_short_is_the_same_twice(model, monkeypatch, tmp_path):
    view = PatchingView(sweep(model, stream=True))
    slowly(view, monkeypatch)
    pull(view, times=3)
    ask(view, "pause")
    for name in ("a.html", "b.html"):
        view.to_html(tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert known(view) < view.result.values.numel()  # writing a page computes nothing of the sweep
    view.to_png(tmp_path / "a.png")
    assert "0x" not in repr(view) and re.fullmatch(r"<.*, static>", repr(view.static()))


def test_hostile_tokens_are_made_visible(model):
    model.tokenizer = SimpleNamespace(
        display=lambda token: "\u202e<b>" if token % 2 else "\u0301",
        to_str_tokens=lambda ids: [str(i) for i in ids],
        bos_token_id=2, pad_token_id=1, encode=lambda text: [], decode=lambda ids: "\u202e",
    )  # fmt: skip
    found = ask(PatchingView(sweep(model), model), "predictions", index=[0, 0, 3], which=0)
    labels = {label for run in found["runs"] for label in run["labels"]}
    assert labels <= {"⟨U+202E⟩<b>", "◌\u0301"}
