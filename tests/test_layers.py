"""Imports point down only: a reader of one file never needs a file above it.

The order of the layers is the order of the table below. A module may import modules of its own layer and of those
below, never in a circle. Convenience methods that need a higher layer import it inside the function; DELEGATES lists
every one of them, so that adding one is a decision.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "optlens"

# Lowest first. An entry covers the module and everything inside it.
LAYERS = [
    {
        "activations",
        "config",
        "names",
        "hooks",
        "checks",
        "files",
        "kv_cache",
        "outputs",
        "staging",
        "linear",
        "progress",
        "footprint",
        "weight_sample",
        "quantized",
    }
    | {"attention_mask", "memory", "allocator", "demo", "logit_math", "prompt_words", "labels"}
    | {"window_log", "pinned"},
    {"cache", "tokenizer", "tokenizer_files", "weights", "inputs", "loss", "task_loss"},
    {"base", "model"},
    {"task_heads"},
    {"metric_targets", "bound_metric", "metrics", "prompt_set", "prompt_drafts", "prompts"},
    {"recording", "selection", "checkpoints", "summary"},
    {"interventions", "patching"},
    {"lens", "neurons", "comparison"},
    {"recorder"},
    {"capture", "evaluate"},
    {"generation"},
    {"circuits"},
    {"planning", "plan_inputs", "plan_runs", "plan_text"},
    {""},  # the package's own front: `optlens/__init__.py` gathers the public names
    {"report"},
    {"widgets"},
    {
        "demo.train",
        "demo.measure",
        "demo.fluency",
        "demo.card",
    },  # scripts: they run the finished package
    {
        "cli",
        "cli_convert",
        "cli_export",
        "cli_generate",
        "cli_patch",
        "cli_plan",
        "cli_tools",
        "__main__",
    },
]

# These import nothing of ours but their own parts: they can be lifted out of the package.
ALONE = {"plots", "demo"}

# function -> the higher module that it imports when it is called
DELEGATES = {
    "base.OPTBase.from_pretrained": "checkpoints",
    "task_heads.OPTForSequenceClassification.from_pretrained": "checkpoints",
    "base.OPTBase.save_pretrained": "checkpoints",
    "base.OPTBase.record": "capture",
    "base.OPTBase.generate": "generation",
    "base.OPTBase.stream": "generation",
    "base.OPTBase.intervene": "interventions",
    "base.OPTBase.summary": "summary",
    "recording.Recording.logit_lens": "lens",
    "recording.Recording.to_html": "report",
    "recording.Recording.show": "widgets",
    "patching.result.PatchResult.to_html": "report",
    "patching.result.PatchResult.show": "report",
}

# Peers are oracles of the tests and benchmarks; the package stands without them.
PEERS = {"transformers", "transformer_lens", "nnsight", "circuitsvis", "peft"}

# What `import optlens` must not pull in, so that it stays light.
HEAVY = ["matplotlib", "ipywidgets", "anywidget", "IPython", "huggingface_hub", "transformers"]
HEAVY += ["accelerate", "bitsandbytes"]


@dataclass(frozen=True)
class Import:
    """One import statement's target as seen from the module and function that it stands in."""

    module: str  # dotted, without the leading "optlens."
    function: str  # dotted path inside the module; "" at module level
    target: str
    typing_only: bool

    def __str__(self) -> str:
        where = f"optlens.{self.module}".rstrip(".")
        inside = f", inside {self.function}" if self.function else ""
        return f"{where} imports {self.target}{inside}"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    """Return the absolute dotted names that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        here = f"optlens.{module}".rstrip(".").split(".")
        up = node.level - 1 if is_package else node.level
        base = ".".join(here[: len(here) - up] + ([node.module] if node.module else []))
    # `from optlens.lens import logit_lens` may name a module or something inside one
    names = [f"{base}.{alias.name}" for alias in node.names]
    known = {f"optlens.{name}".rstrip(".") for name in MODULES}
    return [name if name in known else base for name in names]


def is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_of(module: str, path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, function: str, inside_function: bool, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target in imported_names(child, module, path.name == "__init__.py"):
                    place = function if inside_function else ""
                    found.append(Import(module, place, target, typing_only))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                deeper = not isinstance(child, ast.ClassDef) or inside_function
                visit(child, f"{function}.{child.name}".lstrip("."), deeper, typing_only)
            else:
                visit(child, function, inside_function, typing_only or is_typing_guard(child))

    visit(ast.parse(path.read_text(encoding="utf-8")), "", False, False)
    return found


IMPORTS = [found for module, path in MODULES.items() for found in imports_of(module, path)]
OWN = [found for found in IMPORTS if found.target.split(".")[0] == "optlens"]


def covering(module: str, entries: set[str]) -> str | None:
    """Return the longest entry that covers a module, None when no entry does."""
    inside = [
        name for name in entries if module == name or (name and module.startswith(name + "."))
    ]
    return max(inside, key=len, default=None)


def layer_of(module: str) -> int | None:
    """Return a module's layer number, None for `plots`, which stands aside."""
    entry = covering(module, set().union(*LAYERS))
    return next((number for number, layer in enumerate(LAYERS) if entry in layer), None)


