"""The patching view of a running sweep in a real browser, in front of the view in Python itself.

Messages go over a line that can be cut and delayed, so that everything a notebook's kernel does, and
fails to do, can be tried without one.
"""

import json
import re
import time

import pytest
import test_browser_widgets as shared
import torch
from browser_pages import THEMES
from conftest import random_model, tiny_config

import optlens
from optlens.widgets import PatchingView
from optlens.widgets.arrays import as_text, packed
from optlens.widgets.modules import joined
from optlens.widgets.stylesheet import stylesheet

pytestmark = shared.pytestmark
visit = shared.visit

CLEAN = torch.tensor([[2, 5, 17, 9, 11, 30]])
CORRUPT = torch.tensor([[2, 5, 9, 17, 11, 30]])

# A model whose messages go to Python, unless the line is cut; `held` ones wait until it is free again.
LINE = """
const contents = JSON.parse(document.getElementById("contents").textContent);
const selected = plainModel({ value: contents.selected });
const model = plainModel(contents.state);
model.widget_manager = { get_model: async () => selected };
window.line = { cut: 0, held: null, sent: [] };
window.kernel = selected;
window.push = (content) => model.tell("msg:custom", { kind: "news", part: 0, content }, []);
model.send = async (message) => {
  line.sent.push(message.question);
  if (line.cut > 0) { line.cut -= 1; return; }
  while (line.held) await line.held;
  const reply = JSON.parse(await window.askPython(JSON.stringify(message.question)));
  model.tell("msg:custom", { ...reply, id: message.id }, []);
};
renderView({ model, el: document.getElementById("view") }, { patching: patchingView });
"""


@pytest.fixture
def model():
    return random_model(tiny_config(num_hidden_layers=3))


def stream(model, **options):
    over, where = ("layer", "head", "pos"), {"positions": [2, 3, 5]}
    metric = optlens.metrics.logit_diff(5, 6)
    return optlens.patch_sweep(model, CLEAN, CORRUPT, "z", over, metric, **where, **options)


def written(view, folder):
    """Write the page of a view whose messages go to Python."""
    parts = [view._part_facts(part, 0, data=lambda state: state) for part in view._parts]
    state = {"format": view.format, "prompts": view.prompts, "parts": parts}
    state |= {"selection": "IPY_MODEL_s"}
    contents = packed({"state": state, "selected": view.selected}, as_text)
    text = json.dumps(contents).replace("<", "\\u003c")
    script = joined("patching.js", "shell.js", "standin.js") + LINE
    (folder / "live.html").write_text(
        f"<!DOCTYPE html><meta charset=utf-8><title>t</title><style>{stylesheet()}</style>"
        f"<main id=view></main><script id=contents type=application/json>{text}</script>"
        f"<script type=module>{script}</script>",
        encoding="utf-8",
    )
    return folder / "live.html"


