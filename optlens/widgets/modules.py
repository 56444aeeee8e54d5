"""Join the ES modules of a view to one, since a browser that gets a module as text cannot import more.

The files in `js/` are plain modules that import each other by relative paths: tests import them as
they are, nothing is built. Here the files that a view needs are put one after the other, imports
first, without the lines that import and without the word `export`. That is only right for a simple
dialect, and whatever is outside it raises: default and renamed imports, circles, one name in two files.
"""

import functools
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "js"

_IMPORT = re.compile(r'^import\s*\{([^}]*)\}\s*from\s*"(\./[\w.-]+\.js)";\n', re.MULTILINE)
_ANY_IMPORT = re.compile(r"^\s*(?:import\b|export\s+(?:default|\{|\*))", re.MULTILINE)
_DYNAMIC = re.compile(r"\bimport\s*\(|\bimport\.meta\b")
_EXPORT = re.compile(r"^export (?=(?:async )?function|const|let|class)", re.MULTILINE)
_NAME = re.compile(
    r"^(?:export )?(?:async )?(?:function\*?|const|let|class) ([\w$]+)", re.MULTILINE
)


class ModuleError(ValueError):
    """JavaScript files that cannot be joined; the message names file and line."""


def joined(*entries: str, folder: Path = FOLDER) -> str:
    """Return the text of modules and all that they import, each once, what is imported first.

    Args:
        entries: file names in `folder`.
        folder: where the modules lie.

    Raises:
        ModuleError: if a file uses more of the language than can be joined.
    """
    texts: dict[str, str] = {}
    names: dict[str, str] = {}

    def visit(file: str, trail: tuple[str, ...]) -> None:
        if file in trail:
            raise ModuleError(f"circle of imports: {' -> '.join([*trail, file])}")
        if file in texts:
            return
        source = (folder / file).read_text(encoding="utf-8")
        exported = {file: _exports(source)}
        for wanted, path in _IMPORT.findall(source):
            other = path.removeprefix("./")
            visit(other, (*trail, file))
            exported[other] = _exports((folder / other).read_text(encoding="utf-8"))
            for name in filter(None, map(str.strip, wanted.split(","))):
                if name not in exported[other]:
                    raise ModuleError(f"{file} imports {name!r}, which {other} does not export")
        body = _IMPORT.sub("", source)
        strange = _ANY_IMPORT.search(body) or _DYNAMIC.search(body)
        if strange:
            line = source[: source.index(strange[0])].count("\n") + 1
            raise ModuleError(f"{file}, about line {line}: cannot join {strange[0].strip()!r}")
        for name in _NAME.findall(body):
            if name in names:
                raise ModuleError(f"{name!r} is defined in {names[name]} and in {file}")
            names[name] = file
        texts[file] = f"// ---- {file}\n{_EXPORT.sub('', body)}"

    for entry in entries:
        visit(entry, ())
    return "\n".join(texts.values())


@functools.cache
def view_module(*kinds: str) -> str:
    """Return the module of a view that shows parts of these kinds, as anywidget takes it."""
    table = ", ".join(f"{kind}: {kind}View" for kind in kinds)
    entry = (
        "export default {\n  render(given) {\n    "
        f"return renderOrTell(given, {{ {table} }});\n  }},\n}};\n"
    )
    return f"{joined(*(f'{kind}.js' for kind in kinds), 'shell.js')}\n{entry}"


@functools.cache
def page_module(*kinds: str) -> str:
    """Return the module of a page that shows such parts without Python."""
    table = ", ".join(f"{kind}: {kind}View" for kind in kinds)
    parts = joined(*(f"{kind}.js" for kind in kinds), "shell.js", "standin.js")
    return f"{parts}\nstartPage(document, (given) => renderOrTell(given, {{ {table} }}));\n"


@functools.cache
def notebook_module(*kinds: str) -> str:
    """Return the module of a notebook's page, which draws such parts wherever they stand."""
    table = ", ".join(f"{kind}: {kind}View" for kind in kinds)
    parts = joined(*(f"{kind}.js" for kind in kinds), "shell.js", "notebook.js")
    return f"{parts}\nstartNotebook(document, (given) => renderView(given, {{ {table} }}));\n"


def _exports(source: str) -> set[str]:
    return {
        match[1]
        for match in re.finditer(
            r"^export (?:async )?(?:function\*?|const|let|class) ([\w$]+)", source, re.MULTILINE
        )
    }
