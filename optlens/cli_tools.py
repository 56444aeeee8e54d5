"""What the commands share: reading prompts, checking files, saying what is being done."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Screen:
    """Hold how standard output is written: columns, whether in colour, and the encoding."""

    width: int
    color: bool
    encoding: str


def screen() -> Screen:
    """Find out how standard output is to be written."""
    width = max(shutil.get_terminal_size((80, 24)).columns, 40)
    # https://no-color.org: any value that is not empty turns colour off
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return Screen(width, color, sys.stdout.encoding or "ascii")


def check_targets(targets: dict[str, str | None]) -> None:
    """Refuse, before anything is loaded, files that could not be written in the end."""
    taken: dict[str, str] = {}
    for option, path in targets.items():
        if path is None:
            continue
        if not path:
            raise ValueError(f'{option} "": name a file to write')
        if os.path.isdir(path):
            raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
        target = os.path.realpath(path)
        if not os.path.isdir(os.path.dirname(target)):
            raise FileNotFoundError(f"cannot write {path}: its folder does not exist; create it")
        if target in taken:
            raise ValueError(f"{taken[target]} and {option} name one file, {path}: choose two")
        taken[target] = option


def read_text(given: str, name: str = "prompt") -> str:
    """Return a prompt, read from the input if it is `-`.

    Args:
        given: What was given as the argument.
        name: What to call it in an error.
    """
    try:
        prompt = sys.stdin.read().rstrip("\n") if given == "-" else given
        prompt.encode("utf-8")  # Python may have put half characters for bytes that it cannot read
    except UnicodeError as error:
        what = "input" if given == "-" else name
        raise ValueError(
            f"the {what} is not UTF-8 text: convert it first, as iconv does"
        ) from error
    if not prompt:
        raise ValueError(f"the {name} is empty: give some text, in quotes")
    return prompt


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done, and afterwards how long it took."""
    print(f"optlens: {what} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"optlens: {what}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