@pytest.fixture
def live(browser, tmp_path, model, monkeypatch):
    """Open the view of a running sweep; each answer computes one patch."""
    contexts = []

    def open_view(view=None, seconds=1e-9, clock=False, pause=0.0, **options):
        view = PatchingView(stream(model, stream=True)) if view is None else view
        filling = view._parts[0].filling
        monkeypatch.setattr(type(filling).step, "__defaults__", (seconds,))
        contexts.append(browser.new_context(viewport={"width": 900, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))

        def answer(question):
            time.sleep(pause)
            try:
                content = packed(view.answer(json.loads(question)), as_text)
            except Exception as error:
                return json.dumps({"kind": "error", "message": str(error)})
            return json.dumps({"kind": "answer", "content": content})

        page.expose_function("askPython", answer)
        page.view = view
        if clock:
            page.clock.install()
        page.goto(written(view, tmp_path).as_uri())
        return page

    yield open_view
    for context in contexts:
        context.close()


def words(page):
    return page.locator(".ol-fill-words")


def done_in(page):
    """Return how many patches the picture shows by now, from its progress bar."""
    return int(page.locator("[role=progressbar]").get_attribute("aria-valuenow"))


def numbers(page):
    """Return the metric of every patch as the picture has it, from its table."""
    page.locator(".ol-buttons button", has_text="Table").click()
    rows = page.locator(".ol-table tbody tr").all_inner_texts()
    page.locator(".ol-buttons button", has_text="Table").click()
    shape = page.view.result.values.shape
    values = [row.split("\t")[-2].strip() for row in rows]  # the last is normalized
    return torch.tensor([float(v) if v else torch.nan for v in values]).view(-1, *shape[1:])


def more_asked(page):
    return page.evaluate("line.sent.filter(({ what }) => what === 'more').length")


def hold(page):
    """Let messages wait until `line.free()`, as in front of a busy kernel."""
    page.evaluate(
        "() => { line.held = new Promise((go) => { line.free = () => { line.held = null; go(); }; }); }"
    )


def test_it_fills_in_and_ends_with_what_the_sweep_gives(live, model):
    whole = stream(model, progress=False)
    page = live()
    page.locator(".ol-fill[data-state=running]").wait_for()
    page.locator(".ol-cell:not(:text-is('–'))").nth(9).wait_for()
    words(page).filter(has_text=re.compile(r"^\d+ of 36 patches")).wait_for()
    page.locator(".ol-fill").wait_for(state="hidden")
    page.locator(".ol-tools select").select_option(index=1)
    torch.testing.assert_close(numbers(page), whole.values[1:2], rtol=1e-4, atol=1e-4)
    assert page.locator(".ol-partial").is_hidden()
    assert page.view.result.complete and page.complaints == []
    assert "All 36 patches are done." in page.locator("[aria-live=polite]").inner_text()


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_a_cancel_stops_it_and_it_goes_on(live, way):
    page = live(pause=0.05)  # or all would be done before a key is pressed
    page.wait_for_function("line.sent.length > 12")
    if way == "button":
        page.get_by_role("button", name="Cancel").click()
    else:
        page.locator(".ol-cell[tabindex='0']").focus()
        page.keyboard.press("Escape")
    words(page).filter(has_text="Cancelled").wait_for()
    page.wait_for_timeout(200)
    asked, count = more_asked(page), done_in(page)
    page.wait_for_timeout(300)
    assert (more_asked(page), done_in(page)) == (asked, count)
    assert 0 < count < 36
    known = ~page.view.result.values.isnan()
    assert page.view._parts[0].filling.state == "paused" and int(known.sum()) == count
    shown = page.locator(".ol-cell:not(:text-is('–'))").count()
    assert shown == int(known[0].sum())  # the first layer is on show
    page.locator(".ol-cell[tabindex='0']").focus()
    if way == "button":
        page.get_by_role("button", name="Go on").click()
    else:
        page.keyboard.press("g")
    page.locator(".ol-fill").wait_for(state="hidden")
    assert page.view.result.complete and page.complaints == []


def test_of_quick_clicks_the_newest_wins(live):
    page = live(pause=0.05)
    page.wait_for_function("line.sent.length > 8")
    hold(page)  # a busy kernel: nothing is answered, in its order
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Go on").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Go on").click()
    page.evaluate("line.free()")
    page.locator(".ol-fill").wait_for(state="hidden")
    assert page.view.result.complete
    page = live(
        PatchingView(stream(page.view._parts[0].filling.stream.sweep.model, stream=True)),
        pause=0.05,
    )
    page.wait_for_function("line.sent.length > 8")
    hold(page)
    for name in ("Cancel", "Go on", "Cancel"):
        page.get_by_role("button", name=name).click()
    page.evaluate("line.free()")
    words(page).filter(has_text="Cancelled").wait_for()
    page.wait_for_timeout(300)
    count = done_in(page)
    page.wait_for_timeout(300)
    assert done_in(page) == count < 36
    assert (
        int((~page.view.result.values.isnan()).sum()) == count
    )  # nothing that was computed is lost


def test_a_busy_kernel_is_named_and_a_lost_message_is_sent_again(live):
    page = live(clock=True)
    page.wait_for_function("line.sent.length > 5")
    page.evaluate("line.cut = 1")
    page.wait_for_function("line.cut === 0")
    page.clock.fast_forward(2000)
    page.locator(".ol-status", has_text="busy").wait_for()
    count = done_in(page)
    assert count < 36
    page.clock.fast_forward(7000)
    page.locator(".ol-fill").wait_for(state="hidden")
    assert page.view.result.complete


def test_an_error_of_the_model_is_named_and_it_is_tried_again(live, model):
    page = live()
    page.wait_for_function("line.sent.length > 8")
    erase = optlens.Ablate("z", layer=0)
    with model.intervene(erase):
        words(page).filter(has_text="Hook functions are attached").wait_for()
        count = done_in(page)
        assert 0 < count < 36
        page.get_by_role("button", name="Try again").click()
        page.wait_for_timeout(200)
        words(page).filter(has_text="Hook functions are attached").wait_for()
    assert "ol-trouble" in words(page).get_attribute("class")
    assert done_in(page) == count
    page.get_by_role("button", name="Try again").click()
    page.locator(".ol-fill").wait_for(state="hidden")
    assert page.view.result.complete and page.complaints == []


def test_a_kernel_that_goes_leaves_what_was_done(live):
    page = live()
    page.wait_for_function("line.sent.length > 8")
    hold(page)
    page.evaluate("kernel.comm_live = false; kernel.tell('comm_live_update')")
    words(page).filter(has_text="Partial").wait_for()
    count = done_in(page)
    assert 0 < count < 36
    assert page.locator(".ol-status", has_text="without a kernel").is_visible()
    assert page.locator(".ol-fill button").is_hidden()
    assert page.locator(".ol-cell:not(:text-is('–'))").count() > 0


