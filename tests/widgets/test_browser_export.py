"""The page of an executed notebook in a real browser without a network: quiet, closed, alive, linked."""

import nbformat
import pytest
from browser_pages import MISSING, THEMES, skip_without, visits
from executed_notebook import executed

from optlens.widgets.export import export_notebook

pytestmark = skip_without(MISSING)

WIDTHS = (360, 800, 1440)


@pytest.fixture(scope="module")
def notebook():
    return executed()


@pytest.fixture(scope="module")
def page_file(notebook, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "book.ipynb"
    nbformat.write(notebook, path)
    return export_notebook(path).path


@pytest.fixture
def visit(browser, page_file):
    with visits(browser, offline=True) as open_page:

        def open_file(path=page_file, width=1440, theme="light", **options):
            page = open_page(path.as_uri(), width, theme, **options)
            page.wait_for_function(
                "[...document.querySelectorAll('.nb-view')].every((place) => "
                "place.querySelector('.ol-section, .nb-note'))"
            )
            return page

        yield open_file


def closed_and_quiet(page) -> None:
    assert page.complaints == [] and page.evaluate("stopped") == []
    assert [url for url in page.asked if not url.startswith(("data:", "file:"))] == []


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_quiet_closed_and_within_its_width(visit, width, theme):
    page = visit(width=width, theme=theme)
    assert page.locator(".ol").count() == 3
    assert page.title() == "Heads & tails · optlens"  # no script of the notebook has run
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = page.evaluate(
        """[...document.querySelectorAll('main *')].filter((el) => el.getBoundingClientRect().right > innerWidth + 1
            && !el.closest('.ol-scroll, .ol-hidden, svg, pre, table, .math-block')).map((el) => el.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
    assert page.evaluate(broken) == 0
    closed_and_quiet(page)


def test_a_click_in_one_cell_is_seen_in_the_others(visit):
    page = visit()
    explorer, alone, lens = page.locator(".ol").all()
    explorer.locator(".ol-head[aria-label='layer 2, head 3']").click()
    assert alone.locator(".ol-name").inner_text() == "Layer 2, head 3"
    assert "After layer 2" in lens.locator(".ol-name").first.inner_text()
    lens.locator(".ol-cell[data-row='1'][data-column='4']").click()
    assert alone.locator(".ol-strip li[data-query]").get_attribute("data-at") == "4"
    assert alone.locator(".ol-name").inner_text() == "Layer 0, head 3"
    closed_and_quiet(page)


def test_what_the_state_does_not_hold_is_said(visit):
    page = visit()
    lens = page.locator(".ol").nth(2)
    lens.get_by_role("textbox").fill("Mary")
    lens.get_by_role("button", name="Add").click()
    lens.get_by_text("This page does not hold that; the notebook does.").wait_for()
    closed_and_quiet(page)


def test_a_view_that_cannot_be_drawn_leaves_its_picture(visit, notebook, tmp_path):
    """The state has all that can be checked beforehand, but not what the module reads from it."""
    book = nbformat.from_dict(notebook)
    models = book.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    (lens,) = [
        model for model in models.values()
        if model["state"].get("_anywidget_id") == "optlens.widgets.views.AttentionView"
    ]  # fmt: skip
    lens["state"]["parts"][0]["state"].pop("positions")
    nbformat.write(book, tmp_path / "book.ipynb")
    page = visit(export_notebook(tmp_path / "book.ipynb").path)
    place = page.locator(".nb-view").nth(1)
    assert (
        "its saved state does not suit this version"
        in place.locator(".nb-note").inner_text().lower()
    )
    assert place.locator("table").is_visible() and place.locator(".ol").count() == 0
    assert page.locator(".ol").count() == 2
    closed_and_quiet(page)


def test_page_tells_the_main_things_without_its_script(browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator(".nb-view table").count() == 4
    assert page.locator(".nb-view img").first.evaluate("(image) => image.naturalWidth") > 100
    context.close()
