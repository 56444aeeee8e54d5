"""The views in a real JupyterLab: clicks reach Python, Python reaches the views, trouble is shown.

One server, one browser and one kernel for all of it, as each takes seconds to start. Needs JupyterLab,
playwright and Chromium; skipped without them, except on CI.
"""

import json
import re
from functools import partial

import pytest
from browser_pages import skip_without
from jupyter_lab import (
    EVALUATE,
    MISSING,
    RUN_ALL,
    browser_on,
    open_notebook,
    server,
    write_notebook,
)

from optlens.widgets import export_notebook

pytestmark = skip_without(MISSING)

SMALL = """\
import ipywidgets, optlens, time, torch
rec = optlens.load().record("When Mary and John went to the store, John gave a drink to")
heard = []
view = rec.show()
view.observe(lambda change: heard.append(change["new"]["head"]), "selected")
view"""
LONG = """\
config = optlens.OPTConfig(vocab_size=99, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2,
    num_attention_heads=4, ffn_dim=64, max_position_embeddings=640)
torch.manual_seed(0)
long = optlens.OPTForCausalLM(config).eval().record(torch.arange(600) % 90 + 5)
far = optlens.widgets.AttentionView(long)
far"""
OPEN = """from optlens.widgets import LensView, cells
views = [view for view in cells._PLACES if type(view).__mro__[1] is LensView]
print(len([view for view in views if view.comm is not None]))"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    assert MISSING == [], "CI must have what these tests need"
    folder = tmp_path_factory.mktemp("lab")
    cells = (SMALL, "optlens.widgets.AttentionView(rec)", LONG, "optlens.widgets.LensView(rec)")
    write_notebook(folder / "views.ipynb", *cells)
    with server(folder) as address, browser_on(folder / "profile") as browser:
        page = open_notebook(browser, address, "views.ipynb")
        page.evaluate(RUN_ALL)
        for name in ("Logit lens", "Attention"):
            page.get_by_role("region", name=name, exact=True).first.wait_for()
        page.folder, page.open_again = folder, partial(open_notebook, browser, address)
        yield page


def output(page, number: int):
    """Return the output of a code cell, brought into sight."""
    page.evaluate(
        "(number) => window.jupyterapp.shell.currentWidget.content.scrollToItem(number, 'start')",
        number,
    )
    found = page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{number}'] .ol")
    found.wait_for()
    return found


def python(page, code: str) -> str:
    return page.evaluate(EVALUATE, code)


def shows(page, number: int, text: str) -> None:
    """Wait until a cell's view says which head it shows."""
    output(page, number).locator(".ol-name", has_text=text).first.wait_for()


def test_a_click_is_heard_in_python_and_seen_in_other_cells(lab):
    view = output(lab, 0)
    view.locator(".ol-head[aria-label='layer 3, head 2']").click()
    shows(lab, 0, "Layer 3, head 2")
    shows(lab, 1, "Layer 3, head 2")
    assert python(lab, "print(heard, view.selected['layer'])") == "[2] 3"
    output(lab, 1).locator(".ol-head[aria-label='layer 1, head 6']").click()
    shows(lab, 0, "Layer 1, head 6")
    assert python(lab, "print(heard)") == "[2, 6]"


def test_python_selects(lab):
    python(lab, "view.selected = {'layer': 2, 'head': 7, 'query': 5}")
    shows(lab, 0, "Layer 2, head 7")
    shows(lab, 1, "Layer 2, head 7")
    strip = output(lab, 1).locator(".ol-strip li[data-query]")
    assert strip.get_attribute("data-at") == "5"
    assert "cannot be selected" in python(lab, "view.selected = {'head': -1}")


def test_keys_belong_to_the_view(lab):
    count = "window.jupyterapp.shell.currentWidget.content.widgets.length"
    before = lab.evaluate(count)
    view = output(lab, 1)
    view.locator(".ol-head[aria-selected='true']").click()
    for key in ("a", "b", "x", "d", "d", "ArrowUp", "ArrowLeft", "o"):
        lab.keyboard.press(key)
    assert lab.evaluate(count) == before
    shows(lab, 1, "Layer 1, head 6")
    assert view.get_by_label("Order").input_value() == "entropy"


def test_a_long_prompt_travels_head_by_head(lab):
    view = output(lab, 2)
    view.locator(".ol-head[aria-label='layer 0, head 3']").click()
    code = (
        "row = long.attention[0, 3, 599]; print(int(row.argmax()), f'{100 * float(row.max()):.1f}')"
    )
    key, weight = python(lab, code).split()
    exact = re.compile(rf"599 mostly reads .* {key}\s+{weight} %")  # without a sign for "about"
    view.locator(".ol-readout", has_text=exact).wait_for()
    assert "each pixel is the largest of" in view.locator(".ol-legend").inner_text()
    size = python(lab, "print(sum(len(bytes(a['data'])) for a in far.parts[0]['state'].values() "
                       "if isinstance(a, dict)))")  # fmt: skip
    assert int(size) < 1_000_000


