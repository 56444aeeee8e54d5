"""Put the page about a sweep together, with the same frame and policy as that about a recording."""

from importlib.resources import files

from optlens.plots.style import STYLES, lightness, mix
from optlens.report import sweep_sections as sections
from optlens.report.markup import el
from optlens.report.page import document, stylesheet
from optlens.report.pieces import LEVELS
from optlens.report.sweep_facts import SweepFacts


def sweep_page(facts: SweepFacts) -> str:
    """Return a whole page about a sweep's result."""
    parts = [
        ("Measured", sections.measured(facts)),
        ("Prompts", sections.prompts(facts)),
        ("Result", sections.result(facts)),
        ("Strongest", sections.strongest(facts)),
        ("Provenance", sections.provenance(facts)),
    ]
    anchors = [(part.split('id="')[1].split('"')[0], name) for name, part in parts if part]
    body = [part for _, part in parts if part]
    return document(
        facts.title, [el("article", sections.header(facts, anchors), body)], sweep_stylesheet()
    )


def sweep_stylesheet() -> str:
    """Return the style sheet: that of recordings, the two-sided colours, `sweep.css`."""
    light, dark = (_variables(name) for name in ("light", "dark"))
    rules = [f":root{{{light}}}", f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"]
    rules += [
        f".{side}{level}{{background:var(--{side}{level});color:var(--{side}t{level})}}"
        for side in "du"
        for level in range(1, LEVELS + 1)
    ]
    sheet = files(__package__).joinpath("sweep.css").read_text(encoding="utf-8")
    return "\n".join([stylesheet(), *rules, sheet])


def _variables(name: str) -> str:
    """Return d1..d10 (below zero) and u1..u10 (above), and dt, ut, the text upon them.

    Half way up the ramps neither ink nor paper stands out enough; black or white always does.
    """
    look = STYLES[name]
    pairs = {"z0": look.paper}
    for side, sign in (("d", -1), ("u", 1)):
        for level in range(1, LEVELS + 1):
            ground = mix(look.diverging, 0.5 + sign * level / LEVELS / 2)
            pairs[f"{side}{level}"] = "#{:02x}{:02x}{:02x}".format(*ground)
            pairs[f"{side}t{level}"] = max(
                ("#000000", "#ffffff"), key=lambda color: abs(lightness(color) - lightness(ground))
            )
    return ";".join(f"--{key}:{value}" for key, value in pairs.items())
