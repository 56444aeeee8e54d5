"""The Explorer in a browser with Python behind it: clicks change the run, and every view follows.

Needs playwright and Chromium; skipped without them, except on CI.
"""

import re

import pytest
import torch
from browser_pages import MISSING, skip_without, visits
from live_page import LivePage

import optlens
from optlens import Ablate, Freeze, Scale
from optlens.widgets import Explorer

pytestmark = skip_without(MISSING)

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
CUT = Ablate("z", layer=3, head=2)
BAR = ".ol-iv-bar [data-do={}]"


@pytest.fixture(scope="module")
def model():
    return optlens.load()


@pytest.fixture
def open_view(browser):
    """Open a view in a page of its own, offline, which must not complain in the end."""
    with visits(browser, offline=True) as open_page:
        opened = []

        def show(view, width=1300, theme="light", **options):
            page = open_page("about:blank", width, theme, **options)
            opened.append(page)
            return LivePage(page, view)

        yield show
        for page in opened:
            assert page.complaints == [] and page.evaluate("stopped") == []


@pytest.fixture
def live(open_view, model):
    return open_view(Explorer(model, TEXT))


def head(page, layer, number):
    return page.locator(f".ol-head[aria-label='layer {layer}, head {number}']")


def in_force(page):
    return page.locator(".ol-iv-list li:not(.ol-iv-none)").all_inner_texts()


def wait_for(page, count):
    page.wait_for_function(
        f"document.querySelectorAll('.ol-iv-list li:not(.ol-iv-none)').length === {count}"
        " && !document.querySelector('[aria-busy=true]')"
    )


def outcome(page):
    """Return the next tokens as the view shows them: token, then its percentages."""
    lines = page.locator(".ol-iv .ol-candidate")
    return {
        line.locator(".ol-token").inner_text(): line.locator("> span").all_inner_texts()[1:]
        for line in lines.all()
    }


def percent(share):
    return f"{100 * float(share):.1f} %"


def test_a_click_ablates_a_head_and_every_view_follows(live, model):
    page = live.page
    head(page, 3, 2).click()
    page.locator(BAR.format("ablate")).click()
    wait_for(page, 1)
    assert live.view.interventions == (CUT,)
    run, before = model.record(TEXT, interventions=[CUT]), model.record(TEXT)
    best = int(run.logits[-1].argmax())
    shown = outcome(page)[model.tokenizer.display(best)]
    shares = [each.logits[-1].softmax(-1)[best] for each in (before, run)]
    assert shown[:2] == [percent(share) for share in shares]
    # the lens of the last layer, the weight in layer 4 and the length of the stream are the run's
    cell = page.locator(".ol-cell[data-row='5'][data-column='15']")
    assert percent(shares[1]) in cell.first.inner_text()
    head(page, 4, 0).click()
    weights = run.attention[4, 0, 15]
    assert f" {percent(weights.max())}" in page.locator(".ol-attention .ol-readout").inner_text()
    length = float(run.residual[5, 15].norm())
    assert abs(float(page.locator(".ol-residual .ol-cell[data-row='5'][data-column='15']").inner_text()) - length) < 0.01 * length  # fmt: skip
    assert head(page, 3, 2).evaluate("(el) => el.classList.contains('ol-touched')")
    assert "KL(before ‖ now)" in page.locator(".ol-iv").inner_text()


def test_three_clicks_from_a_lens_cell_to_an_ablation(live):
    page = live.page
    page.locator(".ol-cell[data-row='4'][data-column='15']").first.click()
    page.locator(".ol-iv-name", has_text="after layer 3, at 15").wait_for()
    writer = page.locator("button.ol-iv-writer", has_text="head").first
    layer, number = map(int, re.search(r"(\d+)\.(\d+)", writer.inner_text()).groups())
    writer.click()
    assert writer.get_attribute("aria-pressed") == "true"
    page.locator(BAR.format("ablate")).click()
    wait_for(page, 1)
    assert live.view.interventions == (Ablate("z", layer=layer, head=number),)
    assert live.view.selected["layer"] == layer and live.view.selected["head"] == number


