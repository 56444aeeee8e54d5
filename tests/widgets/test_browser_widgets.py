"""Views of a recording as pages in a real browser without a network: quiet, closed, linked, by keyboard.

The page runs the same modules as the notebook. Needs playwright and Chromium; skipped without them,
except on CI.
"""

import csv
import io
import re

import pytest
import torch
from browser_pages import MISSING, THEMES, rgb, skip_without, visits
from conftest import random_model, tiny_config

from optlens.plots import STYLES
from optlens.widgets import AttentionView, Explorer, LensView, ResidualView, attention_part

pytestmark = skip_without(MISSING)

WIDTHS = (360, 800, 1440)


LABELS = {
    2: "</s>",
    5: "<script>document.title = 'run'</script>",
    17: '"><img src=http://127.0.0.1:9/x onerror="document.title=\'run\'">',
    9: "\u202eunpronounceable" + "long" * 30,
    20: "·Mary",
    21: "⟨E4 B8⟩",
}
IDS = torch.tensor([2, 5, 17, 9, 20, 21, *range(22, 44)])
ALL = ("attention", "residual", "logit_lens", "v")


VIEWS = {
    "attention": AttentionView, "lens": LensView, "residual": ResidualView, "explorer": Explorer,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(num_hidden_layers=3, num_attention_heads=8))


@pytest.fixture(scope="module")
def recording(model):
    """A prompt with long, hostile and right-to-left tokens."""
    recording = model.record(IDS, what=ALL)
    recording.metadata["labels"] |= {str(token): text for token, text in LABELS.items()}
    recording.metadata["prompts"] = ["".join(LABELS.values()) + "word " * 40]
    return recording


