"""Which lines of the source compute what a hook sees, found in the source itself.

The model gives a value its name where it makes it: `z = self.hook_z(...)`. So the line is found by
reading the class that holds the hook point as a syntax tree, and with it the lines that made what
the call is given. Nothing here knows a line number.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Excerpt:
    """Hold some lines of one function.

    Attributes:
        file: its path from the folder of the package, "optlens/model.py".
        function: what the lines are part of, "OPTAttention.forward".
        lines: number in the file, text, and whether it names what was looked for.
    """

    file: str
    function: str
    lines: tuple[tuple[int, str, bool], ...]


def lines_calling(owner: type, attribute: str) -> list[Excerpt]:
    """Return the lines that call `self.<attribute>(...)`, with those that made its arguments.

    Where a class calls it in several places, the last one counts: what comes before it is the way
    for runs in which the value is edited.

    Args:
        owner: the class of the object that has the attribute.
        attribute: "hook_z", or the name of a module.

    Returns:
        One excerpt, and one more if the call takes the result of another class's method. Empty if
        the class calls it nowhere.

    Example:
        >>> from optlens.model import OPTDecoderLayer
        >>> [excerpt] = lines_calling(OPTDecoderLayer, "hook_resid_pre")
        >>> excerpt.function, excerpt.lines[0][1]
        ('OPTDecoderLayer.forward', 'resid_pre = self.hook_resid_pre(x)  # [batch, pos, d_model]')
    """
    for kind in owner.__mro__:
        if not kind.__module__.startswith("optlens."):
            continue
        found = list(_calls(kind, attribute))
        if found:
            function, statement = found[-1]
            lines = _with_arguments(function, statement, attribute)
            excerpt = _excerpt(kind, function, lines, attribute)
            return [excerpt, *_methods_called(kind, function, statement)]
    return []


@functools.cache
def _tree(kind: type) -> ast.ClassDef:
    """Return a class as a syntax tree, with the numbers that its lines have in their file."""
    source, first = inspect.getsourcelines(kind)
    tree = ast.parse(textwrap.dedent("".join(source)))
    ast.increment_lineno(tree, first - 1)
    return tree.body[0]


def _calls(kind: type, attribute: str) -> Iterator[tuple[ast.FunctionDef, ast.stmt]]:
    """Give the statements that call an attribute of self, with the function they stand in."""
    for function in _tree(kind).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for statement in ast.walk(function):
            simple = isinstance(statement, ast.stmt) and not hasattr(statement, "body")
            if simple and any(_is_call(node, attribute) for node in ast.walk(statement)):
                yield function, statement


def _is_call(node: ast.AST, attribute: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == attribute
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    )


def _with_arguments(function: ast.FunctionDef, statement: ast.stmt, attribute: str) -> set[int]:
    """Return the numbers of a statement's lines and of those that assign what the call is given."""
    calls = [node for node in ast.walk(statement) if _is_call(node, attribute)]
    inside = (node for call in calls for node in ast.walk(call))
    names = {node.id for node in inside if isinstance(node, ast.Name)} - {"self"}
    around = _blocks_around(function, statement)
    lines = set(_span(statement))
    for name in names:
        kept: list[set[int]] = []
        for assignment, block, condition in _assignments(function, name):
            if assignment.lineno >= statement.lineno:
                continue
            if id(block) in around:
                kept = [set(_span(assignment))]  # whatever stood before is overwritten
            elif condition is not None and ".edited" not in ast.unparse(condition.test):
                kept.append({*_span(assignment), *_header(condition, block)})
        lines = lines.union(*kept)
    return lines


def _span(statement: ast.stmt) -> range:
    return range(statement.lineno, statement.end_lineno + 1)


def _blocks(node: ast.AST) -> Iterator[tuple[list[ast.stmt], ast.AST]]:
    """Give every block of statements below a node, with what it is the block of."""
    for each in ast.walk(node):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(each, field, None)
            if isinstance(block, list) and block:
                yield block, each


def _blocks_around(function: ast.FunctionDef, statement: ast.stmt) -> set[int]:
    """Return the identities of the blocks that a statement stands in."""
    return {
        id(block)
        for block, _ in _blocks(function)
        if any(statement is inner for each in block for inner in ast.walk(each))
    }


def _assignments(
    function: ast.FunctionDef, name: str
) -> list[tuple[ast.stmt, list[ast.stmt], ast.If | None]]:
    """Return the assignments to a name in order, with their block and the `if` it belongs to."""
    found = [
        (each, block, owner if isinstance(owner, ast.If) else None)
        for block, owner in _blocks(function)
        for each in block
        if isinstance(each, ast.Assign)
        and any(
            isinstance(node, ast.Name) and node.id == name
            for target in each.targets
            for node in ast.walk(target)
        )
    ]
    return sorted(found, key=lambda entry: entry[0].lineno)


def _header(condition: ast.If, block: list[ast.stmt]) -> range:
    """Return the lines of `if ...:`, or that of its `else:`."""
    if block is condition.orelse:
        return range(block[0].lineno - 1, block[0].lineno)
    return range(condition.lineno, condition.test.end_lineno + 1)


def _methods_called(
    kind: type, function: ast.FunctionDef, statement: ast.stmt
) -> Iterator[Excerpt]:
    """Give the bodies of methods that the statement calls on arguments of classes of ours."""
    classes = {
        argument.arg: getattr(inspect.getmodule(kind), ast.unparse(argument.annotation), None)
        for argument in function.args.args
        if argument.annotation is not None
    }
    for node in ast.walk(statement):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        value = node.func.value
        owner = classes.get(value.id) if isinstance(value, ast.Name) else None
        if isinstance(owner, type):
            yield _method(owner, node.func.attr)


def _method(owner: type, name: str) -> Excerpt:
    """Return a method without its docstring."""
    function = next(
        each
        for each in _tree(owner).body
        if isinstance(each, ast.FunctionDef) and each.name == name
    )
    body = function.body[1:] if ast.get_docstring(function) else function.body
    lines = {function.lineno}.union(*(set(_span(each)) for each in body))
    return _excerpt(owner, function, lines, name)


def _excerpt(kind: type, function: ast.FunctionDef, numbers: set[int], named: str) -> Excerpt:
    path = Path(inspect.getsourcefile(kind)).resolve()
    text = path.read_text(encoding="utf-8").splitlines()
    chosen = sorted(numbers)
    shown = textwrap.dedent("\n".join(text[number - 1] for number in chosen)).split("\n")
    lines = tuple(
        (number, line, f"{named}(" in line) for number, line in zip(chosen, shown, strict=True)
    )
    file = path.relative_to(_PACKAGE.parent).as_posix()
    return Excerpt(file, f"{kind.__name__}.{function.name}", lines)
