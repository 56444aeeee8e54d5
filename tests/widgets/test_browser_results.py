"""The pages of what is found in runs, in a real browser without a network: attribution, comparison, generation."""

from types import SimpleNamespace

import pytest
import test_browser_widgets as shared
import torch
from browser_pages import THEMES
from conftest import random_model, tiny_config

import optlens
from optlens.widgets import AttributionView, CompareView, GenerationView, generation_part

pytestmark = shared.pytestmark
visit, model, recording = shared.visit, shared.model, shared.recording


def attribution(recording):
    """Attribute a logit difference of a recording, with what heads read from each token."""
    given = (recording.tokens, 5, 17)
    found = optlens.direct_logit_attribution(recording.model, *given, by_source=True)
    return AttributionView(found, recording)


def compare_view(recording) -> CompareView:
    """Compare with a run on a prompt that lacks a token and has another one in the middle."""
    other = recording.model.record(
        torch.cat([shared.IDS[:3], shared.IDS[4:8], shared.IDS[11:12], shared.IDS[9:]])
    )
    return CompareView(optlens.compare(recording, other))


def generation_view(recording) -> GenerationView:
    """Write on from the prompt, sampling, with the same hostile tokens as labels."""
    model = random_model(tiny_config(num_hidden_layers=2))
    model.tokenizer = SimpleNamespace(
        display=lambda token: shared.LABELS.get(token, f"⟨{token}⟩"),
        decode=lambda ids, skip_special=False: "".join(shared.LABELS.get(int(i), "x") for i in ids),
    )
    ids = shared.IDS[:6]
    kept = {"output_scores": True, "output_logits": True}
    view = GenerationView(model.generate(ids, 8, top_k=3, seed=0, stop_at_eos=False, **kept))
    view._parts[0].fork(0, step=2, token=9, options={"max_new_tokens": 3})
    return view


VIEWS = {"attribution": attribution, "compare": compare_view, "generation": generation_view}


@pytest.fixture(scope="module")
def pages(recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, view in VIEWS.items():
        view(recording).to_html(folder / f"{name}.html")
    return folder


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", shared.WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme):
    shared.test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme)


@pytest.mark.parametrize("name", VIEWS)
def test_hostile_tokens_are_text_and_the_picture_can_be_saved(visit, name, tmp_path):
    shared.test_hostile_tokens_are_text(visit, name)
    shared.test_a_view_saves_its_own_picture(visit, name, tmp_path)


# --- attribution ---------------------------------------------------------------------------------


def test_bars_add_up_and_a_part_is_chosen_by_mouse_and_by_keyboard(visit, model, recording):
    found = optlens.direct_logit_attribution(model, recording.tokens, 5, 17, by_source=True)
    page = visit("attribution")
    terms = page.locator(".ol-steps .ol-step-value").all_inner_texts()
    numbers = [float(text.replace("−", "-")) for text in terms]
    assert len(numbers) == 15 and sum(numbers) == pytest.approx(float(found.total), abs=0.08)
    page.get_by_role("radio", name="layer by layer").click()
    rows = page.get_by_role("option").filter(has_text="attention 1")
    term = float(found.heads[1].sum() + found.attention_biases[1])
    shown = float(rows.locator(".ol-step-value").inner_text().replace("−", "-"))
    assert shown == pytest.approx(term, abs=0.006)
    page.locator(".ol-part[data-row='1'][data-column='2']").click()
    assert shared.names(page)[-1].startswith("Layer 1, head 2")
    for key in ("ArrowDown", "ArrowRight", "End"):
        page.keyboard.press(key)
    assert shared.names(page)[-1].startswith("MLP of layer 2")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("MLP of layer 2: ")
    assert page.locator(".ol-part[tabindex='0']").count() == 1
    page.keyboard.press("m")
    assert page.get_by_role("radio", name="largest parts").get_attribute("aria-checked") == "true"
    assert page.complaints == []


