"""Show a recorded prompt as plain text: the next token, and the logit lens at the last position.

The text fits the terminal: as many guesses per layer as its width allows, in ASCII where its
encoding knows no more, and in colour only when asked. Tokens are legible labels, so nothing that a
prompt holds can move the cursor or ring the bell.
"""

import unicodedata

from optlens.plots.draw import percent
from optlens.report.facts import Facts

BOLD, DIM, WARM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[33m", "\x1b[0m"
_ASCII = {
    "·": "_",
    "↵": "\\n",
    "⇥": "\\t",
    "∅": "''",
    "⟨": "<",
    "⟩": ">",
    "█": "#",
    "…": "~",
    "─": "-",
}
_WORD = 12  # columns of a token in the table
_CELL = _WORD + 10  # with its probability and the gap to the next


def text_of(facts: Facts, width: int = 80, color: bool = False, encoding: str = "utf-8") -> str:
    """Return what a terminal shows of one prompt, ending with a line break.

    Args:
        facts: what was recorded.
        width: columns of the terminal; lines keep within it from 40 on.
        color: whether to mark with ANSI escapes.
        encoding: what the terminal is written in; characters that it lacks become ASCII.
    """
    parts = [_prompt(facts, width)]
    if facts.lens is None:
        parts.append("The logit lens was not recorded.\n")
    else:
        if facts.answer is not None:
            parts.append(_next(facts, width))
        parts.append(_table(facts, width))
    return finished("\n".join(parts), color, encoding)


def finished(text: str, color: bool, encoding: str) -> str:
    """Return marked text as the terminal takes it: without marks if it shows no colour."""
    if not color:
        for code in (BOLD, DIM, WARM, PLAIN):
            text = text.replace(code, "")
    return encodable(text, encoding)


def token_lines(name: str, labels: list[str], width: int) -> list[str]:
    """Return the tokens of a prompt, separated so that each can be told from the next."""
    lines, line = [], f"{name:<9}"
    for label in labels:
        label = f" {cut(label, width - 12)}"
        if columns(line + label) > width:
            lines.append(line)
            line = " " * 9
        line += label
    return [*lines, line]


def _prompt(facts: Facts, width: int) -> str:
    """Return the tokens of the prompt and what they went through."""
    lines = token_lines("Prompt", facts.tokens, width)
    count = len(facts.tokens)
    tokens = "1 token" if count == 1 else f"{count} tokens"
    size = f"{tokens} through {facts.shape}"
    return "\n".join([*lines, size.rjust(len(size) + min(10, max(0, width - len(size)))), ""])


def _next(facts: Facts, width: int) -> str:
    """Return the most likely next tokens with bars."""
    lines = [f"{BOLD}What comes next{PLAIN}"]
    room = max(width - _WORD - 14, 4)
    for rank, (word, share) in enumerate(zip(facts.answer.words, facts.answer.probs, strict=True)):
        bar = "█" * round(float(share) * min(room, 40))
        line = f"  {padded(word, _WORD)}{percent(float(share)):>8}  {bar}".rstrip()
        lines.append(f"{WARM}{line}{PLAIN}" if rank == 0 else line)
    return "\n".join([*lines, ""])


def _table(facts: Facts, width: int) -> str:
    """Return the best guesses at the last recorded position, a line for each layer."""
    lens, answer = facts.lens, facts.answer
    names = max(5, *map(len, lens.rows)) + 2
    ranks = 7 if answer is not None else 0
    count = max(1, min(lens.ids.shape[-1], (width - names - ranks) // _CELL))
    where = (
        "the last token"
        if facts.positions[-1] == len(facts.tokens) - 1
        else f"position {facts.positions[-1]}"
    )
    head = f"{'after':<{names}}" + "".join(
        f"{'best guess' if place == 0 else place + 1!s:<{_CELL}}" for place in range(count)
    )
    if answer is not None:
        head = f"{head}{'rank':>{ranks - 2}}"
    lines = [
        f"{BOLD}Logit lens at {where}: what it would say if it stopped after each layer{PLAIN}"
        if width >= 74
        else f"{BOLD}Logit lens at {where}{PLAIN}",
        f"{DIM}{head}{PLAIN}",
    ]
    for row, name in enumerate(lens.rows):
        line = f"{name:<{names}}"
        for place in range(count):
            word, share = lens.words[row][-1][place], float(lens.probs[row, -1, place])
            cell = f"{padded(word, _WORD)}{percent(share):>8}  "
            is_answer = answer is not None and word == answer.words[0]
            mark = WARM if is_answer else DIM if share < 0.05 else ""
            line += f"{mark}{cell}{PLAIN}" if mark else cell
        if answer is not None:
            rank = int(answer.row_ranks[row])
            line += f"{rank + 1 if rank >= 0 else '>' + str(len(answer.words)):>{ranks - 2}}"
        lines.append(line.rstrip())
    if answer is not None:
        lines.append(f"{DIM}rank: of {cut(answer.words[0], width - 28)}, the final answer{PLAIN}")
    return "\n".join([*lines, ""])


def columns(text: str) -> int:
    """Return how many columns of a terminal text takes; wide characters take two.

    Example:
        >>> columns("a中")
        3
    """
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def cut(text: str, room: int) -> str:
    """Return text within `room` columns, its end replaced by an ellipsis where it was longer."""
    if columns(text) <= room:
        return text
    while text and columns(text) > room - 1:
        text = text[:-1]
    return text + "…"


def padded(text: str, room: int) -> str:
    """Return text cut or filled to exactly `room` columns."""
    text = cut(text, room)
    return text + " " * (room - columns(text))


def encodable(text: str, encoding: str) -> str:
    """Return text that the encoding can write: signs in ASCII, other characters escaped.

    Example:
        >>> encodable("·cat", "ascii")
        '_cat'
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = "".join(_ASCII.get(char, char) for char in text)
        return plain.encode(encoding, "backslashreplace").decode(encoding)
    return text
