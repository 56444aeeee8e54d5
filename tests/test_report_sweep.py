"""The page about a sweep says what its result holds, and obeys nothing that a prompt says."""

import base64
import hashlib
import re

import numpy as np
import pytest
import torch
from page_reader import Page, contrast
from sweep_results import CLEAN, CORRUPT, HOSTILE, make_result

import optlens
from optlens.metrics import logit_diff
from optlens.patching import PatchResult
from optlens.patching.result import token_labels
from optlens.plots import STYLES
from optlens.plots.style import mix
from optlens.report import PatchView
from optlens.report.pictures import sweep_png
from optlens.report.sweep_facts import gather_sweep
from optlens.report.sweep_page import sweep_page, sweep_stylesheet
from optlens.report.sweep_tables import level_class, number
from optlens.report.sweep_terminal import text_of_sweep
from optlens.report.sweep_words import kind_of, meaning


def page_of(result: PatchResult) -> Page:
    return Page(sweep_page(gather_sweep(result)))


def cells_of(page: Page) -> list[dict]:
    """Return the attributes of every cell with a note; in a page of one table, its cells."""
    return [a for a in page.all("td") if "title" in a]


# --- what the page says --------------------------------------------------------------------------


def test_a_true_sweep_names_its_tokens_heads_and_numbers():
    model = optlens.load()
    prompt = "When Mary and John went to the store, {} gave a drink to"
    pair = prompt.format("John"), prompt.format("Mary")
    metric = logit_diff(" Mary", " John")
    result = optlens.patch_sweep(model, *pair, "z", ("layer", "head"), metric, progress=False)
    result.metadata["labels"] = token_labels(model, result.metadata)
    page = page_of(result)
    best = int(result.normalized.argmax())
    layer, head = divmod(best, 8)
    cell = cells_of(page)[best]
    assert cell["title"].splitlines() == [
        f"layer {layer}, head {head}",
        f"{float(result.normalized.max()):.3f}  normalized",
        f"{float(result.values.max()):.5g}  logit_diff(' Mary', ' John')",
    ]
    assert "best" in cell["class"] and "u10" in cell["class"]
    for words in ("·Mary", "·drink", f"{result.clean:.4g}", f"{result.corrupt:.4g}"):
        assert words in page.text
    assert "The logit of “·Mary” minus the logit of “·John” after the last token" in page.text
    assert result.metadata["model"][:16] in page.text


def test_positions_carry_the_tokens_of_the_run_that_is_patched():
    for direction, first, other in (("denoise", "·dog", "·cat"), ("noise", "·cat", "·dog")):
        facts = gather_sweep(make_result("layer", "pos", direction=direction))
        assert facts.axes[1].headings[2] == first and facts.axes[1].others[2] == other
        assert facts.axes[1].others[1] is None
        assert facts.place((1, 2)) == f"layer 1, position 2 {first}"


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_cells_are_coloured_by_what_the_patch_changes(direction):
    result = make_result("layer", "head", direction=direction)
    facts = gather_sweep(result)
    base = 2.0 if direction == "noise" else -2.0
    np.testing.assert_allclose(facts.shown, result.normalized, rtol=1e-6)
    np.testing.assert_allclose(facts.effect, (facts.values - base) / 4.0, atol=1e-6)
    strongest = np.unravel_index(np.abs(facts.values - base).argmax(), facts.values.shape)
    assert facts.top[0] == tuple(int(at) for at in strongest)
    sides = {cell["class"][0] for cell in cells_of(page_of(result))}
    assert sides == ({"u", "d", "z"} if direction == "denoise" else {"d", "z"})


def test_one_axis_is_a_row_and_three_are_small_tables():
    assert len(cells_of(page_of(make_result("layer")))) == 3
    page = page_of(make_result("layer", "head", "pos"))
    tables = [a for a in page.all("table") if "sweep" in a["class"]]
    assert len(tables) == 1 + 3
    assert len(cells_of(page)) == 3 * 4 + 3 * 4 * 5
    assert "the patch with the largest effect over every position" in page.text
    assert "layer 1" in page.text


def test_the_strongest_over_an_axis_is_the_one_furthest_from_no_effect():
    result = make_result("layer", "head", "pos")
    result.per_prompt[:] = -2.0
    result.per_prompt[1, 2, 3] = -9.0  # away from the answer, but the largest effect
    result.per_prompt[1, 2, 4] = 1.0
    result.per_prompt[0, 0, 0] = torch.nan
    facts = gather_sweep(result)
    cells = facts.strongest_over(2)
    assert np.unravel_index(cells[1, 2], (3, 4, 5)) == (1, 2, 3)
    assert np.unravel_index(cells[0, 0], (3, 4, 5)) == (0, 0, 1), "NaN stands for no cell"
    assert facts.top == [(1, 2, 3), (1, 2, 4)]


