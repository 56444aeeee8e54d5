"""The pages of the contribution graph and of the architecture in a real browser without a network."""

import pytest
import test_browser_widgets as shared
import torch
from browser_pages import THEMES
from conftest import VARIANTS, random_model, tiny_config

from optlens.circuits import contribution_graph
from optlens.widgets import ArchitectureView, GraphView, graph_part
from optlens.widgets.activation_stats import MEASURES
from optlens.widgets.stages import COPIES, stages_of

pytestmark = shared.pytestmark
visit, model = shared.visit, shared.model

WHAT = ("attention", "v", "resid_pre", "resid_mid", "mlp_out", "resid_post")
IDS = shared.IDS[:8]  # few enough for heads to bring a good share from each
LAST = len(IDS) - 1


@pytest.fixture(scope="module")
def recording(model):
    recording = model.record(IDS, what=WHAT)
    recording.metadata["labels"] |= {str(token): text for token, text in shared.LABELS.items()}
    recording.metadata["prompts"] = ["".join(shared.LABELS.values()) + "word " * 40]
    return recording


@pytest.fixture(scope="module")
def graph(recording):
    return contribution_graph(None, recording)


@pytest.fixture(scope="module")
def pages(recording, graph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    GraphView(graph, recording).to_html(folder / "graph.html")
    ArchitectureView(recording).to_html(folder / "architecture.html")
    with pytest.MonkeyPatch.context() as patch:  # a graph of which only some edges travel
        patch.setattr(graph_part, "MOST_EDGES", 60)
        GraphView(graph, recording).to_html(folder / "cut.html")
    post = random_model(tiny_config(**VARIANTS["post_ln_350m"]))
    ArchitectureView(post, IDS).to_html(folder / "post.html")
    return folder


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", shared.WIDTHS)
@pytest.mark.parametrize("name", ["graph", "architecture", "post"])
def test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme):
    shared.test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme)


@pytest.mark.parametrize("name", ["graph", "architecture"])
def test_the_picture_can_be_saved(visit, name, tmp_path):
    shared.test_a_view_saves_its_own_picture(visit, name, tmp_path)


def test_hostile_tokens_are_text(visit):
    shared.test_hostile_tokens_are_text(visit, "graph")


# --- the contribution graph ----------------------------------------------------------------------


def drawn(page) -> int:
    return page.locator(".ol-graph-edge[data-edge]:not([data-edge='-1'])").count()


def node(page, row: int, column: int):
    return page.locator(f".ol-graph-node[data-row='{row}'][data-column='{column}']")


def lit(page) -> int:
    return page.locator(".ol-graph-edge[data-on]").count()


def test_drawn_are_the_edges_that_lead_to_the_end(visit, graph):
    page = visit("graph")
    assert drawn(page) == len(graph.routes(-1, 0.05))
    slider = page.get_by_role("slider", name="Least weight of an edge")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "7.0 %"
    assert drawn(page) == len(graph.routes(-1, 0.07))
    node(page, 6, LAST).focus()
    for _ in range(3):
        page.keyboard.press(",")
    assert drawn(page) == len(graph.routes(-1, 0.03))
    page.locator(".ol-graph-token[data-column='4']").click()
    assert drawn(page) == len(graph.routes(4, 0.03))
    assert shared.names(page)[0].endswith(" 4")
    page.keyboard.press("t")
    assert page.complaints == []


def test_a_node_says_what_it_is_made_of_and_lights_its_ways(visit, graph):
    page = visit("graph")
    row, column = 5, LAST  # what attention of the last layer leaves
    node(page, row, column).click()
    ways = page.get_by_role("group", name="What it is made of").locator(".ol-guess")
    shares = [text.split("\n")[-1] for text in ways.all_inner_texts()]
    expected = [graph.residual[2, column], graph.bias[2, column]]
    assert {f"{100 * float(value):.1f} %" for value in expected} <= set(shares)
    head, key = divmod(int(graph.attention[2, :, column].argmax()), len(IDS))
    strongest = (
        page.get_by_role("group", name="What it is made of")
        .get_by_role("button", name="head")
        .first
    )
    value = f"{100 * float(graph.attention[2, head, column, key]):.1f} %"
    assert strongest.get_attribute("aria-label").startswith(f"head 2.{head} from ")
    assert strongest.get_attribute("aria-label").endswith(f"at {key}: {value}")
    inside = lit(page)
    assert inside == drawn(page)  # all that leads to the end goes through this place
    node(page, 0, LAST).hover()
    assert 0 < lit(page) < inside
    assert "embed" in page.locator(".ol-tip:visible").inner_text()
    page.mouse.move(2, 2)
    assert lit(page) == inside
    label = node(page, row, column).get_attribute("aria-label")
    assert label.startswith("2 mid at ") and "carried along" in label


