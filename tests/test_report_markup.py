"""Markup escapes all that is not markup, and shows characters that have no picture."""

from optlens.report.markup import Html, el, token_label, visible


def test_elements_escape_all_but_markup():
    assert el("p", "<b>", el("i", "&"), None, class_='"x"') == (
        '<p class="&quot;x&quot;">&lt;b&gt;<i>&amp;</i></p>'
    )
    assert el("input", checked=True, disabled=False, aria_label="a") == (
        '<input checked aria-label="a">'
    )
    assert el("p", [Html("<hr>"), "<hr>"]) == "<p><hr>&lt;hr&gt;</p>"


def test_visible_keeps_letters_of_every_script_and_shows_the_unseen():
    text = "Ελλάδα عربي 中文 👍\n\t"
    assert visible(text) == text
    assert visible("\u200b\ufeff\ud800") == "⟨U+200B⟩⟨U+FEFF⟩⟨U+D800⟩"
    assert token_label("\u0301x") == "◌\u0301x"
