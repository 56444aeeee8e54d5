"""The page says what the recording holds, obeys nothing that a prompt says, and never changes."""

import base64
import hashlib
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config
from page_reader import Page, contrast

from optlens import Recording
from optlens.plots import STYLES
from optlens.plots.draw import pool_max
from optlens.plots.style import mix
from optlens.report import sections, write_html
from optlens.report.facts import gather
from optlens.report.page import html_page, stylesheet
from optlens.report.pictures import attention_png

IDS = torch.tensor([2, 5, 17, 5, 9])
HOSTILE = {
    2: "</s>",
    5: "<script>alert(1)</script>",
    17: "\"'><img src=http://x/y onerror=alert(2)>",
    9: "\u202eevil\u2066\x1b[31m\x00",
}


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


@pytest.fixture
def recording(model):
    return model.record(IDS)


@pytest.fixture
def hostile(recording):
    """A recording whose prompt and tokens are full of markup and invisible characters."""
    recording.metadata["labels"] = {str(token): text for token, text in HOSTILE.items()}
    recording.metadata["prompts"] = ["".join(HOSTILE[token] for token in IDS.tolist())]
    return recording


def page_of(recording: Recording, top_k: int = 5) -> Page:
    return Page(html_page(gather(recording, top_k)))


# --- what the page says --------------------------------------------------------------------------


def test_facts_hold_the_numbers_of_the_recording(model, recording):
    (facts,) = gather(recording, top_k=3)
    lens = recording.logit_lens(top_k=3)
    np.testing.assert_array_equal(facts.lens.ids, lens.top_tokens)
    np.testing.assert_array_equal(facts.lens.probs, lens.top_probs)
    np.testing.assert_array_equal(facts.lens.entropy, lens.entropy)
    np.testing.assert_array_equal(facts.lens.kl, lens.kl)
    torch.testing.assert_close(torch.tensor(facts.norms), recording.residual.norm(dim=-1))
    shown = torch.tensor(facts.attention)
    assert torch.equal(shown.isnan(), torch.ones(5, 5).triu(1).bool().expand_as(shown))
    torch.testing.assert_close(shown.nan_to_num().float(), recording.attention)
    probs = recording.logits[-1].softmax(-1)
    assert facts.answer.probs[0] == pytest.approx(float(probs.max()), abs=1e-6)
    best = int(probs.argmax())
    torch.testing.assert_close(torch.tensor(facts.answer.row_probs), lens.prob(best)[:, -1])
    assert facts.answer.row_ranks.tolist() == lens.rank(best)[:, -1].tolist()


def test_settled_is_the_row_from_which_the_answer_stays_on_top(recording):
    (facts,) = gather(recording)

    def settled(*ranks: int):
        answer = type(facts.answer)(["x"], np.ones(1), np.ones(len(ranks)), np.array(ranks))
        return answer.settled

    assert settled(4, 0, 2, 0, 0) == 3
    assert settled(0, 0, 0) == 0
    assert settled(5, 1, 0) == 2
    assert settled(0, 0, 1) is None
    assert settled(-1, -1, 0) == 2


def test_page_shows_tokens_predictions_heads_norms_and_provenance(recording):
    page = page_of(recording)
    (facts,) = gather(recording)
    assert [name for name in ("h1",) for _ in page.all(name)] == ["h1"]
    tables = page.all("table")
    assert [t["class"] for t in tables] == ["bars", "bars", "grid lens", "heads", "grid numbers"]
    cells = [a["title"] for a in page.all("td") if "title" in a]
    assert len(cells) == 3 * 5  # rows x positions
    last = cells[-1].splitlines()
    assert last[0].startswith("after layer 1, position 4: entropy ")
    assert [line.split("  ")[1] for line in last[1:]] == facts.answer.words
    assert f"{100 * facts.answer.probs[0]:.1f} %" in last[1]
    assert f"{facts.norms[2, 3]:.3g}" in page.text
    assert "2 layers of 4 heads" in page.text
    assert recording.metadata["fingerprint"][:16] in page.text


