"""The style sheet of all views: the colours of both themes, then `view.css`, then those of single views.

The colours are those of figures and pages, from one table. JavaScript reads them from here too
(`--ol-ramp`), so a canvas follows the theme as everything else does.
"""

import functools
from pathlib import Path

from optlens.plots.style import STYLES
from optlens.report.page import around

# Who decides on the theme: the notebook where it says so, else what the system asks for.
_HOST_LIGHT = 'body[data-jp-theme-light="true"], body.vscode-light'
_HOST_DARK = 'body[data-jp-theme-light="false"], body.vscode-dark'


@functools.cache
def stylesheet() -> str:
    """Return the sheet; every class begins with `ol-` and stays inside the root class `.ol`."""
    first = Path(__file__).with_name("view.css")
    others = sorted(path for path in first.parent.glob("*.css") if path != first)
    sheet = "\n".join(path.read_text(encoding="utf-8") for path in (first, *others))
    light, dark = (variables(name) for name in ("light", "dark"))
    return "\n".join(
        [
            f".ol{{color-scheme:light;{light}}}",
            f"@media screen and (prefers-color-scheme:dark){{.ol{{color-scheme:dark;{dark}}}}}",
            f":is({_HOST_LIGHT}) .ol{{color-scheme:light;{light}}}",
            f"@media screen{{:is({_HOST_DARK}) .ol{{color-scheme:dark;{dark}}}}}",
            sheet,
        ]
    )


def variables(name: str) -> str:
    """Return a theme's colours as CSS variables."""
    look = STYLES[name]
    values = {key: getattr(look, key) for key in ("paper", "ink", "muted", "rule", "masked")}
    values |= around(name)
    values |= {key: " ".join(getattr(look, key)) for key in ("ramp", "diverging", "series")}
    values |= {"stops": ",".join(look.ramp), "both-stops": ",".join(look.diverging)}
    values["bar"] = look.ramp[1]  # light enough for ink upon it
    return ";".join(f"--ol-{key}:{value}" for key, value in values.items())
