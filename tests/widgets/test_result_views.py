"""Views of comparisons and generations: their numbers are those of the results, forks are forks."""

import threading

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config
from page_reader import Page

import optlens
from optlens.checks import InputError
from optlens.widgets import CompareView, GenerationView
from optlens.widgets.branches import candidates, lock_of
from optlens.widgets.compare_part import ComparePart
from optlens.widgets.generation_part import GenerationPart
from optlens.widgets.part import QuestionError

IDS = torch.tensor([2, 5, 17, 5, 9])
OTHER = torch.tensor([2, 5, 30, 17, 5, 8])
KEPT = {"output_scores": True, "output_logits": True, "stop_at_eos": False}


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


@pytest.fixture
def comparison(model):
    return optlens.compare(model, None, IDS, OTHER)


@pytest.fixture
def result(model):
    return model.generate(IDS, 6, top_k=4, temperature=0.8, seed=1, **KEPT)


def ask(view, **question):
    """Send a message as the picture does; return what Python sends back."""
    sent = []
    view.send = lambda content, buffers=None: sent.append(content)
    place = {"part": 0, "prompt": 0}
    view._answer(view, {"kind": "ask", "id": 7, "question": place | question}, [])
    return sent[-1]


# --- compare --------------------------------------------------------------------------------------


def test_comparison_travels_as_it_is(comparison):
    state = ComparePart(comparison).state(0)
    for name, values in (
        ("kl", comparison.lens_kl), ("js", comparison.lens_js), ("cosine", comparison.cosine),
    ):  # fmt: skip
        np.testing.assert_array_equal(state[name], values.numpy())
    one, other = state["sides"]
    assert one["places"] == [0, 1, None, 2, 3, 4] and other["places"] == [0, 1, 2, 3, 4, 5]
    assert one["tokens"] == ["⟨2⟩", "⟨5⟩", None, "⟨17⟩", "⟨5⟩", "⟨9⟩"]
    assert other["tokens"][2] == "⟨30⟩" and (one["ids"][:, 2] == -1).all()
    np.testing.assert_array_equal(other["probs"], comparison.guess_probs_b.numpy())
    changed = (comparison.top_a != comparison.top_b) & comparison.aligned
    np.testing.assert_array_equal(state["changed"], changed.numpy())
    assert not state["changed"][:, 2].any() and state["same_model"] and not state["same_prompt"]


def test_js_after_each_layer_ends_in_that_of_the_predictions(comparison):
    torch.testing.assert_close(comparison.lens_js[-1], comparison.js, equal_nan=True)
    p, q = (torch.randn(3, 7).log_softmax(-1) for _ in range(2))
    middle = (p.exp() + q.exp()) / 2
    expected = [(x.exp() * (x - middle.log())).sum(-1) for x in (p, q)]
    found = optlens.comparison.numbers._divergences(p, q)[2]
    torch.testing.assert_close(found, sum(expected) / 2)


def test_guesses_are_the_likeliest_tokens_of_the_lens(model):
    found = optlens.compare(model, None, IDS, OTHER, top_k=3)
    lens = model.record(OTHER).logit_lens(top_k=3)
    assert torch.equal(found.guesses_b, lens.top_tokens)
    torch.testing.assert_close(found.guess_probs_b, lens.top_probs)
    with pytest.raises(InputError, match="top_k=0"):
        optlens.compare(model, None, IDS, OTHER, top_k=0)


def test_compare_view_refuses_other_things_and_knows_its_size(comparison):
    assert repr(CompareView(comparison)) == "CompareView(rows=3, tokens=5 | 6, aligned=5)"
    with pytest.raises(TypeError, match=r"optlens\.compare"):
        CompareView(IDS)


# --- generation -----------------------------------------------------------------------------------


def test_candidates_are_softmax_of_logits_and_scores():
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])
    scores = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf, -torch.inf])
    found = candidates(logits, scores, chosen=2, top_k=3)
    assert found.ids.tolist() == [1, 2, 0] and (found.allowed, found.rank) == (2, 1)
    own, after = logits.softmax(-1), scores.softmax(-1)
    np.testing.assert_allclose(found.own, own[[1, 2, 0]])
    np.testing.assert_allclose(found.after, after[[1, 2, 0]])
    expected = [-(x[x > 0] * x[x > 0].log()).sum().item() for x in (own, after)]
    assert found.entropy == pytest.approx(expected, rel=1e-6)
    rare = candidates(logits, None, chosen=4, top_k=2)
    assert rare.ids.tolist() == [1, 4] and rare.after is None and rare.rank == 4
    assert np.isnan(rare.entropy[1])


def test_steps_are_those_of_each_text_of_a_padded_batch(model):
    ids = torch.stack([IDS, torch.tensor([1, 1, 2, 7, 8])])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    batch = model.generate(ids, 4, attention_mask=mask, **KEPT)
    part = GenerationPart(batch, top_k=3)
    alone = GenerationPart(model.generate(ids[1, 2:], 4, **KEPT), top_k=3)
    assert part.prompts[1].ids == alone.prompts[0].ids and part.state(1)["start"] == 3
    for one, other in zip(part.steps(1, 0), alone.steps(0, 0), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.own, other.own, rtol=1e-5)
    assert repr(GenerationView(batch)) == "GenerationView(2 texts, steps=4, branches=2)"


