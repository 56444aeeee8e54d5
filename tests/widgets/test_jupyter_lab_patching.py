"""Views that run a model from a click, in a real JupyterLab: a sweep that fills in, a text that is forked.

One server, one browser and one kernel, as in `test_jupyter_lab`. Needs JupyterLab, playwright and
Chromium; skipped without them, except on CI.
"""

import json
from functools import partial

import pytest
from browser_pages import skip_without
from jupyter_lab import (
    MISSING,
    RUN_ALL,
    browser_on,
    open_notebook,
    server,
    write_notebook,
)
from test_jupyter_lab import output, python

pytestmark = skip_without(MISSING)

SWEEP = """\
import optlens
from optlens.widgets import patching_fill
model = optlens.load()
clean = "When Mary and John went to the store, John gave a drink to"
corrupt = "When Mary and John went to the store, Mary gave a drink to"
metric = optlens.metrics.logit_diff(" Mary", " John")
sweep = (model, clean, corrupt, "z", ("layer", "head", "pos"), metric)
patching_fill.Filling.step.__defaults__ = (1e-9,)  # one patch for each answer
view = optlens.widgets.PatchingView(optlens.patch_sweep(*sweep, stream=True, positions=[11, 12, -1]))
view"""
FORK = """\
result = model.generate("Once upon a time", 8, output_scores=True)
written = optlens.widgets.GenerationView(result)
written"""
COUNT = "print(int((~view.result.values.isnan()).sum()), view.result.complete)"
WHOLE = """whole = optlens.patch_sweep(*sweep, positions=[11, 12, -1], progress=False)
print(view.result.complete, bool((view.result.values - whole.values).abs().max() < 1e-4))"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    assert MISSING == [], "CI must have what these tests need"
    folder = tmp_path_factory.mktemp("lab")
    write_notebook(folder / "runs.ipynb", SWEEP, FORK)
    with server(folder) as address, browser_on(folder / "profile") as browser:
        page = open_notebook(browser, address, "runs.ipynb")
        page.evaluate(RUN_ALL)
        page.get_by_role("region", name="Generation", exact=True).wait_for()
        page.folder, page.open_again = folder, partial(open_notebook, browser, address)
        yield page


def bar(view) -> int:
    return int(view.locator("[role=progressbar]").get_attribute("aria-valuenow"))


def numbered(view) -> int:
    """Return how many patches of the table on show have a number."""
    return view.locator(".ol-cell").count() - view.locator(".ol-cell", has_text="–").count()


def expected(view) -> int:
    """Return how many of the first layer's 24 patches are there by now.

    They come first, after the 16 of the last layer that change nothing and need no run.
    """
    return min(24, bar(view) - 16)


def test_a_sweep_fills_in_and_is_cancelled_half_way(lab):
    view = output(lab, 0)
    lab.wait_for_function("document.querySelector('.ol-fill-bar').ariaValueNow > 30")
    assert view.locator(".ol-fill").get_attribute("data-state") == "running"
    view.get_by_role("button", name="Cancel").click()
    view.locator(".ol-fill-words", has_text="Cancelled").wait_for()
    done, complete = python(lab, COUNT).split()
    lab.wait_for_timeout(300)
    assert python(lab, COUNT).split() == [done, complete]
    assert complete == "False" and 30 < int(done) < 120 and bar(view) == int(done)
    assert numbered(view) == expected(view)


def test_a_saved_notebook_shows_what_was_done_by_then(lab):
    done = bar(output(lab, 0))
    lab.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    saved = json.loads((lab.folder / "runs.ipynb").read_text(encoding="utf-8"))
    models = saved["metadata"]["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    states = [
        part["state"]["filling"]
        for model in models.values()
        for part in model["state"].get("parts", [])
        if part["kind"] == "patching"
    ]
    assert [(state["state"], state["done"]) for state in states] == [("paused", done)]
    (lab.folder / "partial.ipynb").write_text(json.dumps(saved), encoding="utf-8")


def test_a_chosen_patch_shows_what_is_predicted(lab):
    view = output(lab, 0)
    view.locator(".ol-cell[data-row='7'][data-column='0']").click()  # layer 0, head 7
    code = """from optlens import Freeze
with model.intervene([Freeze("z", layer=0, head=7, pos=11, source=clean)]):
    probs, ids = model(corrupt).logits[0, -1].softmax(-1).topk(1)