def test_four_axes_are_reduced_and_listed():
    page = page_of(make_result("component", "layer", "head", "pos"))
    assert len(cells_of(page)) == 2 * 3
    assert "over every head and position" in page.text
    assert "Below, all of them" not in page.text


def test_a_result_cut_short_is_marked():
    result = make_result("layer", "head")
    assert "Not complete" not in page_of(result).text
    result.per_prompt[2, 1:] = torch.nan
    page = page_of(result)
    assert "Not complete. 3 of 12 patches were not computed" in page.text
    gone = [cell for cell in cells_of(page) if cell["class"] == "gone"]
    assert [cell["title"] for cell in gone] == [
        f"layer 2, head {n}: not computed" for n in (1, 2, 3)
    ]
    assert not re.search(r"\bnan\b", page.text)
    result.undefined = result.per_prompt.isnan().any(-1)
    result.undefined[2, 1] = False
    page = page_of(result)
    assert "1 of 12 patches were not computed" in page.text
    gone = [cell["title"] for cell in cells_of(page) if cell["class"] == "gone"]
    assert [title.partition(": ")[2] for title in gone] == [
        "not computed",
        "the metric is NaN",
        "the metric is NaN",
    ]
    nothing = make_result("layer", "head")
    nothing.per_prompt[:] = torch.nan
    assert "12 of 12" in page_of(nothing).text


def test_several_prompts_show_intervals_and_their_own_metric():
    result = make_result("layer", "head", prompts=5)
    page, (low, high) = page_of(result), result.interval()
    assert f"{low[2, 3]:.3g} to {high[2, 3]:.3g}" in page.text
    assert f"{low[2, 3]:.4g} to {high[2, 3]:.4g}" in cells_of(page)[-1]["title"]
    assert "mean of 5 prompts" in page.text
    assert "Clean 4 logit_diff 2.5" in page.text
    alone = page_of(make_result("layer", "head"))
    assert "interval" not in alone.text
    shared = make_result("layer", "head", prompts=5)  # as a metric with one number for all gives
    shared.per_prompt[:] = shared.per_prompt[..., :1].clone()
    assert "interval" not in page_of(shared).text


def test_padding_of_several_prompts_is_dropped():
    rows = {"clean": [[1, 1, 5, 17], [2, 5, 17, 9]], "corrupt": [[1, 1, 5, 9], [2, 5, 9, 9]]}
    labels = {1: "<pad>", 2: "</s>", 5: "a", 17: "b", 9: "c"}
    result = make_result("layer", prompts=2, labels=labels)
    result.metadata |= rows
    facts = gather_sweep(result)
    assert [p.tokens for p in facts.prompts] == [["a", "b"], ["</s>", "a", "b", "c"]]
    assert [p.other for p in facts.prompts] == [["a", "c"], ["</s>", "a", "c", "c"]]


def test_an_ablation_shows_the_change_of_the_metric():
    result = make_result("layer", "head", corrupt=float("nan"))
    facts, page = gather_sweep(result), page_of(result)
    np.testing.assert_allclose(facts.shown, facts.values - 2.0)
    assert page.text.startswith("Ablation: z by layer and head")
    assert "Run without a patch" in page.text and "Corrupt" not in page.text
    assert cells_of(page)[0]["title"].splitlines()[1] == "-4.500  change"


def test_runs_that_hardly_differ_are_shown_unnormalized():
    result = make_result("layer", "head", corrupt=2.0)
    facts = gather_sweep(result)
    assert facts.scale == "change"
    np.testing.assert_allclose(facts.shown, facts.values - 2.0)
    assert "nothing can be normalized" in page_of(result).text


def test_no_effect_is_said_in_words():
    result = make_result("layer", "head")
    result.per_prompt[:] = -2.0
    page = page_of(result)
    assert "No patch changes what was measured." in page.text
    assert {cell["class"] for cell in cells_of(page)} == {"z"}


def test_very_many_columns_are_a_picture_with_words():
    page = page_of(make_result("layer", "neuron"))
    (picture,) = page.all("img")
    assert "3 rows and 300 columns; the strongest patch is layer 2, neuron 299" in picture["alt"]
    assert cells_of(page) == []
    assert "Across: neuron 0 to neuron 299" in page.text