def test_scale_patch_and_mean_stack(live, model):
    page, view = live.page, live.view
    head(page, 3, 2).click()
    page.get_by_label("Factor").fill("-1.5")
    page.locator(BAR.format("scale")).click()
    wait_for(page, 1)
    page.get_by_role("radio", name="MLP 3").click()
    page.locator(BAR.format("mean")).click()
    wait_for(page, 2)
    page.locator(".ol-residual .ol-cell[data-row='2'][data-column='11']").click()
    page.get_by_label("Other prompt").fill(OTHER)
    page.locator(BAR.format("patch")).click()
    wait_for(page, 3)
    assert view.interventions == (
        Scale("z", layer=3, head=2, factor=-1.5),
        Ablate("mlp_out", layer=3, mode="mean", reference=TEXT),
        Freeze("resid_post", layer=1, pos=11, source=OTHER),
    )
    assert "stream after 1 at 11 “·John”: from" in in_force(page)[2]
    names = {"model": model}
    exec(page.locator(".ol-iv-code").inner_text(), names)
    torch.testing.assert_close(names["rec"].residual, view.recording.residual, rtol=0, atol=0)
    page.get_by_role("button", name="Remove MLP 3").click()
    wait_for(page, 2)
    assert len(view.interventions) == 2 and view.interventions[1].pos == 11
    page.get_by_role("button", name="Reset").click()
    wait_for(page, 0)
    assert view.interventions == ()


def test_by_keyboard_alone(live):
    page = live.page
    head(page, 3, 2).click()
    page.keyboard.press("a")
    wait_for(page, 1)
    page.keyboard.press("ArrowRight")  # the grid is a new one; the focus is where it was
    page.keyboard.press("a")
    wait_for(page, 2)
    assert live.view.interventions == (CUT, Ablate("z", layer=3, head=3))
    page.keyboard.press("a")  # once more takes it back
    wait_for(page, 1)
    page.keyboard.press("u")
    wait_for(page, 2)
    page.keyboard.press("u")
    page.keyboard.press("u")
    wait_for(page, 0)
    page.keyboard.press("r")
    wait_for(page, 1)
    assert live.view.interventions == (CUT,)
    cell = page.locator(".ol-cell[data-row='2'][data-column='9']").first
    cell.click()
    page.keyboard.press("a")
    wait_for(page, 2)
    assert live.view.interventions[1] == Ablate("resid_post", layer=1, pos=9)


def test_what_one_looks_at_is_kept(live):
    page = live.page
    page.get_by_label("Order").select_option("induction")
    page.get_by_role("radio", name="entropy").click()
    page.get_by_role("radio", name="cosine to the end").click()
    page.get_by_label("Token to follow").fill("·Mary")
    page.get_by_role("button", name="Add").click()
    page.locator(".ol-chip", has_text="Mary").wait_for()
    page.get_by_role("region", name="Attention").get_by_role("button", name="Table").click()
    head(page, 3, 2).or_(page.locator(".ol-head[aria-label^='layer 3, head 2']")).first.click()
    page.keyboard.press("a")
    wait_for(page, 1)
    page.locator(".ol-chip", has_text="Mary").wait_for()
    assert page.get_by_label("Order").input_value() == "induction"
    for name in ("entropy", "cosine to the end"):
        assert page.get_by_role("radio", name=name).get_attribute("aria-checked") == "true"
    assert page.get_by_role("region", name="Attention").locator(".ol-table").count() == 1


def test_a_new_prompt_is_run(live, model):
    page = live.page
    field = page.get_by_role("textbox", name="Prompt", exact=True)
    head(page, 3, 2).click()
    page.keyboard.press("a")
    wait_for(page, 1)
    field.fill("The cat sat on the")
    field.press("Enter")
    page.locator(".ol-strip li").nth(5).wait_for()
    page.wait_for_function("document.querySelectorAll('.ol-strip li').length === 6")
    assert (live.view.prompt, live.view.interventions) == ("The cat sat on the", (CUT,))
    assert live.view.selected["query"] == 5
    run = model.record("The cat sat on the", interventions=[CUT])
    best = int(run.logits[-1].argmax())
    assert outcome(page)[model.tokenizer.display(best)][1] == percent(
        run.logits[-1].softmax(-1).max()
    )
    assert page.locator(".ol-iv-code").inner_text().count("'The cat sat on the'") == 1
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("document.querySelectorAll('.ol-strip li').length === 16")
    assert field.input_value() == TEXT