def test_a_fork_is_that_of_the_result(result):
    view = GenerationView(result)
    options = {"temperature": 0.9, "top_k": None, "top_p": 0.8, "seed": 5, "max_new_tokens": 3}
    question = {"branch": 0, "step": 2, "token": 11, "request": "one", "options": options}
    reply = ask(view, what="fork", **question)
    assert reply["kind"] == "answer" and reply["content"]["branch"] == 1
    expected = result.fork(
        2, 11, 0, temperature=0.9, top_k=None, top_p=0.8, seed=5, max_new_tokens=3
    )
    assert torch.equal(view.branches[0][1].sequences, expected.sequences)
    facts = reply["content"]["state"]["branches"][1]
    assert facts["ids"] == expected.sequences[0].tolist()
    assert (facts["seed"], facts["step"], facts["forced"]) == ("5", 2, True)
    assert facts["sampling"] == {"temperature": 0.9, "top_k": None, "top_p": 0.8}
    assert len(view.parts[0]["state"]["branches"]) == 2  # what a saved notebook holds
    # a late answer is asked for again, and must not be written twice
    assert ask(view, what="fork", **question)["content"]["branch"] == 1
    assert repr(view) == "GenerationView(steps=6, branches=2)"


def test_a_branch_shares_the_steps_before_it(result):
    part = GenerationPart(result)
    first = part.fork(0, step=3, token=11, options={"max_new_tokens": 4})
    second = part.fork(0, step=5, branch=first, options={"max_new_tokens": 2})
    third = part.fork(0, step=1, branch=second, options={"max_new_tokens": 1})
    root, one, two, three = (part.steps(0, n) for n in (0, first, second, third))
    assert [len(steps) for steps in (root, one, two, three)] == [6, 8, 7, 2]
    for step in range(4):  # of the fork, the distribution is its parent's; another token was taken
        np.testing.assert_array_equal(one[step].after[:3], root[step].after[:3])
    for step in range(5):
        np.testing.assert_array_equal(two[step].after, one[step].after)
    np.testing.assert_array_equal(three[0].after, root[0].after)
    ids = part.branches[0][first].ids
    assert ids[:8] == result.sequences[0, :8].tolist() and ids[8] == 11
    assert part.branches[0][second].result.options.samples is False
    # what follows is what the model says of that text
    logits = result.model(torch.tensor([ids[:9]])).logits[0, -1]
    np.testing.assert_allclose(one[4].own[0], logits.softmax(-1).max().item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"step": 9}, "no step 9"),
        ({"branch": 4}, "no step 2 in branch 4"),
        ({"options": {"top_p": 3.0}}, "top_p"),
        ({"options": {"max_new_tokens": 500}}, "positions for"),
        ({"text": " dog"}, "tokenizer"),
    ],
)
def test_a_fork_that_cannot_be_is_said(result, question, message):
    view = GenerationView(result)
    asked = {"branch": 0, "step": 2, "request": "one"} | question
    reply = ask(view, what="fork", **asked)
    assert reply["kind"] == "error" and message in reply["message"]
    assert len(view.branches[0]) == 1


def test_a_fork_waits_for_the_run_before_it(result):
    part, done = GenerationPart(result), []
    arguments = {"prompt": 0, "branch": 0, "step": 2, "request": "one"}
    thread = threading.Thread(target=lambda: done.append(part.answer_fork(**arguments)))
    with lock_of(result.model):
        thread.start()
        thread.join(0.3)
        assert done == [] and len(part.branches[0]) == 1
    thread.join(60)
    assert done[0]["branch"] == 1


def test_a_result_without_its_model_can_be_looked_at(result):
    result.model = None
    part = GenerationPart(result)
    assert part.answer_live(0)["live"] is False
    with pytest.raises(QuestionError, match="no model"):
        part.answer_fork(0, 0, 1, "one")


def test_what_has_no_steps_is_refused(model):
    with pytest.raises(InputError, match="output_scores=True"):
        GenerationView(model.generate(IDS, 2, return_dict=True))
    with pytest.raises(InputError, match="num_beams=1"):
        GenerationView(model.generate(IDS, 2, num_beams=2, output_scores=True))
    with pytest.raises(TypeError, match="not str"):
        GenerationView("text")


# --- files and plain markup -----------------------------------------------------------------------


@pytest.fixture(params=["compare", "generation"])
def view(request, comparison, result):
    return CompareView(comparison) if request.param == "compare" else GenerationView(result)


def test_result_pictures_are_written_without_a_browser(view, tmp_path):
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        files = []
        for i, options in enumerate(({}, {}, {"style": "dark"}, {"detail": True})):
            getattr(view, f"to_{kind}")(tmp_path / f"{i}", **options)
            files.append((tmp_path / f"{i}").read_bytes())
        assert all(data.startswith(start) for data in files)
        assert files[0] == files[1] and len(set(files)) == 3
    view.selected = {"query": 2}  # in the comparison, a token without a counterpart
    view.to_png(tmp_path / "alone", detail=True)


def test_result_pages_are_closed_and_the_same_each_time(view, tmp_path):
    for name in ("a", "b"):
        view.to_html(tmp_path / name)
    source = (tmp_path / "a").read_text(encoding="utf-8")
    assert source == (tmp_path / "b").read_text(encoding="utf-8")
    (policy,) = [a["content"] for a in Page(source).all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy


def test_plain_markup_of_results_survives_a_sanitiser(view):
    bundle, _ = view._repr_mimebundle_()
    page = Page(bundle["text/html"])
    allowed = set("div p b table caption thead tbody tr th td bdi br small".split())
    assert {tag for tag, _ in page.tags} <= allowed and page.all("table")
    assert bundle["text/html"] == view.static()._repr_html_()