@pytest.fixture(scope="module")
def pages(recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, view in VIEWS.items():
        view(recording).to_html(folder / f"{name}.html")
    return folder


@pytest.fixture
def visit(browser, pages):
    """Open a page offline; collect what it complains of, asks for, and what its policy stops."""
    with visits(browser, offline=True) as open_page:

        def open_file(path, width=1440, theme="light", **options):
            path = pages / f"{path}.html" if isinstance(path, str) else path
            return open_page(path.as_uri(), width, theme, **options)

        yield open_file


def names(page) -> list[str]:
    """Return what the views say is selected."""
    return [" ".join(text.split()) for text in page.locator(".ol-name").all_inner_texts()]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme):
    page = visit(name, width, theme)
    page.locator(".ol-section").first.wait_for()
    for button in page.get_by_role("button", name="Table").all():
        button.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = page.evaluate(
        """[...document.querySelectorAll('main *')].filter((el) =>
            !el.closest('.ol-scroll, .ol-hidden, svg') && el.getBoundingClientRect().right > innerWidth + 1
        ).map((el) => el.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    assert page.evaluate("stopped") == []
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith(("data:", "file:"))] == []
    assert page.title() != "run"
    look = STYLES[theme]
    colors = page.evaluate("(() => { const css = getComputedStyle(document.querySelector('.ol')); "
                           "return [css.color, css.backgroundColor]; })()")  # fmt: skip
    assert colors == [rgb(look.ink), rgb(look.paper)]


@pytest.mark.parametrize("name", VIEWS)
def test_hostile_tokens_are_text(visit, name):
    page = visit(name)
    page.locator(".ol-token").first.wait_for()
    assert page.locator("main img, main script").count() == 0
    seen = page.locator("main").inner_text()
    assert "\u202e" not in seen and "<" in seen


# --- attention -----------------------------------------------------------------------------------


def test_pictures_hold_the_pattern_in_the_colours_of_the_theme(visit, recording):
    for theme in THEMES:
        page = visit("attention", theme=theme)
        page.locator(".ol-head[aria-label='layer 1, head 5']").click()
        page.wait_for_function("document.querySelector('.ol-square canvas').width > 1")
        size, corners = page.evaluate(
            """() => { const canvas = document.querySelector('.ol-square canvas');
                const pixel = (x, y) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3);
                return [[canvas.width, canvas.height], [pixel(0, 0), pixel(27, 0), pixel(3, 20)]]; }"""
        )
        assert size == [28, 28]
        look = STYLES[theme]
        found = [f"rgb({r}, {g}, {b})" for r, g, b in corners]
        assert found[0] == rgb(look.ramp[-1]) and found[1] == rgb(look.masked)
        # one pixel in the middle, as figures draw it; the table has 255 steps
        from optlens.plots.style import mix

        expected = mix(look.ramp, float(recording.attention[1, 5, 20, 3]) ** 0.5)
        assert max(abs(a - b) for a, b in zip(corners[2], expected, strict=True)) <= 3


def test_a_head_is_chosen_by_mouse_and_by_keyboard(visit):
    page = visit("attention")
    grid = page.get_by_role("grid", name="All heads")
    assert grid.locator("[tabindex='0']").count() == 1
    page.locator(".ol-head[aria-label='layer 1, head 5']").click()
    assert names(page) == ["Layer 1, head 5"]
    grid.locator("[tabindex='0']").focus()
    for key in ("ArrowLeft", "ArrowDown", "Home"):
        page.keyboard.press(key)
    assert names(page) == ["Layer 2, head 0"]
    assert grid.locator("[tabindex='0'][aria-selected='true']").count() == 1
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == "layer 2, head 0"


def test_a_weight_is_read_under_the_mouse_and_chosen_by_keys(visit, recording):
    page = visit("attention")
    page.locator(".ol-head[aria-label='layer 0, head 3']").click()
    square = page.locator(".ol-square")
    box = square.bounding_box()
    cell = box["width"] / 28
    page.mouse.move(box["x"] + 4.5 * cell, box["y"] + 20.5 * cell)
    weight = float(recording.attention[0, 3, 20, 4])
    readout = " ".join(page.locator(".ol-readout").inner_text().split())
    assert "20 reads ·Mary 4" in readout and readout.endswith(f"{100 * weight:.1f} %")
    page.mouse.move(box["x"] + 20.5 * cell, box["y"] + 4.5 * cell)
    assert "cannot see" in page.locator(".ol-readout").inner_text()
    square.focus()
    for key in ("ArrowUp", "Home", "ArrowRight"):
        page.keyboard.press(key)
    label = square.get_attribute("aria-label")
    exact = float(recording.attention[0, 3, 26, 1])
    assert "at 26 reads" in label and f"at 1: {100 * exact:.1f} %" in label
    assert page.locator(".ol-strip li[data-query]").get_attribute("data-at") == "26"
    assert page.locator(".ol-strip li[data-key]").get_attribute("data-at") == "1"


def test_arcs_lead_to_what_the_chosen_token_reads(visit, recording):
    page = visit("attention")
    page.locator(".ol-head[aria-label='layer 2, head 1']").click()
    page.locator(".ol-strip li").nth(6).click()
    weights = recording.attention[2, 1, 6]
    assert page.locator(".ol-arc").count() == int((weights >= 0.01).sum())
    assert page.locator(".ol-strip li[data-future]").count() == 28 - 7
    page.locator(".ol-strip li").nth(2).click(modifiers=["Shift"])
    assert "6 reads" in " ".join(page.locator(".ol-readout").inner_text().split())


def test_heads_are_sorted_by_a_score(visit, recording):
    page = visit("attention")
    page.get_by_label("Order").select_option("previous_token")
    previous = recording.attention.diagonal(-1, -2, -1).mean(-1)  # [layer, head]
    best = int(previous.argmax())
    first = page.locator(".ol-head").first
    assert first.get_attribute("aria-label").startswith(f"layer {best // 8}, head {best % 8}, prev")
    page.locator(".ol-square").focus()
    page.keyboard.press("o")
    assert page.get_by_label("Order").input_value() == "induction"


def test_weights_can_be_shown_times_value_lengths(visit):
    page = visit("attention")
    page.locator(".ol-head[aria-label='layer 1, head 5']").click()
    picture = "document.querySelector('.ol-square canvas').toDataURL()"
    before = page.evaluate(picture)
    page.get_by_role("radio", name="weight × |value|").click()
    page.wait_for_function(f"{picture} !== {before!r}")
    assert "≈" in page.locator(".ol-readout").inner_text()  # a page holds these to a level
    page.locator(".ol-square").focus()
    page.keyboard.press("v")
    assert page.evaluate(picture) == before
    assert page.complaints == []


def test_a_large_pattern_is_shrunk_and_says_so(visit, recording, tmp_path, monkeypatch):
    for name in ("EXACT_CELLS", "EAGER_CELLS"):
        monkeypatch.setattr(attention_part, name, 0)
    monkeypatch.setattr(attention_part, "PAGE_BYTES", 2 * 24 * 14**2)
    AttentionView(recording).to_html(tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    page.wait_for_function("document.querySelector('.ol-square canvas').width === 14")
    assert "each pixel is the largest of 2 × 2 weights" in page.locator("main").inner_text()
    page.wait_for_function("document.querySelector('.ol-head canvas').width === 28")
    page.get_by_label("Order").select_option("entropy")
    page.wait_for_function("document.querySelector('.ol-sorted')")
    assert page.complaints == []


# --- lens and residual -----------------------------------------------------------------------------


def test_lens_cells_say_what_the_lens_says(visit, recording):
    page = visit("lens")
    lens = recording.logit_lens()
    cell = page.locator(".ol-cell[data-row='2'][data-column='26']")
    word = recording.label(int(lens.top_tokens[2, 26, 0]))
    share = f"{100 * float(lens.top_probs[2, 26, 0]):.1f} %"
    assert cell.inner_text().split("\n") == [word, share]
    cell.hover()
    card = page.locator(".ol-tip:visible")
    assert f"entropy {float(lens.entropy[2, 26]):.2f}" in card.inner_text()
    cell.click()
    assert names(page)[0].startswith("After layer 1, at ")
    page.get_by_role("radio", name="entropy").click()
    assert cell.inner_text().split("\n")[1] == f"{float(lens.entropy[2, 26]):.2f}"


def test_lens_is_one_tab_stop_and_only_columns_in_sight_are_there(visit):
    page = visit("lens", width=800)
    stops = page.locator(".ol-cell[tabindex='0']")
    assert stops.count() == 1
    stops.focus()
    for key in ("Home", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
    place = "[document.activeElement.dataset.row, document.activeElement.dataset.column]"
    assert page.evaluate(place) == ["2", "1"]
    assert stops.count() == 1
    assert page.locator(".ol-cell[data-row='0']").count() < 28
    assert page.locator(".ol-cells").evaluate("(el) => el.scrollLeft") <= 78
    page.keyboard.press("End")
    assert page.evaluate(place) == ["2", "27"]
    assert page.get_by_role("grid").get_attribute("aria-colcount") == "29"


def test_a_token_is_followed_through_the_layers(visit, recording):
    page = visit("lens")
    page.locator(".ol-cell[tabindex='0']").focus()
    page.keyboard.press("f")
    page.locator(".ol-chip").wait_for()
    best = int(recording.logit_lens().top_tokens[-1, -1, 0])
    assert recording.label(best) in page.locator(".ol-chip").inner_text()
    page.get_by_role("button", name="colour").click()
    probs = recording.logit_lens().prob(best)
    cell = page.locator(".ol-cell[data-row='1'][data-column='27'] small")
    assert cell.inner_text() == f"{100 * float(probs[1, 27]):.1f} %"
    page.keyboard.press("f")
    page.get_by_label("Token to follow").fill("·never")
    page.get_by_role("button", name="Add").click()
    page.get_by_text("This page does not hold that").wait_for()
    page.get_by_role("button", name="Stop following ⟨").click()
    assert page.locator(".ol-chip").count() == 0


def test_residual_cells_and_cosines_are_those_of_the_stream(visit, recording):
    page = visit("residual")
    cell = page.locator(".ol-cell[data-row='1'][data-column='26']")
    length = float(recording.residual[1, 26].norm())
    assert float(cell.inner_text()) == pytest.approx(length, abs=0.06)
    cell.click()
    turned = torch.nn.functional.cosine_similarity(*recording.residual[[0, 1], 26], dim=0)
    said = page.locator(".ol-readout").inner_text()
    assert said.endswith(f"cosine {float(turned):.3f}")
    page.get_by_role("radio", name="cosine to the layer before").click()
    assert float(cell.inner_text()) == pytest.approx(float(turned), abs=0.006)
    page.locator(".ol-square").focus()
    page.keyboard.press("ArrowLeft")
    assert "after layer 0 and after layer embed" in page.locator(".ol-readout").inner_text()


# --- what all views share ----------------------------------------------------------------------------


def test_one_selection_links_all_sections(visit):
    page = visit("explorer")
    page.locator(".ol-head[aria-label='layer 1, head 5']").click()
    said = names(page)
    assert said[0].startswith("After layer 1") and said[1] == "Layer 1, head 5"
    page.locator(".ol-residual .ol-cell[data-row='3'][data-column='26']").click()
    said = names(page)
    assert said[0].startswith("After layer 2") and said[1] == "Layer 2, head 5"
    assert said[2].endswith(" 26")
    assert page.locator(".ol-strip li[data-query]").get_attribute("data-at") == "26"


def test_numbers_are_a_table_that_can_be_copied(visit, recording):
    page = visit("attention", permissions=["clipboard-read", "clipboard-write"])
    page.locator(".ol-head[aria-label='layer 0, head 3']").click()
    page.locator(".ol-square").focus()
    page.keyboard.press("t")
    assert page.locator(".ol-table tbody tr").count() == 28
    page.get_by_role("button", name="Copy as CSV").click()
    page.wait_for_function("navigator.clipboard.readText().then((text) => text.length > 9)")
    rows = list(csv.reader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))
    assert rows[0] == ["position", "token", "weight"] and len(rows) == 29
    weights = torch.tensor([float(row[2]) for row in rows[1:]])
    torch.testing.assert_close(weights, recording.attention[0, 3, 27], rtol=1e-3, atol=1e-6)
    page.keyboard.press("t")
    assert page.locator(".ol-table").count() == 0
    assert page.evaluate("document.activeElement.textContent") == "Table"  # not lost with the panel


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_saves_its_own_picture(visit, name, tmp_path):
    page = visit(name)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="PNG").first.click()
    waiting.value.save_as(tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) > 600
    assert page.evaluate("stopped") == []


def test_keys_are_listed(visit):
    page = visit("lens")
    page.locator(".ol-cell[tabindex='0']").focus()
    page.keyboard.press("?")
    assert page.locator(".ol-keys kbd").all_inner_texts()[:4] == ["Tab", "← → ↑ ↓", "m", "f"]


def test_another_prompt_of_a_batch_is_chosen(visit, model, tmp_path):
    both = model.record(torch.stack([IDS[:9], IDS[9:18]]), what=ALL)
    Explorer(both).to_html(tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    page.get_by_role("combobox", name="Prompt").select_option("1")
    page.wait_for_function("document.querySelector('.ol-prompt select').value === '1'")
    page.locator(".ol-head[aria-label='layer 1, head 5']").click()
    square = page.locator(".ol-square").first
    square.focus()
    page.keyboard.press("Home")
    weight = float(both.attention[1, 1, 5, 8, 0])
    assert f": {100 * weight:.1f} %" in square.get_attribute("aria-label")
    assert page.complaints == []


def test_page_tells_the_main_things_without_its_script(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((pages / "explorer.html").as_uri())
    tables = page.locator("noscript table")
    assert tables.count() == 3 and tables.first.is_visible()
    assert page.locator("noscript img").first.evaluate("(image) => image.naturalWidth") > 100
    context.close()


@pytest.mark.parametrize("lost", ['"positions":', '"parts":', '"tokens":'])
def test_a_state_that_lacks_something_is_named(visit, pages, tmp_path, lost):
    """As of an old notebook, or of one that somebody has cut."""
    text = (pages / "attention.html").read_text(encoding="utf-8")
    head, held, rest = re.split(r'(?<=id="contents">)|(?=</script><script type="module")', text)
    (tmp_path / "page.html").write_text(head + held.replace(lost, '"lost":') + rest)
    page = visit(tmp_path / "page.html")
    trouble = page.get_by_role("alert")
    trouble.wait_for()
    assert "not complete, or of another version. Run its cell again." in trouble.inner_text()
    assert page.complaints == [] and page.evaluate("stopped") == []


def test_page_prints_without_its_buttons(visit):
    page = visit("explorer", theme="dark")
    page.emulate_media(media="print")
    assert not page.locator(".ol-buttons").first.is_visible()
    ground = page.evaluate("getComputedStyle(document.querySelector('.ol')).backgroundColor")
    assert ground == rgb(STYLES["light"].paper)
