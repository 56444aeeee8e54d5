"""The page about a sweep in a real browser: quiet, closed to the network, within its width.

What it shares with the page about a recording is tested there.
"""

import pytest
import torch
from browser_pages import MISSING, THEMES, rgb, skip_without, visits
from sweep_results import HOSTILE, make_result
from test_browser_page import WIDTHS

from optlens.plots import STYLES

pytestmark = skip_without(MISSING)

RESULTS = {
    "one": ("layer",),
    "two": ("layer", "pos"),
    "three": ("layer", "head", "pos"),
    "four": ("component", "layer", "head", "pos"),
    "picture": ("layer", "neuron"),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page for each number of axes, all of hostile tokens, several prompts, and cut short."""
    folder = tmp_path_factory.mktemp("pages")
    for name, axes in RESULTS.items():
        result = make_result(*axes, labels=HOSTILE, prompts=1 if name == "two" else 3)
        result.per_prompt[0, ..., 0] = torch.nan
        result.to_html(folder / f"{name}.html")
    return folder


@pytest.fixture
def visit(browser, pages):
    """Open a page; collect what it complains of, what it asks for, what its policy stops."""
    with visits(browser, reduced_motion="reduce", offline=True) as open_page:
        yield lambda name, width=1440, theme="light": open_page(
            (pages / f"{name}.html").as_uri(), width, theme
        )


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RESULTS)
def test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme):
    page = visit(name, width, theme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = page.evaluate(
        """[...document.querySelectorAll('body *')].filter((el) =>
            !el.closest('.scroll') && el.getBoundingClientRect().right > innerWidth + 1
        ).map((el) => el.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    assert page.evaluate("stopped") == []
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith(("data:", "file:"))] == []
    assert page.title() != "run"
    assert page.evaluate("getComputedStyle(document.body).color") == rgb(STYLES[theme].ink)


@pytest.mark.parametrize("theme", THEMES)
def test_cells_have_the_colours_of_the_theme(visit, theme):
    page = visit("two", theme=theme)
    color = "(cell) => getComputedStyle(cell).backgroundColor"
    look = STYLES[theme]
    assert page.locator("td.d10, td.u10").first.evaluate(color) in (
        rgb(look.diverging[0]),
        rgb(look.diverging[-1]),
    )
    assert page.locator("td.gone").first.evaluate(color) == rgb(look.masked)


def test_a_cell_tells_its_value_by_mouse_and_by_keyboard(visit):
    page = visit("two")
    cells = page.locator("table.sweep tbody td")
    cells.nth(7).hover()
    card = page.locator(".card:visible")
    assert card.locator("p").inner_text().startswith("layer 1, position 2 ")
    rows = [row.split("\n") for row in card.locator("div").all_inner_texts()]
    assert [name for name, _ in rows] == ["normalized", "logit_diff(' Mary', ' John')"]
    page.locator("table.sweep td[tabindex='0']").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator(".card:visible p").inner_text().startswith("layer 1, position 4 ")


def test_every_small_table_is_one_tab_stop(visit):
    page = visit("three")
    assert page.locator("table.sweep td[tabindex='0']").count() == 4


def test_picture_follows_the_theme(visit):
    seen = [
        visit("picture", theme=theme).evaluate("document.images[0].currentSrc") for theme in THEMES
    ]
    assert seen[0] != seen[1] and all(source.startswith("data:image/png") for source in seen)


def test_page_prints_on_paper(visit):
    page = visit("two", width=1000)
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert len(page.pdf(format="A4")) > 1000
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    )