@pytest.mark.parametrize(
    ("text", "message"), [("", "prompt is empty"), ("a " * 600, "shorten the prompt")]
)
def test_a_prompt_that_cannot_be_run_says_why_and_loses_nothing(live, text, message):
    page = live.page
    head(page, 3, 2).click()
    page.keyboard.press("a")
    wait_for(page, 1)
    before = outcome(page)
    field = page.get_by_role("textbox", name="Prompt", exact=True)
    field.fill(text)
    field.press("Enter")
    page.locator(".ol-iv-trouble", has_text=message).wait_for()
    assert field.input_value() == text  # what was typed can be mended
    assert outcome(page) == before and in_force(page) == ["head 3.2: ablated\n×"]
    field.press("Escape")
    assert field.input_value() == TEXT


def test_what_does_not_fit_says_why(live):
    page = live.page
    page.locator(BAR.format("patch")).click()
    assert "Type the prompt to patch from" in page.locator(".ol-iv-trouble").inner_text()
    page.get_by_label("Other prompt").fill("The cat")
    page.locator(BAR.format("patch")).click()
    page.locator(".ol-iv-trouble", has_text="has 3 tokens and this one 16").wait_for()
    page.get_by_label("Factor").fill("")
    page.locator(BAR.format("scale")).click()
    assert "Type the factor" in page.locator(".ol-iv-trouble").inner_text()
    page.locator(".ol-line .ol-cell[data-row='0'][data-column='15']").first.click()
    assert page.get_by_role("radio", name="MLP").is_disabled()
    assert live.view.interventions == ()


def test_an_error_of_the_model_is_shown_and_the_view_stays(live):
    page = live.page

    def fail(question):
        if question["what"] == "set":
            raise RuntimeError("out of <b>memory</b>")

    live.before = fail
    head(page, 3, 2).click()
    page.keyboard.press("a")
    page.locator(".ol-iv-trouble", has_text="out of <b>memory</b>").wait_for()
    wait_for(page, 0)
    live.before = lambda question: None
    page.keyboard.press("a")
    wait_for(page, 1)
    assert page.locator(".ol-iv-trouble").inner_text() == ""


def test_quick_clicks_lose_nothing(live):
    page = live.page
    page.evaluate(
        """() => { for (const head of [1, 2, 3, 4]) {
            document.querySelector(`.ol-head[aria-label='layer 3, head ${head}']`).click();
            document.querySelector('[data-do=ablate]').click(); } }"""
    )
    wait_for(page, 4)
    assert [each.head for each in live.view.interventions] == [1, 2, 3, 4]
    assert len(live.ask("set")) == 2  # the newest of those that waited


def test_python_changes_what_is_in_force(live):
    """As a message from the kernel does: the state comes with another version."""
    page, view = live.page, live.view
    view.interventions = [CUT, optlens.Knockout(query=-1, key=3)]
    page.evaluate(
        "(update) => { for (const [name, value] of Object.entries(update)) model.set(name, value); }",
        live._update(),
    )
    wait_for(page, 2)
    assert in_force(page)[1].startswith("Knockout(query=-1, key=3)")
    head(page, 3, 2).click()
    assert page.locator(BAR.format("ablate")).inner_text() == "Restore"
    page.keyboard.press("a")
    wait_for(page, 1)
    assert view.interventions == (optlens.Knockout(query=-1, key=3),)


