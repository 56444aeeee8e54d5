"""Build HTML from text that nobody vouches for: everything is escaped unless it is markup already.

A prompt may hold tags, quotes, right-to-left marks or control characters; a page about it must show
them, not obey them. `el` is the only place of the report that writes a tag, and it escapes every
child and every attribute; `visible` writes the characters that have no picture of their own.
"""

import html
import unicodedata


class Html(str):
    """Hold text that is markup already, as `el` returns it, and is not escaped again."""

    __slots__ = ()


VOID = {"br", "hr", "img", "input", "link", "meta", "source"}


def el(tag: str, *children: object, **attributes: object) -> Html:
    """Return one element.

    Args:
        tag: the element's name.
        children: text (escaped), `Html` (kept), lists of both, or None (left out).
        attributes: values (escaped). `class_` and `for_` lose their underscore and other ones
            become dashes; True writes the bare name, False and None leave the attribute out.

    Example:
        >>> el("p", "1 < 2", el("b", "&"), class_="x")
        '<p class="x">1 &lt; 2<b>&amp;</b></p>'
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {name}")
        elif value is not None and value is not False:
            parts.append(f' {name}="{html.escape(str(value), quote=True)}"')
    parts.append(">")
    if tag not in VOID:
        parts += [join(children), f"</{tag}>"]
    return Html("".join(parts))


def join(children: object) -> Html:
    """Return children of `el` as one piece of markup."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, list | tuple):
        return Html("".join(join(child) for child in children))
    return Html(html.escape(str(children), quote=False))


def visible(text: str) -> str:
    r"""Return text in which every control and format character can be seen; line breaks stay.

    Example:
        >>> visible("a\u202eb\x00")
        'a⟨U+202E⟩b⟨U+0000⟩'
    """
    return "".join(_seen(char) for char in text)


def token_label(label: str) -> str:
    r"""Return a token's label so that it stands for itself wherever it is put.

    Recordings give legible labels already (`·Mary`, `↵`, `⟨E4 B8⟩`); what is left to do is the rare
    character that acts on its neighbours: a mark that combines, a sign that turns the direction.

    Example:
        >>> token_label("·Mary"), token_label("\u0301"), token_label("\u202e")
        ('·Mary', '◌́', '⟨U+202E⟩')
    """
    shown = visible(label)
    return f"◌{shown}" if unicodedata.category(shown[:1] or " ").startswith("M") else shown


def _seen(char: str) -> str:
    if char in "\n\t " or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}:
        return char
    return f"⟨U+{ord(char):04X}⟩"
