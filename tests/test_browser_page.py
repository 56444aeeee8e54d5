"""The page in a real browser: quiet, closed to the network, within its width, usable by keyboard.

Needs playwright and Debian's Chromium. They are skipped where they are missing, except on CI, where
a missing browser is a failure and not a reason to test less.
"""

import pytest
import torch
from browser_pages import MISSING, THEMES, rgb, skip_without, visits
from conftest import random_model, tiny_config

from optlens.plots import STYLES

pytestmark = skip_without(MISSING)

WIDTHS = (360, 768, 1440)
LABELS = {
    2: "</s>",
    5: "<script>document.title = 'run'</script>",
    17: '"><img src=http://127.0.0.1:9/x onerror="document.title=\'run\'">',
    9: "\u202eunpronounceable" + "long" * 30,
}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page about a prompt with long, hostile and right-to-left tokens, wider than any window."""
    config = tiny_config(num_hidden_layers=3, num_attention_heads=8)
    recording = random_model(config).record(torch.tensor([2, 5, 17, 9, *range(20, 45)]))
    recording.metadata["labels"] |= {str(token): text for token, text in LABELS.items()}
    recording.metadata["prompts"] = ["".join(LABELS.values()) + "word " * 40]
    path = tmp_path_factory.mktemp("page") / "page.html"
    recording.to_html(path)
    return path


@pytest.fixture
def visit(browser, page_file):
    """Open the page; collect what it complains of and what it asks the network for."""
    with visits(browser, reduced_motion="reduce") as open_page:
        yield lambda width=1440, theme="light": open_page(page_file.as_uri(), width, theme)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_quiet_closed_and_within_its_width(visit, page_file, width, theme):
    page = visit(width, theme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Whatever is wider than the window scrolls inside a box of its own.
    outside = page.evaluate(
        """[...document.querySelectorAll('body *')].filter((el) =>
            !el.closest('.scroll, pre, .pick') && el.getBoundingClientRect().right > innerWidth + 1
        ).map((el) => el.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    assert page.complaints == []
    elsewhere = [url for url in page.asked if not url.startswith(("data:", page_file.as_uri()))]
    assert elsewhere == []
    assert page.title() != "run"
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == rgb(STYLES[theme].ink)


def test_pictures_follow_the_theme_and_load(visit):
    seen = {}
    for theme in THEMES:
        page = visit(theme=theme)
        seen[theme] = page.evaluate("[...document.images].map((image) => image.currentSrc)")
        broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth)"
        assert page.evaluate(f"{broken}.length") == 0
    assert len(seen["light"]) == 2 * 3 * 8
    assert all(a != b for a, b in zip(seen["light"], seen["dark"], strict=True))


def test_a_small_picture_leads_to_the_large_one(visit):
    page = visit()
    large = page.locator("#L1H5")
    assert not large.is_visible()
    page.locator('a[href="#L1H5"]').click()
    large.wait_for(state="visible")
    box = large.bounding_box()
    assert 0 <= box["y"] < 900 and box["width"] > 250


def test_lens_cells_change_their_colour_and_number_with_the_choice(visit):
    page = visit()
    cell = page.locator("table.lens tbody tr:first-child td").nth(6)
    looks = {}
    for name in ("probability", "entropy", "KL to the end"):
        page.locator("label").get_by_text(name, exact=True).click()
        looks[name] = (
            cell.evaluate("(cell) => getComputedStyle(cell).backgroundColor"),
            cell.locator("small:visible").all_inner_texts(),
        )
    assert len({look[0] for look in looks.values()}) == 3
    assert all(len(numbers) == 1 for _, numbers in looks.values())
    assert looks["probability"][1][0].endswith("%")


def test_card_of_a_cell_shows_what_its_title_says(visit, page_file):
    page = visit()
    cell = page.locator("table.lens tbody tr:last-child td").nth(3)
    note = cell.evaluate("(cell) => cell.dataset.note").split("\n")
    cell.hover()
    card = page.locator(".card:visible")
    assert card.locator("p").inner_text() == note[0]
    rows = card.locator("div").all_inner_texts()
    assert [row.split("\n")[::-1] for row in rows] == [line.split("  ", 1) for line in note[1:]]
    page.mouse.move(0, 0)
    assert page.locator(".card:visible").count() == 0


def test_lens_is_one_tab_stop_with_arrows_inside(visit):
    page = visit()
    stops = "table.lens td[tabindex='0']"
    assert page.locator(stops).count() == 1
    page.locator(stops).focus()
    place = """() => { const cell = document.activeElement;
        return [cell.parentNode.sectionRowIndex, cell.cellIndex] }"""
    last = page.evaluate(place)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(place) == [last[0] - 1, last[1] - 1]
    assert page.locator(".card:visible").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".card:visible").count() == 0
    for _ in range(9):
        page.keyboard.press("ArrowUp")  # stops at the first row
    assert page.evaluate(place)[0] == 0
    assert page.locator(stops).count() == 1


def test_page_tells_all_without_its_script(browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    title = page.locator("table.lens tbody td").first.get_attribute("title")
    assert title.startswith("after layer embed, position 0: entropy ")
    page.locator("label").get_by_text("entropy", exact=True).click()
    assert page.locator("table.lens tbody td small.e").first.is_visible()
    context.close()