def points_up(found: Import) -> bool:
    source, target = (
        layer_of(found.module),
        layer_of(found.target.removeprefix("optlens").lstrip(".")),
    )
    return target is not None and source is not None and target > source


def is_listed(found: Import) -> bool:
    """Say whether DELEGATES allows an arrow that points up.

    A module that holds delegates may also name, for annotations only, the types that they return.
    """
    if found.typing_only:
        return any(delegate.startswith(f"{found.module}.") for delegate in DELEGATES)
    target = found.target.removeprefix("optlens.")
    return DELEGATES.get(f"{found.module}.{found.function}") == target


def test_every_module_has_a_layer():
    homeless = [
        name for name in MODULES if layer_of(name) is None and covering(name, ALONE) is None
    ]
    assert homeless == [], "add these to LAYERS, as low as they can stand"


def test_every_layer_names_existing_modules():
    assert set().union(*LAYERS) - set(MODULES) == set()


def test_no_import_points_up():
    wrong = [str(found) for found in OWN if points_up(found) and not is_listed(found)]
    assert wrong == []


def test_every_listed_delegate_exists():
    """A delegate that went away leaves the list, or the list would allow a new arrow in silence."""
    seen = {f"{found.module}.{found.function}" for found in OWN if is_listed(found)}
    assert set(DELEGATES) - seen == set()


def test_delegates_do_no_work_of_their_own():
    """Higher layers hold the work; a method that borrows it from them stays a doorway."""
    for delegate in DELEGATES:
        module = covering(delegate, set(MODULES) - {""})
        node = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        for name in delegate.removeprefix(module + ".").split("."):
            node = next(child for child in node.body if getattr(child, "name", None) == name)
        body = [
            statement
            for statement in node.body
            if not isinstance(statement, ast.Import | ast.ImportFrom)
            and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        ]
        # the call, and at most one preparation before it
        assert len(body) <= 2, f"{delegate} does work of its own: {len(body)} statements"


def test_plots_imports_nothing_of_ours():
    """A figure is drawn from arrays and labels, whoever made them."""
    borrowed = [str(found) for found in OWN if covering(found.module, {"plots"})]
    assert [text for text in borrowed if "imports optlens.plots" not in text] == []


def test_demo_front_imports_nothing_of_ours():
    """`optlens.demo.path()` answers without loading the scripts that made the checkpoint."""
    assert [str(found) for found in OWN if found.module == "demo"] == []


def test_module_level_imports_have_no_circle():
    arrows: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in OWN:
        target = found.target.removeprefix("optlens").lstrip(".")
        if not found.function and not found.typing_only and target != found.module:
            arrows[found.module].add(target)

    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for target in sorted(arrows.get(module, ())):
                # a package's own front imports its parts: that is no circle by itself
                if not target.startswith(module + ".") or module not in arrows.get(target, ()):
                    walk(target, [*trail, module])
            done.add(module)

    for module in MODULES:
        walk(module, [])


def test_the_package_never_imports_its_peers():
    wrong = [str(found) for found in IMPORTS if found.target.split(".")[0] in PEERS]
    assert wrong == []


def test_import_is_light():
    """A notebook's first cell waits for this import; figures and downloads are loaded when used."""
    code = f"import optlens, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plots_are_there_when_asked_for():
    code = (
        "import optlens, sys; early = 'optlens.plots' in sys.modules; "
        "print(early, optlens.plots.attention_head.__name__, hasattr(optlens, 'plot'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False attention_head False"
