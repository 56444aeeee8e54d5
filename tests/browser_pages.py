"""Chromium as the tests of pages use it: whether it is there, one browser, pages that report on themselves."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [
    name
    for name, found in (("playwright", find_spec("playwright")), ("chromium", CHROMIUM))
    if not found
]
THEMES = ("light", "dark")


def skip_without(missing: list[str]) -> pytest.MarkDecorator:
    """Skip where a tool is missing, except on CI: there that is a failure, no reason to test less."""
    skips = bool(missing) and os.environ.get("CI") != "true"
    return pytest.mark.skipif(skips, reason=f"needs {' and '.join(missing)}")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert MISSING == [], "CI must have what these tests need"
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def visits(browser: Any, **always: Any) -> Iterator[Callable[..., Any]]:
    """Give a function that opens an address and collects what the page does there.

    Its `complaints` are what it says to the console, its `asked` the addresses that it asks for;
    `stopped`, a variable in the page, lists what its policy stops. `always` goes to every context.
    """
    contexts = []

    def open_page(address: str, width: int, theme: str, **options: Any) -> Any:
        size = {"width": width, "height": 900}
        options = {"viewport": size, "color_scheme": theme} | always | options
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.complaints, page.asked = [], []
        page.add_init_script(
            "window.stopped = []; addEventListener('securitypolicyviolation', "
            "(event) => stopped.push(event.violatedDirective))"
        )
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()


def rgb(color: str) -> str:
    """Return "#rrggbb" as a browser writes it."""
    return f"rgb({int(color[1:3], 16)}, {int(color[3:5], 16)}, {int(color[5:7], 16)})"