def test_a_running_cell_and_the_views_never_use_the_model_at_once(lab):
    """A cell runs the plain model all the while that clicks in a view ask for ablations."""
    view = output(lab, 0)
    python(lab, "plain = rec.model(rec.tokens[None]).logits; threads = []\n"
                "part = view._parts[0]; asked = part.answer_set\n"
                "import threading\n"
                "part.answer_set = lambda *a, **k: (threads.append(threading.current_thread().name), "
                "asked(*a, **k))[1]")  # fmt: skip
    lab.evaluate("""() => { const panel = window.jupyterapp.shell.currentWidget;
        window.busy = panel.sessionContext.session.kernel.requestExecute({ code: `
end = time.time() + 3; same = []
while time.time() < end or len(same) < 20:
    same.append(torch.equal(rec.model(rec.tokens[None]).logits, plain))` }).done; }""")
    for head in (1, 5, 2):
        view.locator(f".ol-head[aria-label^='layer 2, head {head}']").click()
        view.locator("[data-do=ablate]").click()
    lab.evaluate("window.busy")
    view.locator(".ol-iv-list, .ol-iv-entry").first.wait_for()
    lab.wait_for_timeout(1000)
    found = python(lab, "print(all(same), set(threads))")
    python(lab, "del part.answer_set; view.interventions = []")
    assert found == "True {'MainThread'}"


def test_a_click_ablates_a_head_and_python_sees_it(lab):
    view = output(lab, 0)
    python(
        lab, "seen = []; view.observe(lambda change: seen.append(change['new']), 'interventions')"
    )
    python(lab, "view.selected = {'query': 15}")
    view.locator(".ol-head[aria-label='layer 3, head 0']").click()
    view.locator("[data-do='ablate']").click()
    view.locator(".ol-iv-list", has_text="head 3.0: ablated").wait_for()
    assert python(lab, "print(seen)") == "[(Ablate('z', layer=3, head=0),)]"
    code = """rows = [run.logits[-1].softmax(-1) for run in
    (rec, rec.model.record(rec.prompt, interventions=[optlens.Ablate('z', layer=3, head=0)]))]
best = int(rows[1].argmax())
print(rec.label(best), *(f'{100 * float(row[best]):.1f}' for row in rows))
print(torch.equal(view.recording.logits[-1].softmax(-1), rows[1]), view.original is rec)"""
    label, before, after = python(lab, code).splitlines()[0].split()
    assert python(lab, code).splitlines()[1] == "True True"
    shown = view.locator(".ol-iv .ol-candidate", has_text=label).first
    assert f"{before} %" in shown.inner_text() and f"{after} %" in shown.inner_text()
    lens = view.locator(".ol-cell[data-row='5'][data-column='15']").first
    assert f"{after} %" in lens.inner_text()
    view.locator(".ol-head[aria-label='layer 3, head 0']").press("a")  # and takes it back
    view.locator(".ol-iv-none").wait_for()
    assert python(lab, "print(view.interventions, len(seen))") == "() 2"
    python(lab, "view.interventions = [optlens.Scale('mlp_out', layer=2, factor=0.5)]")
    view.locator(".ol-iv-list", has_text="MLP 2: × 0.5").wait_for()
    python(lab, "view.undo()")
    view.locator(".ol-iv-none").wait_for()


def test_a_busy_kernel_is_named_and_the_newest_choice_wins(lab):
    view = output(lab, 2)
    python(
        lab,
        """part, asked = far._parts[0], []
quick = part.answer_head
part.answer_head = lambda *a, **k: (asked.append(k['head']), time.sleep(4), quick(*a, **k))[-1]""",
    )
    for layer, head in ((1, 2), (1, 3), (0, 0)):
        view.locator(f".ol-head[aria-label='layer {layer}, head {head}']").click()
    view.locator(".ol-status", has_text="busy").wait_for()
    view.locator(".ol-status").wait_for(state="hidden")
    shows(lab, 2, "Layer 0, head 0")
    view.locator(".ol-square:not(.ol-waiting)").wait_for()
    python(lab, "part.answer_head = quick")
    assert python(lab, "print(far.selected['head'], asked[:2])") == "0 [2, 0]"


def test_an_error_in_python_is_shown_in_the_view(lab):
    python(
        lab,
        """def fail(*_, **__):
    raise RuntimeError('no <b>such</b> head')
part.answer_head = fail""",
    )
    view = output(lab, 2)
    view.locator(".ol-head[aria-label='layer 1, head 3']").click()
    view.locator(".ol-readout", has_text="no <b>such</b> head").wait_for()
    python(lab, "part.answer_head = quick")
    for layer, head in ((0, 0), (1, 3)):  # coming back asks anew
        view.locator(f".ol-head[aria-label='layer {layer}, head {head}']").click()
        view.locator(".ol-readout", has_text="mostly reads").wait_for()


