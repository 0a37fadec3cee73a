"""The package as a house: imports go one way, files and signatures stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexjag
from flexjag.ops.register import OPERATORS

ROOT = Path(flexjag.__file__).parents[1]
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted((ROOT / "flexjag").rglob("*.py"))}
TREES = {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in FILES.items()}
PACKAGES = {name.removesuffix(".__init__") for name in FILES if name.endswith(".__init__")}
MOST_LINES, MOST_PARAMETERS = 400, 8


def at_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run, or that type checkers read, when a module is imported: not those inside functions."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from at_import(child)


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, those under ``TYPE_CHECKING`` included."""
    found: set[str] = set()
    for statement in at_import(TREES[name]):
        if isinstance(statement, ast.Import):
            found |= {x.name for x in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module is not None:
            inside = {f"{statement.module}.{x.name}" for x in statement.names}
            found |= {x if x in TREES else statement.module for x in inside}
    return {x for x in found if x in TREES} - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert not circles({name: imports(name) for name in TREES})


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_long(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= MOST_LINES


def is_exempt(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> bool:
    """Triton's kernels take pointers and strides, operators and their kernels a flat schema; FBGEMM's are its own."""
    decorators = " ".join(ast.unparse(x) for x in function.decorator_list)
    is_operator = any(word in decorators for word in ("jit", "custom_op", "define(", "register_")) or (
        name.startswith("flexjag.ops") and function.name in OPERATORS
    )
    return is_operator or "fbgemm" in name


@pytest.mark.parametrize("name", TREES)
def test_no_function_takes_many_parameters(name: str) -> None:
    many = []
    for one in ast.walk(TREES[name]):
        if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_exempt(one, name):
            a = one.args
            count = len([x for x in (*a.posonlyargs, *a.args) if x.arg not in ("self", "cls")])
            many += [f"{one.name} takes {count}"] if count > MOST_PARAMETERS else []
    assert not many