def test_without_a_kernel_nothing_can_be_changed(open_view, model):
    live = open_view(Explorer(model, TEXT))
    page = live.page
    page.locator("button.ol-iv-writer").first.wait_for()
    page.evaluate("shared.comm_live = false")
    head(page, 3, 2).click()
    page.keyboard.press("a")
    page.locator(".ol-iv-note", has_text="run the cell again").wait_for()
    assert page.locator(BAR.format("ablate")).is_disabled()
    assert page.get_by_role("textbox", name="Prompt", exact=True).is_disabled()
    assert page.locator(".ol-status").inner_text().startswith("Saved view without a kernel")
    assert live.view.interventions == ()


def test_a_recording_without_its_model_says_what_it_needs(open_view, model, tmp_path):
    model.record(TEXT).save(tmp_path / "rec.safetensors")
    page = open_view(Explorer(optlens.Recording.load(tmp_path / "rec.safetensors"))).page
    page.locator(".ol-iv-note", has_text="rec.attach(model).show()").wait_for()
    assert page.locator(BAR.format("ablate")).is_disabled()
    assert "·Mary" in outcome(page)


def test_the_state_of_another_version_is_not_drawn(open_view, model):
    view = Explorer(model, TEXT)
    live = open_view(view)
    live.page.evaluate("model.set('format', 0); window.drawAgain()")
    status = live.page.locator(".ol-status", has_text="another version of optlens (format 0")
    status.wait_for()


def test_a_page_ablates_single_heads_by_what_it_holds(browser, model, tmp_path):
    """The same clicks without Python: the next token is what `Ablate` gives, the views stay."""
    Explorer(model, TEXT).to_html(tmp_path / "page.html")
    with visits(browser, offline=True) as open_page:
        page = open_page((tmp_path / "page.html").as_uri(), 1300, "light")
        page.locator(".ol-iv-note", has_text="A page cannot run the model").wait_for()
        page.locator(".ol-iv-writer", has_text="head 3.5").click()
        page.locator(BAR.format("ablate")).click()
        assert "The other views stay as they were" in page.locator(".ol-iv").inner_text()
        before = model.record(TEXT).logits[-1].softmax(-1)
        after = model.record(TEXT, interventions=[Ablate("z", layer=3, head=5)]).logits[-1]
        best = int(before.argmax())
        shown = outcome(page)[model.tokenizer.display(best)]
        assert shown[:2] == [percent(before[best]), percent(after.softmax(-1)[best])]
        assert head(page, 3, 5).evaluate("(el) => el.classList.contains('ol-touched')")
        head(page, 4, 7).click()
        page.keyboard.press("a")  # one at a time
        assert in_force(page) == ["head 4.7: ablated\n×"]
        code = page.locator(".ol-iv-code").inner_text()
        names = {"model": model}
        exec(code, names)
        shares = names["rec"].logits[-1].softmax(-1)
        assert outcome(page)[model.tokenizer.display(best)][1] == percent(shares[best])
        page.keyboard.press("u")
        assert in_force(page) == ["head 3.5: ablated\n×"]
        page.get_by_role("button", name="Reset").click()
        assert in_force(page) == [] and page.get_by_role("textbox", name="Prompt", exact=True).is_disabled()  # fmt: skip
        page.locator(".ol-residual .ol-cell[data-row='2'][data-column='11']").click()
        assert page.locator(BAR.format("ablate")).is_disabled()  # the page holds heads alone
        page.locator(".ol-cell[data-row='2'][data-column='11']").first.click()
        page.get_by_text("The page holds who wrote the predictions").wait_for()
        assert page.complaints == [] and page.evaluate("stopped") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 800, 1300])
def test_nothing_is_wider_than_the_view(open_view, model, width, theme):
    view = Explorer(model, "<b>When</b> Mary and John went to the store, " + "John" * 30)
    view.interventions = [CUT, Freeze("mlp_out", layer=1, source=view.prompt)]
    page = open_view(view, width, theme).page
    page.locator("button.ol-iv-writer").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        """[...document.querySelectorAll('.ol-iv *')].filter((el) => !el.closest('.ol-iv-code, svg')
            && el.getBoundingClientRect().right > innerWidth + 1).map((el) => el.outerHTML.slice(0, 90))"""
    ) == []  # fmt: skip
    assert page.locator(".ol-iv b", has_text="When").count() == 0
