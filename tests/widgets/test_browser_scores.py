"""The score of a query and a key, dimension by dimension, in a browser: alone, with Python, without."""

import pytest
import test_browser_widgets as shared
from browser_pages import THEMES, visits
from live_page import LivePage

from optlens import Ablate
from optlens.circuits import score_detail
from optlens.widgets import AttentionView, Explorer

pytestmark = shared.pytestmark
visit, model, recording = shared.visit, shared.model, shared.recording
LAST = len(shared.IDS) - 1
PANEL = ".ol-terms-panel"


@pytest.fixture(scope="module")
def pages(recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    AttentionView(recording).to_html(folder / "attention.html")
    return folder


@pytest.fixture
def live(browser):
    """Open a view in a page with Python behind it, which must not complain in the end."""
    with visits(browser, offline=True) as open_page:
        opened = []

        def show(view):
            opened.append(open_page("about:blank", 1300, "light"))
            return LivePage(opened[-1], view)

        yield show
        for page in opened:
            assert page.complaints == [] and page.evaluate("stopped") == []


def head(page, layer: int, number: int):
    return page.locator(f".ol-head[aria-label='layer {layer}, head {number}']")


def numbers(page, column: str) -> list[float]:
    texts = page.locator(f"{PANEL} {column}").all_inner_texts()
    return [float(text.replace("−", "-")) for text in texts]


def shows(page, layer: int, number: int, query: int, key: int, model) -> None:
    """Wait until the panel shows a score, and check that its rows add up to it."""
    found = score_detail(model, shared.IDS, layer, number, query)
    expected = f"{abs(float(found.scores[key])):.3f}"
    first = page.locator(f"{PANEL} .ol-facts b").first
    first.filter(has_text=expected).wait_for()
    products = numbers(page, "tbody td:last-child")
    assert sorted(products) == pytest.approx(sorted(found.products[key].tolist()), abs=0.0006)
    (total,) = numbers(page, "tfoot td")
    assert sum(products) == pytest.approx(total, abs=0.0006 * len(products))
    assert total == pytest.approx(float(found.scores[key]), abs=0.0006)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", (380, 1440))
def test_page_stays_within_its_width_while_a_score_is_open(visit, width, theme):
    page = visit("attention", width, theme)
    page.get_by_role("button", name="Score: q · k").click()
    page.locator(f"{PANEL} tbody tr").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    inside = page.locator(f"{PANEL} .ol-scroll")
    assert inside.evaluate("(el) => el.scrollWidth <= el.clientWidth")
    assert page.complaints == [] and page.evaluate("stopped") == []
    assert "Arcs: " in page.locator(".ol-attention").inner_text()


def test_a_page_has_the_score_of_the_last_query(visit, model, recording):
    page = visit("attention")
    head(page, 1, 5).click()
    page.keyboard.press("q")
    weights = recording.attention[1, 5, LAST]
    shows(page, 1, 5, LAST, int(weights.argmax()), model)
    assert "the key that it reads most" in page.locator(PANEL).inner_text()
    page.locator(".ol-strip li[data-at='3']").click(modifiers=["Shift"])
    shows(page, 1, 5, LAST, 3, model)
    sizes = [abs(value) for value in numbers(page, "tbody td:last-child")]
    assert sizes == sorted(sizes, reverse=True)
    page.get_by_role("radio", name="by dimension").click()
    assert numbers(page, "tbody th") == list(range(len(sizes)))
    page.locator(".ol-strip li[data-at='12']").click()
    told = page.locator(f"{PANEL} [role=status]")
    told.filter(has_text="This page does not hold that").wait_for()
    assert not page.locator(f"{PANEL} table").is_visible()
    page.locator(f".ol-strip li[data-at='{LAST}']").click()
    shows(page, 1, 5, LAST, int(weights.argmax()), model)
    page.get_by_role("button", name="Score: q · k").click()
    assert not page.locator(PANEL).is_visible()


def test_the_score_follows_the_selection_and_the_newest_wins(live, model, recording):
    there = live(Explorer(recording))
    page = there.page
    page.get_by_role("button", name="Score: q · k").click()
    head(page, 2, 1).click()
    shows(page, 2, 1, LAST, int(recording.attention[2, 1, LAST].argmax()), model)
    square = page.locator(".ol-attention .ol-square")
    square.focus()
    for _ in range(6):
        page.keyboard.press("ArrowUp")
    page.evaluate("shared.set('value', { ...shared.get('value'), key: 4 })")
    shows(page, 2, 1, LAST - 6, 4, model)
    asked = len(there.ask("detail"))
    page.evaluate("shared.set('value', { ...shared.get('value'), key: 2 })")
    shows(page, 2, 1, LAST - 6, 2, model)
    assert len(there.ask("detail")) == asked  # a query's keys are there with its first one
    page.evaluate(f"shared.set('value', {{ ...shared.get('value'), key: {LAST} }})")
    page.locator(f"{PANEL} .ol-facts").filter(has_text="future").wait_for()
    page.get_by_role("button", name="Keys").nth(2).click()
    assert "the score by dimensions of query and key" in page.locator("main").inner_text()


def test_a_run_under_interventions_says_what_to_record(live, model):
    there = live(Explorer(model, shared.IDS, interventions=[Ablate("z", layer=0, head=1)]))
    there.page.get_by_role("button", name="Score: q · k").click()
    told = there.page.locator(f"{PANEL} [role=status]")
    told.filter(has_text="interventions=[...]").wait_for()
    assert there.ask("detail") == []
