"""The pages of neurons and of sweeps in a real browser without a network."""

import pytest
import test_browser_widgets as shared
import torch
from browser_pages import THEMES, rgb
from conftest import random_model, tiny_config
from sweep_results import make_result

from optlens import neurons
from optlens.plots import STYLES
from optlens.widgets import NeuronsView, PatchingView

pytestmark = shared.pytestmark
visit = shared.visit

TEXT = torch.arange(2, 62).remainder(41)


@pytest.fixture(scope="module")
def examples():
    model = random_model(tiny_config())
    found = neurons.top_examples(model, TEXT, k=3, window=12, progress=False)
    found.metadata["labels"] = {str(token): text for token, text in shared.LABELS.items()}
    effect = neurons.vocabulary_effect(model, k=4)
    effect.metadata["labels"] = found.metadata["labels"]
    return found, effect


@pytest.fixture(scope="module")
def result():
    result = make_result("component", "layer", "pos", prompts=4, labels=shared.LABELS)
    result.per_prompt[1, 2, 3] = torch.nan
    return result


@pytest.fixture(scope="module")
def pages(examples, result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    NeuronsView(*examples).to_html(folder / "neurons.html")
    PatchingView(result).to_html(folder / "patching.html")
    pair = make_result("layer", "pos", labels=shared.LABELS)
    PatchingView(pair).to_html(folder / "pair.html")
    pair.per_prompt[1, 2] = torch.nan
    pair.undefined = pair.per_prompt.isnan().any(-1)
    PatchingView(pair).to_html(folder / "undefined.html")
    return folder


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", shared.WIDTHS)
@pytest.mark.parametrize("name", ["neurons", "patching", "pair"])
def test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme):
    shared.test_page_is_quiet_closed_and_within_its_width(visit, name, width, theme)


@pytest.mark.parametrize("name", ["neurons", "pair"])
def test_hostile_tokens_are_text_and_the_picture_can_be_saved(visit, name, tmp_path):
    shared.test_hostile_tokens_are_text(visit, name)
    shared.test_a_view_saves_its_own_picture(visit, name, tmp_path)


def test_a_neuron_is_chosen_and_its_tokens_are_shaded(visit, examples):
    found, effect = examples
    page = visit("neurons")
    page.locator(".ol-neuron").nth(2).click()
    column = int(found.values[1, :, 0].sort(descending=True, stable=True).indices[2])
    assert shared.names(page) == [f"Layer 1, neuron {column}"]
    best = found.of(1, column)[0]
    triggers = page.locator(".ol-examples .ol-trigger")
    assert triggers.count() == len(found.of(1, column))
    ground = triggers.first.evaluate("(el) => getComputedStyle(el).backgroundColor")
    assert ground == rgb(STYLES["light"].ramp[-1])
    assert page.locator(".ol-readout b").inner_text() == f"{best.activation:.3f}"
    assert page.locator(".ol-details button").count() == 8
    triggers.first.focus()
    page.keyboard.press("Home")
    assert page.locator(".ol-readout b").inner_text() == f"{best.activations[0]:.3f}"
    page.keyboard.press("n")
    column = int(found.values[1, :, 0].sort(descending=True, stable=True).indices[3])
    assert shared.names(page) == [f"Layer 1, neuron {column}"]
    page.get_by_label("Layer").select_option("0")
    assert shared.names(page)[0].startswith("Layer 0, neuron ")
    page.get_by_label("Number of the neuron").fill("7")
    page.keyboard.press("Enter")
    assert shared.names(page) == ["Layer 0, neuron 7"]
    assert page.complaints == []


def test_a_patch_is_chosen_and_read(visit, result):
    page = visit("patching")
    page.locator(".ol-tools select").select_option(index=1)
    page.locator(".ol-cell[data-row='1'][data-column='4']").click()
    value, share = float(result.values[1, 1, 4]), float(result.normalized[1, 1, 4])
    shown = page.locator(".ol-cell[aria-selected='true']")
    assert float(shown.inner_text()) == pytest.approx(share, abs=0.006)
    lines = page.locator(".ol-details .ol-fact").all_inner_texts()
    assert f"{share:.2f}" in lines[0] and f"{value:.2f}" in lines[1] and "[" in lines[1]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert page.locator(".ol-cell[aria-selected='true']").inner_text() == "–"
    assert "not computed" in page.locator(".ol-details .ol-fact").first.inner_text()
    assert "1 of 30 patches were not computed" in page.locator(".ol-partial").inner_text()
    page.keyboard.press("m")
    cell = page.locator(".ol-cell[data-row='1'][data-column='4']")
    assert float(cell.inner_text()) == pytest.approx(value, abs=0.006)
    page.keyboard.press("b")
    assert page.locator(".ol-details button[aria-pressed='true']").count() == 1
    assert page.complaints == []


def test_what_is_nan_by_the_metric_is_not_called_missing(visit):
    page = visit("undefined")
    page.locator(".ol-cell[data-row='1'][data-column='2']").click()
    assert page.locator(".ol-cell[aria-selected='true']").inner_text() == "–"
    assert "no number" in page.locator(".ol-details .ol-fact").first.inner_text()
    assert page.locator(".ol-partial").is_hidden()
    assert page.complaints == []


def test_positions_where_prompts_differ_show_both_tokens(visit):
    page = visit("pair")
    assert page.locator(".ol-differs").count() == 4
    assert page.locator(".ol-column-name .ol-other").count() == 2
    page.locator(".ol-cell[data-row='0'][data-column='2']").click()
    assert "clean prompt:" in page.locator(".ol-details .ol-facts").inner_text()