def test_a_cell_run_again_leaves_one_view(lab):
    assert python(lab, OPEN) == "1"
    lab.evaluate("""async () => { const panel = window.jupyterapp.shell.currentWidget;
        panel.content.activeCellIndex = 3;
        await window.jupyterapp.commands.execute('notebook:run-cell'); }""")
    assert python(lab, OPEN) == "1"
    output(lab, 3).locator(".ol-cell[aria-selected='true']").wait_for()


def test_nothing_was_asked_of_the_network(lab):
    outside = [
        url for url in lab.asked if not url.startswith(("http://127.0.0.1", "data:", "blob:"))
    ]
    assert outside == []
    assert lab.complaints == []


def test_colours_follow_the_theme(lab):
    lab.evaluate(
        "window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })"
    )
    view = output(lab, 1)
    lab.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    lab.wait_for_function(
        "() => getComputedStyle(document.querySelector('.ol')).backgroundColor === 'rgb(20, 23, 28)'"
    )
    pixel = (
        """(canvas) => [...canvas.getContext('2d').getImageData(canvas.width - 1, 0, 1, 1).data]"""
    )
    lab.wait_for_timeout(300)  # the picture is painted in the next frame
    assert view.locator(".ol-square canvas").evaluate(pixel) == [37, 40, 45, 255]  # masked


def test_views_are_saved_with_what_is_selected(lab):
    python(lab, "view.selected = {'layer': 4, 'head': 3, 'query': 9}")
    shows(lab, 0, "Layer 4, head 3")
    lab.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    saved = json.loads((lab.folder / "views.ipynb").read_text(encoding="utf-8"))
    models = saved["metadata"]["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    chosen = [m["state"]["value"] for m in models.values() if "value" in m["state"]]
    place = {"prompt": 0, "layer": 4, "head": 3, "query": 9, "key": None, "token": None}
    assert place | {"neuron": None} in chosen
    output_of = saved["cells"][0]["outputs"][0]["data"]
    assert "<table>" in "".join(output_of["text/html"])
    assert output_of["text/plain"][0].startswith("Explorer(lens, attention, residual; ")


def test_a_saved_notebook_is_exported_with_its_views_linked(lab):
    made = export_notebook(lab.folder / "views.ipynb")
    assert (made.views, made.notes) == (4, ())
    page = lab.context.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    away = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", away)
    page.goto(made.path.as_uri())
    page.locator(".nb-view .ol-section").nth(6).wait_for()  # the page's policy forbids `eval`
    assert page.locator(".nb-view .ol-section").count() == 7
    views = page.locator(".ol")
    selected = views.nth(0).locator(".ol-attention .ol-name")
    assert selected.inner_text() == "Layer 4, head 3"  # as it was saved
    views.nth(1).locator(".ol-head[aria-label^='layer 2, head 6']").click()
    assert selected.inner_text() == "Layer 2, head 6"
    assert "After layer 2" in views.nth(3).locator(".ol-name").first.inner_text()
    far = views.nth(2)  # of a long prompt the state has small pictures alone
    far.locator(".ol-head[aria-label^='layer 1, head 1']").click()
    far.locator(".ol-readout", has_text="This page does not hold that").wait_for()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert said == []
    page.close()


def test_a_kernel_that_is_gone_is_named(lab):
    lab.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    lab.wait_for_function(
        "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
    )
    view = output(lab, 2)
    view.locator(".ol-strip li").nth(40).click()
    view.locator(".ol-status", has_text="without a kernel").wait_for()
    assert "40 mostly reads" in " ".join(view.locator(".ol-readout").inner_text().split())
    output(lab, 1).locator(".ol-head[aria-label^='layer 0, head 4']").click()
    shows(lab, 0, "Layer 0, head 4")  # views are linked all the same


def test_a_saved_notebook_shows_its_views_without_being_run(lab):
    """The last one: it ends the kernel, so that nothing but the saved state is left."""
    saved = (lab.folder / "views.ipynb").read_text(encoding="utf-8")
    (lab.folder / "again.ipynb").write_text(saved, encoding="utf-8")
    lab.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page = lab.open_again("again.ipynb")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.ready")
    shows(page, 0, "Layer 4, head 3")
    output(page, 1).locator(".ol-head[aria-label^='layer 2, head 5']").click()
    shows(page, 0, "Layer 2, head 5")
    readout = output(page, 1).locator(".ol-readout")
    assert re.search(r"9 mostly reads .* \d+\.\d %$", " ".join(readout.inner_text().split()))
    output(page, 2).locator(".ol-strip li").nth(40).click()
    output(page, 2).locator(".ol-status", has_text="without a kernel").wait_for()
    saved = output(page, 0)
    saved.locator(".ol-iv-note", has_text="run the cell again to change the run").wait_for()
    assert saved.locator("[data-do='ablate']").is_disabled()
    assert page.complaints == []