def test_places_and_heads_are_chosen_by_keyboard_and_shared(visit, graph):
    page = visit("graph")
    stops = page.locator(".ol-graph-node[tabindex='0']")
    assert stops.count() == 1
    stops.focus()
    for key in (",", ",", ",", ",", "ArrowUp"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.row") == "5"
    page.keyboard.press("Enter")
    assert page.locator(".ol-graph-way[aria-pressed=true]").count() >= 1
    assert page.locator(".ol-graph-edge[data-chosen]").count() == 1
    assert page.evaluate("document.activeElement.dataset.row") == "5"
    for key in ("ArrowUp", "ArrowUp", "Home"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.row") == "3"
    column = int(page.evaluate("document.activeElement.dataset.column"))
    assert drawn(page) == len(graph.routes(-1, 0.015))  # a place on the way is no new end
    page.keyboard.press("e")
    assert drawn(page) == len(graph.routes(column, 0.015))
    assert stops.count() == 1


def test_all_tokens_or_those_on_the_routes(visit, graph):
    page = visit("graph")
    reached = {place[1] for edge in graph.routes(-1, 0.05) for place in (edge.source, edge.target)}
    assert page.locator(".ol-graph-token").count() == len(reached) < len(IDS)
    page.get_by_role("radio", name="all tokens").click()
    assert page.locator(".ol-graph-token").count() == len(IDS)


def test_a_graph_that_was_cut_says_so_and_knows_the_routes_to_its_end(visit, graph):
    page = visit("cut")
    page.get_by_text("this view holds no heads' edges below").wait_for()
    assert drawn(page) <= len(graph.routes(-1, 0.05))
    page.locator(".ol-graph-token").first.click()
    page.get_by_text("This page does not hold that").wait_for()
    assert page.complaints == []


def test_a_drawing_has_an_end_to_its_edges(visit, graph, tmp_path, pages):
    source = (pages / "graph.html").read_text(encoding="utf-8")
    # the page's policy knows its script by its hash, so the limit is lowered in a page without one
    few = source.replace("const MOST_DRAWN = 1500", "const MOST_DRAWN = 8")
    assert few != source
    path = tmp_path / "few.html"
    path.write_text(few.replace("Content-Security-Policy", "X-None"), encoding="utf-8")
    page = visit(path)
    assert 0 < drawn(page) <= 8
    assert (
        f"of {len(graph.routes(-1, 0.05))}; drawn are those of at least"
        in page.locator("main").inner_text()
    )


# --- the architecture ----------------------------------------------------------------------------


def test_a_box_shows_its_tensor_and_its_line(visit, recording):
    page = visit("architecture")
    box = page.locator("[data-key='attn.hook_z']")
    box.click()
    assert page.locator(".ol-arch-hook").inner_text() == "blocks.2.attn.hook_z"
    assert (
        page.locator(".ol-arch-shape").get_attribute("aria-label")
        == "shape: pos 8 by head 8 by d_head 4"
    )
    _, cache = recording.model.run_with_cache(IDS, "blocks.2.attn.hook_z")
    value = cache["blocks.2.attn.hook_z"]
    numbers = dict(
        line.split("\n") for line in page.locator(".ol-arch-numbers > span").all_inner_texts()
    )
    assert list(numbers) == list(MEASURES[:6])
    read = {name: float(text.rstrip(" %").replace("−", "-")) for name, text in numbers.items()}
    assert read["norm"] == pytest.approx(float(value.norm()), rel=0.01)
    assert read["max"] == pytest.approx(float(value.max()), abs=0.006)
    named = page.locator(".ol-arch-named code").first.inner_text()
    assert named.startswith("z = self.hook_z(")
    page.mouse.move(2, 2)
    page.locator("[data-key='hook_mlp_out']").hover()
    tip = page.locator(".ol-tip:visible").inner_text()
    assert "blocks.2.hook_mlp_out" in tip and "self.hook_mlp_out(" in tip and "8 × 32" in tip


def test_stages_are_stepped_through_in_the_order_of_the_computation(visit, recording):
    page = visit("architecture")
    page.locator("[data-key='hook_embed']").click()
    fired = []
    with recording.model.recorders(
        recording.model.hook_dict.values(), lambda value, hook: fired.append(hook.name)
    ):
        recording.model(IDS)
    wanted = [name for name in fired if name.rpartition(".")[2] not in COPIES] + [
        "output of lm_head"
    ]
    name = page.locator(".ol-arch-hook")
    seen = [name.inner_text()]
    for _ in wanted[1:]:
        page.keyboard.press("n")
        seen.append(name.inner_text())
    assert seen == wanted
    assert page.get_by_role("button", name="Next stage").is_disabled()
    assert page.locator("[aria-current=step]").get_attribute("data-key") == "lm_head"
    page.get_by_role("button", name="Previous").click()
    assert name.inner_text() == wanted[-2]
    assert f"of {len(wanted)}" in page.locator(".ol-arch-progress").inner_text()
    assert page.complaints == []


def test_boxes_are_one_tab_stop_and_arrows_lead_among_them(visit):
    page = visit("architecture", width=800)
    stops = page.locator(".ol-arch-drawing [tabindex='0']")
    assert stops.count() == 1
    stops.focus()
    key = "document.activeElement.dataset.key"
    assert page.evaluate(key) == "hook_resid_pre"
    page.locator("[data-key='attn.hook_q']").focus()
    for press, expected in (
        ("ArrowRight", "attn.hook_k"), ("ArrowRight", "attn.hook_v"), ("ArrowLeft", "attn.hook_k"),
        ("ArrowDown", "attn.hook_attn_scores"),
    ):  # fmt: skip
        page.keyboard.press(press)
        assert page.evaluate(key) == expected
    page.keyboard.press("Enter")
    assert page.locator(".ol-arch-hook").inner_text() == "blocks.2.attn.hook_attn_scores"
    assert stops.count() == 1


def test_another_block_is_opened(visit):
    page = visit("architecture")
    page.locator("[data-key='mlp.hook_post']").click()
    page.get_by_role("button", name="open block 0").click()
    assert page.locator(".ol-arch-hook").inner_text() == "blocks.0.mlp.hook_post"
    assert page.locator(".ol-arch-chip").all_inner_texts() == ["1", "2"]
    page.locator(".ol-tools select").select_option("1")
    assert page.locator(".ol-arch-hook").inner_text() == "blocks.1.mlp.hook_post"


@pytest.mark.parametrize("name", ["architecture", "post"])
def test_every_stage_has_one_box_and_lines_join_them(visit, name, recording):
    page = visit(name)
    config = (
        recording.model.config
        if name == "architecture"
        else tiny_config(**VARIANTS["post_ln_350m"])
    )
    boxes = page.locator("[data-key]").evaluate_all("(all) => all.map((el) => el.dataset.key)")
    assert sorted(boxes) == sorted(stage.key for stage in stages_of(config))
    paths = page.locator(".ol-arch-link").evaluate_all(
        "(all) => all.map((el) => el.getAttribute('d'))"
    )
    assert len(paths) > 15 and not any("NaN" in path for path in paths)
    # the order from top to bottom is that of the variant
    tops = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-key]')].map((el) => [el.dataset.key, el.getBoundingClientRect().top]))"
    )
    before = tops["ln1.hook_normalized"] < tops["attn.hook_q"]
    assert before == config.do_layer_norm_before
    assert tops["hook_attn_out"] < tops["hook_resid_mid"] < tops["hook_mlp_out"] < tops["lm_head"]


def test_the_numbers_are_a_table(visit, recording):
    page = visit("architecture")
    page.locator("[data-key='hook_embed']").focus()
    page.keyboard.press("t")
    rows = page.locator(".ol-table tbody tr")
    found = ArchitectureView(recording)._parts[0].measured[0]
    assert rows.count() == len(found)
    first = rows.nth(3).locator("td").all_inner_texts()
    assert torch.tensor([float(text) for text in first[1:7]]).allclose(
        torch.from_numpy(list(found.values())[3].measures[:6]), rtol=1e-4
    )
