"""What an explorer must not get wrong: batches, other positions, models that change beneath it."""

import pytest
import torch

import optlens
from optlens import Ablate, Freeze, Scale
from optlens.checks import InputError
from optlens.metrics import logit_diff
from optlens.widgets import Explorer, LensView, PatchingView
from optlens.widgets.part import QuestionError
from optlens.widgets.recipe import code_of

PROMPT = "The cat sat on the mat"
LONG = "The cat sat on the mat and then it slept in the sun"


@pytest.fixture(scope="module")
def model():
    return optlens.load()


def page_ablations(explorer, prompt=0):
    part = explorer._parts[0]
    return next(a for q, a in part.page_answers(prompt) if q["what"] == "live")["ablations"]


def test_a_page_reads_ablations_at_the_last_recorded_position(model):
    found = page_ablations(Explorer(model.record(PROMPT, pos=[0, 1, 2])))
    run = model.record(PROMPT, interventions=[Ablate("z", layer=3, head=1)])
    probs = run.logits[2].float().softmax(-1)
    assert found["query"] == 2
    assert found["kept"][3, 1] == pytest.approx(float(probs[found["chosen"]]), abs=1e-5)


def test_a_page_of_a_batch_with_sources_of_its_own_is_written(model, tmp_path):
    swapped = Freeze("z", layer=1, source=["The dog sat on the mat", PROMPT])
    explorer = Explorer(model, [PROMPT, "The dog sat on the mat"], interventions=[swapped])
    assert page_ablations(explorer) is None
    explorer.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 50_000


def test_who_wrote_it_in_a_batch_of_unequal_lengths(model):
    part = Explorer(model, ["The cat", LONG])._parts[0]
    alone = Explorer(model, LONG)._parts[0]
    asked = {"layer": 3, "query": 8, "token": 20}
    found, expected = part.answer_contributors(1, **asked), alone.answer_contributors(0, **asked)
    assert found["total"] == pytest.approx(expected["total"], abs=1e-3)
    short = Explorer(model, "The cat")._parts[0].answer_contributors(0, 3, 1, 20)
    assert part.answer_contributors(0, 3, 1, 20)["total"] == pytest.approx(short["total"], abs=1e-3)


def test_contributors_are_those_of_the_run_in_force(model):
    explorer = Explorer(model, PROMPT)
    part = explorer._parts[0]
    asked = (0, 4, 3, 20)
    before = part.answer_contributors(*asked)["total"]
    stale = part._parts
    explorer.interventions = [Ablate("mlp_out", layer=4)]
    part._parts = stale  # as a question that was under way leaves it
    after = part.answer_contributors(*asked)["total"]
    expected = model.record(PROMPT, interventions=explorer.interventions).logits[3, 20]
    assert after == pytest.approx(float(expected), abs=1e-3) and after != pytest.approx(before)


def test_hooks_and_other_weights_are_refused():
    model = optlens.load()
    explorer = Explorer(model, PROMPT)
    with model.intervene([Ablate("z", layer=0)]):
        with pytest.raises(InputError, match="Hook functions are attached to"):
            explorer.interventions = [Scale("z", layer=1, factor=1.0)]
        with pytest.raises(InputError, match="Hook functions are attached to"):
            Explorer(model, PROMPT)
    with torch.no_grad():
        model.decoder.layers[2].fc2.weight.mul_(0.5)
    with pytest.raises(InputError, match="altered since the first of these runs"):
        explorer.interventions = [Scale("z", layer=1, factor=1.0)]
    assert explorer.interventions == ()
    explorer.prompt = "The dog"  # both runs anew
    explorer.interventions = [Scale("z", layer=1, factor=1.0)]
    kl = explorer._parts[0].predictions(0).kl
    assert float(abs(torch.as_tensor(kl)).max()) < 1e-6


def test_an_observer_that_raises_meets_the_new_run(model):
    explorer = Explorer(model, PROMPT)

    def raising(change):
        raise RuntimeError("observer")

    explorer.observe(raising, "selected")
    with pytest.raises(RuntimeError, match="observer"):
        explorer.prompt = LONG
    assert explorer.prompt == LONG and explorer.recording.prompt == "</s>" + LONG
    assert explorer._parts[1].recording is explorer.recording


def test_a_list_of_prompts_is_its_own(model):
    given = [PROMPT, "The dog"]
    explorer = Explorer(model, given)
    given[0] = explorer.prompt[1] = "Other words"
    assert explorer.code.count(PROMPT) == 1 and "Other words" not in explorer.code
    explorer.interventions = [Ablate("z", layer=1)]
    runs = explorer.recording, explorer.original
    assert all(run.prompt == ["</s>" + PROMPT, "</s>The dog"] for run in runs)


def test_views_of_fewer_prompts_beside_an_explorer(model, tmp_path):
    rec = model.record([PROMPT, "The dog"])
    beside, explorer = LensView(rec), Explorer(rec)
    explorer.prompt = [PROMPT, "The dog", "The bird"]
    explorer.selected = {"prompt": 2}
    beside.to_html(tmp_path / "beside.html")
    assert "The cat" in str(beside._fallback())
    beside.figure()
    assert repr(LensView(rec)) == repr(beside)


def test_numbers_of_what_nothing_names_are_forgotten(model):
    explorer = Explorer(model, PROMPT)
    part = explorer._parts[0]
    for layer in range(4):
        explorer.interventions = [Ablate("z", layer=layer)]
        explorer.undo()
    assert len(part._numbers) == 1
    with pytest.raises(QuestionError, match="run its cell again"):
        part.answer_set(0, [{"number": 77}])


def test_code_with_a_long_mask_runs(model):
    mask = torch.ones(1, 700, dtype=torch.long)
    code = code_of(torch.tensor([[2, 5]]), (), {"attention_mask": mask})
    assert "attention_mask=explorer.recording.mask.long()" in code


def test_an_error_in_a_run_leaves_the_picture_with_what_was_done(model):
    calls = []

    def metric(logits):
        calls.append(1)
        if len(calls) > 12:
            raise RuntimeError("the metric broke")
        return logits[:, -1, 5]

    other = "The dog sat on the mat"
    stream = optlens.patch_sweep(model, PROMPT, other, "z", ("layer", "head"), metric, stream=True)
    view, sent = PatchingView(stream), []
    view.send = lambda content, buffers=None: sent.append(content)
    with pytest.raises(RuntimeError, match="the metric broke"):
        view.run(progress=False)
    assert sent[-1]["content"]["state"] != "python"
    assert view._saved[0] == view._parts[0].filling.state


def test_the_code_of_a_patch_names_the_spans(model):
    clean, corrupt = "The capital of France is", "The capital of Italy is"
    standing, spans = [Ablate("z", layer=0, head=1, pos="country")], {"country": 4}
    metric = logit_diff(" Paris", " Rome")
    options = {"interventions": standing, "spans": spans, "progress": False}
    result = optlens.patch_sweep(model, clean, corrupt, "z", ("layer",), metric, **options)
    view = PatchingView(result, model, interventions=standing, spans=spans)
    code = view._parts[0].runs.code((2,), 0)
    names = {"model": model}
    exec(code, names)
    assert names["logits"].shape == (model.config.vocab_size,)