def test_what_python_computes_is_shown_while_it_does(live):
    view_news = []
    page = live()
    page.wait_for_function("line.sent.length > 8")
    page.get_by_role("button", name="Cancel").click()
    words(page).filter(has_text="Cancelled").wait_for()
    page.wait_for_timeout(200)
    view, filling = page.view, page.view._parts[0].filling
    since = len(filling.stream.filled)
    filling.stream.advance(1e-9)
    view_news.append(packed(filling.news(since) | {"state": "python"}, as_text))
    lost = len(filling.stream.filled)
    filling.stream.advance(1e-9)
    filling.stream.advance(1e-9)
    view_news.append(packed(filling.news(lost + 1) | {"state": "python"}, as_text))
    page.evaluate("(news) => push(news)", view_news[0])
    words(page).filter(has_text="computed by a cell").wait_for()
    assert page.locator(".ol-fill button").is_hidden()
    page.evaluate("(news) => push(news)", view_news[1])  # one in between was lost
    page.wait_for_function("(n) => document.querySelector('[role=progressbar]').ariaValueNow >= n",
                           arg=filling.facts()["done"])  # fmt: skip
    known = int((~view.result.values[0].isnan()).sum())
    page.wait_for_function(
        "(n) => [...document.querySelectorAll('.ol-cell')].filter((c) => c.innerText !== '–').length >= n",
        arg=known,
    )


def test_predictions_and_code_of_the_chosen_patch(live):
    page = live(seconds=60.0)
    page.locator(".ol-fill").wait_for(state="hidden")
    page.locator(".ol-tools select").select_option(index=2)
    page.locator(".ol-cell[data-row='1'][data-column='2']").click()
    lists = page.locator(".ol-outcomes ol")
    page.locator(".ol-outcomes[aria-busy=false]").wait_for()
    expected = page.view.answer(
        {"part": 0, "prompt": 0, "what": "predictions", "index": [2, 1, 2], "which": 0}
    )
    assert lists.count() == 3
    page.locator(".ol-outcomes", has_text="What comes next, after ⟨30⟩ (position 5)").wait_for()
    for number, run in enumerate(expected["runs"]):
        rows = lists.nth(number).locator("li").all_inner_texts()
        for row, label, prob in zip(rows, run["labels"], run["probs"], strict=True):
            assert label in row and f"{100 * prob:.1f} %" in row
    page.locator(".ol-cell[tabindex='0']").focus()
    page.keyboard.press("c")
    code = page.locator(".ol-patch-code")
    code.filter(has_text="Freeze('z', layer=2, pos=5, head=1, source=clean)").wait_for()
    page.keyboard.press("ArrowLeft")
    code.filter(has_text="pos=3, head=1").wait_for()
    page.keyboard.press("c")
    assert code.count() == 0 and page.complaints == []


def test_nothing_moves_for_who_asks_for_that(live):
    for motion, expected in (("reduce", "0s"), ("no-preference", "0.15s")):
        page = live(reduced_motion=motion)
        page.locator(".ol-fill-bar span").wait_for(state="attached")
        found = page.locator(".ol-fill-bar span").evaluate(
            "(el) => getComputedStyle(el).transitionDuration"
        )
        assert found == expected


# --- pages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("pages"), random_model(tiny_config())
    view = PatchingView(stream(model, stream=True))
    for _ in range(4):
        view._parts[0].filling.stream.advance(1e-9)
    view.to_html(folder / "partial.html")
    view.run(progress=False)
    view.to_html(folder / "held.html")
    PatchingView(view.result).to_html(folder / "bare.html")
    return folder


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", shared.WIDTHS)
@pytest.mark.parametrize("name", ["partial", "held"])
def test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme):
    shared.test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme)


def test_a_page_of_a_sweep_that_was_cut_short_says_so(visit):
    page = visit("partial")
    words(page).filter(has_text=re.compile(r"Partial: \d+ of 24 patches were done")).wait_for()
    assert page.locator(".ol-fill button").is_hidden()
    assert page.complaints == []


def test_a_page_holds_what_is_predicted(visit):
    page = visit("held")
    page.locator(".ol-outcomes li").nth(14).wait_for()
    before = page.locator(".ol-outcomes ol").nth(2).inner_text()
    page.locator(".ol-cell[data-row='1'][data-column='2']").click()
    page.wait_for_function(
        "(before) => document.querySelectorAll('.ol-outcomes ol')[2].innerText !== before",
        arg=before,
    )
    page.get_by_role("button", name="Code").click()
    page.locator(".ol-patch-code", has_text="with model.intervene([patch]):").wait_for()
    assert page.complaints == []


def test_a_page_without_a_model_says_what_is_needed(visit):
    page = visit("bare")
    page.locator(".ol-outcomes", has_text="PatchingView(result, model) shows it").wait_for()
    assert page.locator(".ol-outcomes li").count() == 0