def test_picture_holds_signs_and_what_is_missing():
    from test_report import unpack

    look = STYLES["light"]
    pixels = unpack(sweep_png(np.array([[2.0, -2.0, 0.0, np.nan]]), 2.0, look))
    assert tuple(pixels[0, 0]) == mix(look.diverging, 1.0)
    assert tuple(pixels[0, 1]) == mix(look.diverging, 0.0)
    assert tuple(pixels[0, 2]) == mix(look.diverging, 0.5)
    assert tuple(pixels[0, 3]) == mix((look.masked, look.masked), 0)
    wide = np.zeros((1, 100))
    wide[0, 70], wide[0, 71] = -3.0, 1.0
    small = unpack(sweep_png(wide, 3.0, look, most=10))
    assert small.shape == (1, 10, 3) and tuple(small[0, 7]) == mix(look.diverging, 0.0)


def test_a_result_without_labels_shows_token_ids():
    result = make_result("layer", "pos")
    del result.metadata["labels"]
    assert "⟨17⟩" in page_of(result).text


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("logit_diff([' Mary', ' Ann'], [' John', ' Tom'])", "the logit of the wrong ones"),
        ("logit_diff([' a', ... 16 in all], [' b', ... 16 in all])", "of the right answers minus"),
        ("prob(' Paris', pos=3)", "The probability of “·Paris” after token 3"),
        ("logit(17)", "The logit of token id 17"),
        ("kl()", "clean run's: KL divergence"),
        ("custom(f)", "caller's own function"),
        ("something else", "What was measured"),
    ],
)
def test_metrics_are_explained(metric, words):
    assert words in meaning(metric)


@pytest.mark.parametrize(
    ("about", "name", "words"),
    [
        ({"direction": "denoise"}, "Activation patching", "clean run are written into the corrupt"),
        ({"direction": "noise"}, "Activation patching", "corrupt run are written into the clean"),
        ({"direction": "noise", "senders": "heads"}, "Path patching", "along chosen paths"),
        ({"direction": "denoise", "method": "atp"}, "Attribution patching", "estimated"),
        ({"noise": 3.0}, "Causal tracing", "Noise on the subject"),
    ],
)
def test_kinds_are_told_apart(about, name, words):
    kind = kind_of(about, True)
    assert kind.name == name and words in kind.doing
    assert kind.from_clean == (about.get("direction") == "noise")


def test_interventions_on_all_runs_are_named():
    given = [optlens.Ablate("z", layer=1, head=[0, 2]), optlens.Knockout(query=-1, key="<b>\u202e")]
    described = [optlens.interventions.describe(each) for each in given]
    facts = gather_sweep(make_result("layer", "head", interventions=described))
    page, text = Page(sweep_page(facts)), text_of_sweep(facts, width=60)
    for shown in (page.text, text):
        assert "All runs are under interventions:" in shown
        assert "Ablate('z', layer=1, head=[0, 2])" in shown
        assert "Knockout(query=-1, key='<b>" in shown and "\u202e" not in shown
    assert max(map(len, text.splitlines())) <= 60
    plain = make_result("layer", "head")
    assert "interventions" not in page_of(plain).text + text_of_sweep(gather_sweep(plain))


def test_knockouts_and_ablations_are_told_apart():
    assert kind_of({"mode": "knockout"}, False).name == "Attention knockout"
    assert "its mean over" in kind_of({"mode": "mean"}, False).doing


def test_numbers_have_as_many_decimals_as_their_table_needs():
    assert [number(v, 1.0) for v in (1.0, -0.004, 0.126)] == ["1.00", "0.00", "0.13"]
    assert number(0.0123, 0.05) == "0.012"
    assert number(0.00012, 0.005) == "1.2e-04" and number(0.0, 0.005) == "0"
    assert number(123.4, 500.0) == "123"


def test_colours_go_with_sign_and_size():
    assert [level_class(v, 2.0) for v in (2.0, -2.0, 0.0, 0.09, 1.0)] == [
        "u10",
        "d10",
        "z",
        "z",
        "u5",
    ]
    assert level_class(float("nan"), 1.0) == "gone"


# --- what the page must never do -----------------------------------------------------------------


@pytest.fixture
def hostile() -> PatchResult:
    """A result whose tokens, site and metric are full of markup and invisible characters."""
    bad = "<script>alert(1)</script>\x1b"
    return make_result("layer", "pos", labels=HOSTILE, site=bad, metric=f"custom({bad})", note=bad)


