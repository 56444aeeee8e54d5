"""Put the page together: one HTML file that loads nothing and may run nothing but its own script.

The page states its own policy (`default-src 'none'`): styles inline, pictures from data URIs, and
the one inline script by its hash. It holds no time, no random number and no path of this machine,
so the same recording gives the same bytes.
"""

import base64
import hashlib
from importlib.resources import files

from optlens.plots.style import STYLES, lightness, mix
from optlens.report import sections
from optlens.report.facts import Facts
from optlens.report.markup import Html, el, visible
from optlens.report.pieces import LEVELS

# What figures do not have: the page around them, links, and a warm mark for "this one".
_AROUND = {
    "light": {"page": "#f7f6f2", "link": "#1d5091", "warm": "#b34d09"},
    "dark": {"page": "#0e1114", "link": "#8fc1ec", "warm": "#f08c3c"},
}


def html_page(prompts: list[Facts]) -> str:
    """Return a whole page about one or more recorded prompts."""
    title = visible(" ".join(prompts[0].prompt.split()))
    alone = len(prompts) == 1
    body = [_article(facts, "" if alone else f"-{number}") for number, facts in enumerate(prompts)]
    return document(title, body, stylesheet())


def document(title: str, body: list[Html], sheet: str) -> str:
    """Return a whole page with its policy and the one script.

    Args:
        title: what the browser's tab says; cut where it is long.
        body: the articles.
        sheet: the style sheet.
    """
    script = files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    head = page_head(title, policy, sheet)
    foot = el("footer", "Made by optlens. This page loads nothing and sends nothing.")
    # The script is part of the policy, so it is written as it was hashed.
    page = el(
        "html", head, el("body", el("main", body), foot, el("script", Html(script))), lang="en"
    )
    return f"<!DOCTYPE html>\n{page}\n"


def page_head(title: str, policy: str, sheet: str) -> Html:
    """Return the head of a page that stands alone.

    Args:
        title: what the browser's tab says; cut where it is long.
        policy: the content security policy.
        sheet: the style sheet.
    """
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title[:60]}{'…' if len(title) > 60 else ''} · optlens"),
        el("link", rel="icon", href="data:,"),
        el("style", Html(sheet)),
    )


def digest(text: str) -> str:
    """Return the hash by which a policy allows a script or a style sheet."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def stylesheet() -> str:
    """Return the style sheet: the colours of both themes, the colour classes, `page.css`."""
    light, dark = (_variables(name) for name in ("light", "dark"))
    rules = [f":root{{{light}}}", f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"]
    for kind in "pek":
        on = f".by-{kind}:checked~"
        rules += [
            f"{on}.scroll .{kind}{level}{{background:var(--b{level});color:var(--t{level})}}"
            for level in range(LEVELS + 1)
        ]
        rules.append(f"{on}.scroll td small.{kind}{{display:block}}")
        rules.append(f"{on}.choose .for-{kind}{{background:var(--ink);color:var(--page)}}")
        rules.append(
            f".by-{kind}:focus-visible~.choose .for-{kind}{{outline:2px solid var(--link)}}"
        )
        rules.append(f".by-{kind}:not(:checked)~.legend .key-{kind}{{display:none}}")
    rules += [
        f".n{level}{{background:var(--b{level});color:var(--t{level})}}"
        for level in range(LEVELS + 1)
    ]
    sheet = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join([rules[0], rules[1], sheet, *rules[2:]])


def around(name: str) -> dict[str, str]:
    """Return a theme's colours that figures do not have: the page, links, the mark."""
    return _AROUND[name]


def _variables(name: str) -> str:
    """Return the theme's colours: b0..b10 are grounds of cells, t0..t10 the text upon them."""
    look = STYLES[name]
    pairs = {k: getattr(look, k) for k in ("paper", "ink", "muted", "rule", "masked")}
    pairs |= around(name)
    for level in range(LEVELS + 1):
        ground = mix(look.ramp, level / LEVELS)
        text = max(
            (look.ink, look.paper), key=lambda color: abs(lightness(color) - lightness(ground))
        )
        pairs[f"b{level}"] = "#{:02x}{:02x}{:02x}".format(*ground)
        pairs[f"t{level}"] = text
    return ";".join(f"--{key}:{value}" for key, value in pairs.items())


def _article(facts: Facts, key: str) -> Html:
    """Return everything about one prompt; `key` keeps the anchors of several apart."""
    parts = [
        ("Tokens", sections.prompt_tokens(facts, key)),
        ("Next token", sections.next_and_trace(facts, key)),
        ("Logit lens", sections.lens_table(facts, key)),
        ("Attention", sections.attention(facts, key)),
        ("Residual stream", sections.residual(facts, key)),
        ("Provenance", sections.provenance(facts, key)),
    ]
    shown = [(name, part) for name, part in parts if part is not None]
    anchors = [(part.split('id="')[1].split('"')[0], name) for name, part in shown]
    return el("article", sections.header(facts, anchors), [part for _, part in shown])