def test_a_heads_term_is_divided_among_tokens_that_can_be_chosen(visit, model, recording):
    found = optlens.direct_logit_attribution(model, recording.tokens, 5, 17, by_source=True)
    page = visit("attribution")
    page.locator(".ol-part[data-row='2'][data-column='1']").click()
    tokens = page.get_by_role("listbox", name="What it wrote").get_by_role("option")
    assert tokens.count() == 28
    said = [label.rsplit(": ", 1)[1].replace("−", "-") for label in
            tokens.evaluate_all("(all) => all.map((el) => el.ariaLabel)")]  # fmt: skip
    terms = torch.tensor([float(text) for text in said])
    torch.testing.assert_close(terms, found.sources[2, 1], rtol=0, atol=6e-4)  # three digits
    tokens.nth(4).click()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(5).get_attribute("aria-selected") == "true"
    assert page.locator(".ol-strip li[tabindex='0']").count() == 1


# --- comparison and generation -------------------------------------------------------------------


def test_a_comparison_shows_both_sides_and_what_stands_alone(visit, recording):
    page = visit("compare")
    found = compare_view(recording).recording
    alone = page.locator(".ol-cell.ol-alone")
    assert alone.count() == len(found.rows) * (len(found.columns) - int(found.aligned.sum())) > 0
    assert "only A has a token here" in alone.first.get_attribute("aria-label")
    changed = found.aligned & (found.top_a != found.top_b)
    assert page.locator(".ol-cell.ol-changed").count() == int(changed.sum())
    page.locator(".ol-cell[tabindex='0']").focus()
    page.keyboard.press("Home")
    page.keyboard.press("n")
    cell = page.locator(".ol-cell[aria-selected='true']")
    assert "changed from" in cell.get_attribute("aria-label")
    row, column = int(cell.get_attribute("data-row")), int(cell.get_attribute("data-column"))
    assert changed[row, column]
    shown = page.locator(".ol-answers ol").all()
    assert [each.locator("li").count() for each in shown] == [5, 5]
    page.get_by_role("radio", name="cosine").click()
    calm = page.locator(f".ol-cell[data-row='{row}'][data-column='0']")
    assert f"cosine {float(found.cosine[row, 0]):.3f}" in calm.get_attribute("aria-label")
    assert page.complaints == [] and page.evaluate("stopped") == []


def test_a_generation_is_scrubbed_and_its_branches_are_shown(visit, recording):
    page = visit("generation")
    view = generation_view(recording)
    steps = view._parts[0].steps(0, 0)
    slider = page.get_by_role("slider", name="Step")
    slider.focus()
    page.keyboard.press("Home")
    assert shared.names(page)[0].startswith("Step 0: ")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext").startswith("step 1: ")
    taken = page.locator(".ol-taken")
    place = steps[1].ids.tolist().index(int(view.recording.sequences[0, 7]))
    assert f"own {100 * steps[1].own[place]:.1f} %" in taken.get_attribute("aria-label")
    assert page.locator(".ol-cut").count() == 7  # of ten listed, top_k leaves three
    page.locator(".ol-flow button").nth(2).click()
    page.keyboard.press("ArrowRight")
    assert page.locator(".ol-flow [aria-current=step]").get_attribute("data-step") == "3"
    page.keyboard.press("b")
    assert page.locator(".ol-branch[aria-pressed=true] b").inner_text() == "2"
    assert page.locator(".ol-flow button").count() == 6  # two shared, one put there, three more
    assert page.locator(".ol-fork").is_hidden() and page.get_by_text("needs Python").is_visible()
    assert page.complaints == [] and page.evaluate("stopped") == []


def test_what_stops_a_fork_is_said_in_the_form(visit, recording, tmp_path, monkeypatch):
    view = generation_view(recording)
    monkeypatch.setattr(
        generation_part.GenerationPart, "page_answers",
        lambda part, prompt: iter([({"what": "live"}, part.answer_live(prompt))]),
    )  # fmt: skip
    view.to_html(tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    page.locator("button.ol-candidate").nth(1).click()
    assert page.locator("button.ol-candidate[aria-pressed=true]").count() == 1
    page.get_by_label("Top-k").fill("1.5")
    page.get_by_role("button", name="Fork here").click()
    assert page.locator(".ol-fork .ol-trouble").inner_text() == ""  # the browser stops it
    page.get_by_label("Top-k").fill("2")
    page.get_by_role("button", name="Fork here").click()
    page.get_by_text("This page does not hold that").wait_for()
    assert page.get_by_role("button", name="Fork here").is_enabled()