def test_hostile_tokens_are_text(hostile):
    source = sweep_page(gather_sweep(hostile))
    page = Page(source)
    assert len(page.all("script")) == 1
    assert not any("onerror" in a for _, a in page.tags) and page.all("img") == []
    assert HOSTILE[5] in page.text and HOSTILE[17] in page.text
    assert "⟨U+202E⟩evil⟨U+001B⟩[2J⟨U+0000⟩" in page.text and "◌\u0301" in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", source)


def test_policy_is_that_of_recordings(hostile):
    source = sweep_page(gather_sweep(hostile))
    page = Page(source)
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    script = re.search("<script>(.*)</script>", source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
    assert "url(" not in source and "@import" not in source


@pytest.mark.parametrize("axes", [("layer",), ("layer", "pos"), ("layer", "head", "pos")])
def test_heads_links_and_ids_are_in_order(axes):
    page = page_of(make_result(*axes, prompts=2))
    assert all("scope" in a for a in page.all("th"))
    anchors = [a["id"] for _, a in page.tags if "id" in a]
    assert len(anchors) == len(set(anchors))
    links = [a["href"] for a in page.all("a")]
    assert links and all(link[1:] in anchors for link in links)
    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert headings[0] == "h1" and headings.count("h1") == 1 and "h4" not in headings


def test_text_of_cells_stands_out_in_both_themes():
    """WCAG asks for 4.5 to 1 of small text."""
    themes = [t for t in re.findall(r":root\{([^}]*)\}", sweep_stylesheet()) if "--u1:" in t]
    assert len(themes) == 2
    for theme in themes:
        color = dict(pair.removeprefix("--").split(":") for pair in theme.split(";"))
        for side in "du":
            for level in range(1, 11):
                ground = color[f"{side}{level}"]
                assert contrast(color[f"{side}t{level}"], ground) >= 4.5, (side, level)
    for look in STYLES.values():
        for ground in (look.paper, look.masked):
            assert contrast(look.muted, ground) >= 4.5, "cells without effect, and missing ones"


def test_the_same_result_gives_the_same_bytes_and_a_whole_file(tmp_path):
    result = make_result("layer", "pos")
    target = tmp_path / "page.html"
    target.write_text("old")
    result.to_html(target)
    assert target.read_text(encoding="utf-8") == sweep_page(
        gather_sweep(make_result("layer", "pos"))
    )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(OSError, match="no folder"):
        result.to_html(tmp_path / "nowhere" / "page.html")


def test_a_saved_result_shows_the_same_page(tmp_path):
    result = make_result("layer", "head", prompts=3)
    result.save(tmp_path / "r.safetensors")
    loaded = PatchResult.load(tmp_path / "r.safetensors")
    assert sweep_page(gather_sweep(loaded)) == sweep_page(gather_sweep(result))


# --- labels and the view in a notebook -------------------------------------------------------------


def test_labels_name_every_token_of_the_prompts():
    model = optlens.load()
    about = {"clean": [[2, 300]], "corrupt": [[2, 301]], "prompts": None}
    labels = token_labels(model, about)
    assert labels == {str(i): model.tokenizer.display(i) for i in (2, 300, 301)}
    model.tokenizer = None
    assert token_labels(model, about) == {}


@pytest.mark.parametrize(
    "axes",
    [
        ("layer",),
        ("layer", "pos"),
        ("layer", "head", "pos"),
        ("layer", "head", "neuron"),
        ("component", "layer", "head", "pos"),
    ],
)
def test_view_survives_a_sanitiser(axes):
    result = make_result(*axes, labels=HOSTILE)
    assert isinstance(result.show(), PatchView) and repr(result.show()) == repr(result)
    markup = result._repr_html_()
    assert markup == result.show()._repr_html_()
    page = Page(markup)
    assert {tag for tag, _ in page.tags} <= set(
        "div p b bdi table caption thead tbody tr th td img".split()
    )
    assert all(set(attributes) <= {"src", "alt", "width"} for _, attributes in page.tags)
    (picture,) = page.all("img")
    assert picture["src"].startswith("data:image/png;base64,iVBOR")
    assert "Heatmap: Activation patching: z by" in picture["alt"]


def test_view_says_what_is_missing():
    result = make_result("layer", "head")
    result.per_prompt[0] = torch.nan
    assert "Not complete: 4 patches were not computed." in Page(result._repr_html_()).text


def test_prompts_of_these_tests_differ():
    assert [a != b for a, b in zip(CLEAN, CORRUPT, strict=True)] == [
        False,
        False,
        True,
        True,
        False,
    ]
