"""What is made twice from the same must be the same, byte by byte."""

from collections.abc import Callable
from pathlib import Path

from optlens.widgets.view import View


def same_when_made_again(make: Callable[[], View], folder: Path) -> View:
    """Make a view twice; check that page, picture, name and plain markup are the same; return one."""
    views = [make(), make()]
    written = []
    for view in views:
        view.to_html(folder / "page")
        view.to_svg(folder / "picture.svg")
        files = (folder / "page").read_bytes(), (folder / "picture.svg").read_bytes()
        written.append((files, repr(view), view._repr_mimebundle_()[0]["text/html"]))
    assert written[0] == written[1]
    return views[0]


def has_three_pictures(view: View, folder: Path) -> None:
    """Check that a view's picture, the dark one and that of a place alone are written and differ."""
    pictures = []
    for options in ({}, {"style": "dark"}, {"detail": True}):
        view.to_png(folder / "picture.png", **options)
        pictures.append((folder / "picture.png").read_bytes())
    assert pictures[0].startswith(b"\x89PNG") and len(set(pictures)) == 3