def test_every_picture_has_words_and_every_table_heads(recording):
    page = page_of(recording)
    pictures = page.all("img")
    assert len(pictures) == 2 * 2 * 4  # small and large
    assert all(len(picture["alt"]) > 30 for picture in pictures)
    assert {a["scope"] for a in page.all("th") if "scope" in a} == {"row", "col"}
    assert all("scope" in a for a in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert headings[0] == "h1" and "h4" not in headings
    assert headings.index("h2") < headings.index("h3")


def test_links_lead_somewhere_and_ids_are_unique(model):
    page = page_of(model.record(IDS.repeat(2, 1)))
    anchors = [a["id"] for _, a in page.tags if "id" in a]
    assert len(anchors) == len(set(anchors))
    links = [a["href"] for a in page.all("a")]
    assert links and all(link[1:] in anchors for link in links)
    labels = [a["for"] for a in page.all("label")]
    assert labels and set(labels) <= set(anchors)
    groups = {a["name"] for a in page.all("input")}
    assert len(groups) == 2  # the choice of one prompt leaves the other's alone


def test_heading_is_the_prompt_without_the_token_put_in_front(recording):
    recording.metadata["labels"] = {"2": "</s>"}
    for text, shown in (("</s>Hi </s>", "Hi </s>"), ("</s>", "</s>"), ("Hi", "Hi")):
        recording.metadata["prompts"] = [text]
        assert gather(recording)[0].prompt == shown


def test_what_was_not_recorded_is_left_out(model):
    classes = [a["class"] for a in page_of(model.record(IDS, what="attention")).all("table")]
    assert classes == ["heads"]
    page = page_of(model.record(IDS, what="residual"))
    assert page.all("img") == []
    assert [a["class"] for a in page.all("table")] == ["bars", "bars", "grid lens", "grid numbers"]


def test_padding_is_dropped(model):
    alone = model.record(IDS[1:])
    padded = model.record(
        torch.stack([IDS, torch.cat([torch.tensor([1]), IDS[1:]])]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
    )
    (expected,), (_, facts) = gather(alone), gather(padded)
    assert facts.ids == expected.ids and facts.positions == expected.positions
    # The same prompt alone and padded agrees to rounding of float32.
    np.testing.assert_allclose(facts.attention, expected.attention, atol=1e-5)
    np.testing.assert_allclose(facts.norms, expected.norms, rtol=1e-5)
    np.testing.assert_array_equal(facts.lens.ids, expected.lens.ids)


def test_selected_positions_layers_and_heads_keep_their_names(model):
    recording = model.record(IDS, pos=[1, -1], layers=[1], heads=[0, 3])
    (facts,) = gather(recording)
    assert facts.positions == [1, 4]
    assert np.isnan(facts.attention[0, 0]).sum(-1).tolist() == [3, 0]
    page = page_of(recording)
    assert [a["id"] for a in page.all("figure")] == ["L1H0", "L1H3"]
    assert len([a for a in page.all("td") if "title" in a]) == 2 * 2


def test_without_the_last_layer_or_token_nothing_is_said_to_come_next(model):
    for selection in ({"layers": [0]}, {"pos": [0, 1]}):
        (facts,) = gather(model.record(IDS, **selection))
        assert facts.answer is None
        assert "comes next" not in Page(html_page([facts])).text


def test_a_loaded_recording_shows_the_same_without_its_model(recording, tmp_path):
    recording.save(tmp_path / "r.safetensors")
    loaded = Recording.load(tmp_path / "r.safetensors")
    (facts,), (expected,) = gather(loaded), gather(recording)
    np.testing.assert_array_equal(facts.lens.probs, expected.lens.probs)
    known = facts.answer.row_ranks >= 0
    assert known[-1]
    np.testing.assert_array_equal(facts.answer.row_ranks[known], expected.answer.row_ranks[known])
    assert (expected.answer.row_ranks[~known] >= 5).all()
    assert np.isnan(facts.answer.row_probs).tolist() == (~known).tolist()
    assert not known.all(), "this recording shows nothing of what is not known"
    assert "> 5" in page_of(loaded).text


def test_top_k_is_kept_to_and_checked(model, recording):
    assert gather(recording, 2)[0].lens.ids.shape[-1] == 2
    assert gather(recording, 5000)[0].lens.ids.shape[-1] == 101  # the whole vocabulary
    with pytest.raises(ValueError, match="top_k=0"):
        gather(recording, 0)


# --- what the page must never do -----------------------------------------------------------------


def test_a_hostile_prompt_is_text(hostile):
    source = html_page(gather(hostile))
    page = Page(source)
    assert len(page.all("script")) == 1
    assert not any("onerror" in a for _, a in page.tags)
    assert all(a["src"].startswith("data:image/png") for a in page.all("img"))
    assert "<script>alert(1)</script>" in page.text
    assert "onerror=alert(2)>" in page.text
    assert "⟨U+202E⟩evil⟨U+2066⟩⟨U+001B⟩[31m⟨U+0000⟩" in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", source)


def test_policy_forbids_all_but_inline_styles_data_pictures_and_the_one_script(recording):
    source = html_page(gather(recording))
    page = Page(source)
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    script = re.search("<script>(.*)</script>", source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # The policy stands before everything that it rules.
    order = [tag for tag, _ in page.tags]
    assert order[:4] == ["html", "head", "meta", "meta"]
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
    assert "http" not in source.replace("http-equiv", "")
    assert "url(" not in source and "@import" not in source


def test_the_same_recording_gives_the_same_bytes(model, tmp_path):
    for seed, name in enumerate(("a.html", "b.html")):
        recording = model.record(IDS)
        recording.metadata["seed"] = seed  # torch draws another in every process
        write_html(recording, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_write_html_replaces_whole_or_not_at_all(recording, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")
    with pytest.raises(ValueError, match="top_k"):
        write_html(recording, target, top_k=0)
    assert target.read_text() == "old"
    write_html(recording, target)
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>\n<html lang")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(OSError, match="no folder"):
        write_html(recording, tmp_path / "nowhere" / "page.html")


def test_recording_delegates_to_the_report(recording, tmp_path):
    recording.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html_page(gather(recording))


# --- colours and pictures --------------------------------------------------------------------------


def unpack(uri: str) -> np.ndarray:
    """Decode one of our palette PNGs to rgb, [row, column, 3]."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert zlib.crc32(kind + body) == check
        chunks[kind], place = body, place + 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert (lines[:, 0] == 0).all()
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[lines[:, 1:]]


@pytest.mark.parametrize("name", STYLES)
def test_pictures_hold_the_pattern_on_a_square_root_scale(name):
    look = STYLES[name]
    pixels = unpack(attention_png(np.array([[1.0, np.nan], [0.25, 0.0]]), look))
    assert tuple(pixels[0, 0]) == mix(look.ramp, 1.0)
    assert tuple(pixels[0, 1]) == mix((look.masked, look.masked), 0)
    assert tuple(pixels[1, 1]) == mix(look.ramp, 0.0)
    # A quarter lies half way up; the palette has 64 steps.
    assert np.abs(pixels[1, 0].astype(int) - mix(look.ramp, 0.5)).max() <= 4


def test_pictures_shrink_to_the_largest_and_enlarge_by_whole_steps():
    pattern = np.zeros((100, 100))
    pattern[77, 3] = 1.0
    small = unpack(attention_png(pattern, STYLES["light"], most=48))
    assert small.shape == (34, 34, 3)
    assert tuple(small[77 // 3, 1]) == mix(STYLES["light"].ramp, 1.0)
    large = unpack(attention_png(np.eye(2), STYLES["light"], zoom=5))
    assert large.shape == (10, 10, 3) and (large[:5, :5] == large[0, 0]).all()


def test_large_pictures_have_a_largest_size(recording, monkeypatch):
    """As many pixels as there are pairs of tokens would make long prompts a page of 300 MB."""
    assert "a pixel is the largest of" not in page_of(recording).text
    monkeypatch.setattr(sections, "_LARGE", 3)
    (facts,) = gather(recording)
    page = Page(html_page([facts]))
    assert "a pixel is the largest of 2 x 2 weights" in page.text
    pictures = page.all("img")
    assert {(picture["width"], picture["height"]) for picture in pictures} == {("3", "3")}
    assert [picture["src"] for picture in pictures if picture["alt"].startswith("Attention")] == [
        attention_png(pool_max(pattern, 3), STYLES["light"])
        for layer in facts.attention
        for pattern in layer
    ]


def test_text_stands_out_in_both_themes():
    """WCAG asks for 4.5 to 1; cells of a heat map carry small text on every step of the ramp."""
    themes = re.findall(r":root\{([^}]*)\}", stylesheet())
    assert len(themes) == 2
    for theme in themes:
        color = dict(pair.removeprefix("--").split(":") for pair in theme.split(";"))
        for level in range(11):
            assert contrast(color[f"t{level}"], color[f"b{level}"]) >= 4.5, level
        for text in ("ink", "muted", "link", "warm"):
            for ground in ("page", "paper"):
                assert contrast(color[text], color[ground]) >= 4.5, (text, ground)