print(model.tokenizer.display(int(ids)), f"{100 * float(probs.detach()):.1f}")"""
    token, share = python(lab, code).split()
    patched = view.locator(".ol-outcomes ol").nth(2).locator("li").first
    patched.filter(has_text=f"{share} %").wait_for()
    assert token in patched.inner_text()
    view.get_by_role("button", name="Code").click()
    shown = view.locator(".ol-patch-code")
    shown.filter(has_text="Freeze('z', layer=0, pos=11, head=7, source=clean)").wait_for()
    check = f"exec({shown.inner_text()!r}); print(f'{{100 * float(logits.detach().softmax(-1).max()):.1f}}')"
    assert python(lab, check) == share


def test_hooks_in_the_middle_are_named_and_lose_nothing(lab):
    view = output(lab, 0)
    done = bar(view)
    python(lab, "attached = model.intervene([optlens.Ablate('z', layer=0)]); attached.__enter__()")
    view.get_by_role("button", name="Go on").click()
    view.locator(".ol-fill-words", has_text="Hook functions are attached").wait_for()
    assert bar(view) == done and view.get_by_role("button", name="Try again").is_visible()
    python(lab, "attached.__exit__(None, None, None)")


def test_it_goes_on_to_what_the_whole_sweep_gives(lab):
    view = output(lab, 0)
    view.get_by_role("button", name="Try again").click()
    view.locator(".ol-fill").wait_for(state="hidden", timeout=60_000)
    assert python(lab, WHOLE) == "True True"
    shown = view.locator(".ol-cell[data-row='7'][data-column='0']").inner_text()
    value = python(lab, "print(float(whole.normalized[0, 7, 0]))")
    assert float(shown) == pytest.approx(float(value), abs=0.006)


def test_python_runs_it_to_the_end_and_the_picture_follows(lab):
    """The cell is run again: a new sweep, whose picture takes the place of the old one."""
    lab.evaluate("""async () => { const panel = window.jupyterapp.shell.currentWidget;
        panel.content.activeCellIndex = 0;
        await window.jupyterapp.commands.execute('notebook:run-cell'); }""")
    view = output(lab, 0)
    view.locator(".ol-fill[data-state=running]").wait_for()
    python(lab, "view.cancel()")
    view.locator(".ol-fill-words", has_text="Cancelled").wait_for()
    assert python(lab, "print(view.run(progress=False) is view.result)") == "True"
    view.locator(".ol-fill").wait_for(state="hidden")
    assert python(lab, WHOLE) == "True True"
    layer, head = python(lab, "print(view.selected['layer'], view.selected['head'])").split()
    name = " ".join(view.locator(".ol-name").inner_text().split())
    assert f"layer {layer}" in name and f"head {head}" in name
    assert (
        python(lab, "print(int(whole.normalized.flatten(1).abs().max(1).values.argmax()))") == layer
    )


def test_a_text_is_forked_by_a_click(lab):
    view = output(lab, 1)
    view.locator(".ol-fork").wait_for()
    view.locator(".ol-slider").fill("3")
    view.get_by_label("Token to put there").fill("·dog")
    view.get_by_role("button", name="Fork here").click()
    view.locator(".ol-branch").nth(1).wait_for()
    assert python(lab, "print(len(written.branches[0]))") == "2"
    code = """other = result.fork(3, token=model.to_single_token(" dog"))
print(written.branches[0][1].sequences.tolist() == other.sequences.tolist())
print(other.texts[0][-30:])"""
    same, _, _ = python(lab, code).partition("\n")
    assert same == "True"
    view.locator(".ol-branch[aria-pressed=true]", has_text="from branch 1, step 3").wait_for()
    view.locator(".ol-branch", has_text="as generated").click()
    view.locator(".ol-branch[aria-pressed=true]", has_text="as generated").wait_for()
    state = python(lab, "print(len(written.parts[0]['state']['branches']))")
    assert state == "2"  # a saved notebook holds both


def test_what_cannot_be_forked_says_why(lab):
    view = output(lab, 1)
    view.get_by_label("Token to put there").fill("no single token")
    view.get_by_role("button", name="Fork here").click()
    view.locator(".ol-fork .ol-trouble", has_text="token").wait_for()
    assert python(lab, "print(len(written.branches[0]))") == "2"


def test_nothing_was_asked_of_the_network(lab):
    outside = [
        url for url in lab.asked if not url.startswith(("http://127.0.0.1", "data:", "blob:"))
    ]
    assert outside == []
    assert lab.complaints == []


def test_a_sweep_whose_kernel_is_gone_keeps_what_was_done(lab):
    lab.evaluate("""async () => { const panel = window.jupyterapp.shell.currentWidget;
        panel.content.activeCellIndex = 0;
        await window.jupyterapp.commands.execute('notebook:run-cell'); }""")
    view = output(lab, 0)
    lab.wait_for_function("document.querySelector('.ol-fill-bar').ariaValueNow > 25")
    lab.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    view.locator(".ol-fill-words", has_text="Partial: ").wait_for()
    assert 25 < bar(view) < 120 and numbered(view) == expected(view)


def test_a_notebook_that_was_saved_half_way_says_so_when_it_is_opened(lab):
    """The last one: it ends the kernel, so that nothing but the saved state is left."""
    lab.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page = lab.open_again("partial.ipynb")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.ready")
    view = output(page, 0)
    view.locator(".ol-fill-words", has_text="Partial: ").wait_for()
    assert 30 < bar(view) < 120 and numbered(view) == expected(view)
    view.locator(".ol-outcomes", has_text="needs a running kernel").wait_for()
    assert page.complaints == []
