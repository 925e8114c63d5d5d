"""What has no docstring, as it is written in the file: every object inherits one at run time."""

import ast
from collections.abc import Iterator
from pathlib import Path

Scope = ast.Module | ast.ClassDef
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def undocumented(path: Path) -> list[str]:
    """Public classes, functions, methods and constants of a file that have no docstring.

    A constant's or an attribute's is the string below it; an attribute may also have its line,
    `name: ...`, in the docstring of its class.
    """
    return list(_undocumented(ast.parse(path.read_text(encoding="utf-8")), ""))


def names(path: Path) -> set[str]:
    """Top-level classes, functions and constants that a file defines."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = {node.name for node in body if isinstance(node, Definition)}
    return found.union(*map(_assigned, body))


def _undocumented(scope: Scope, prefix: str) -> Iterator[str]:
    of_scope = ast.get_docstring(scope) or ""
    for node, following in zip(scope.body, [*scope.body[1:], None], strict=True):
        if isinstance(node, Definition) and not node.name.startswith("_"):
            is_overload = any(ast.unparse(d) == "overload" for d in node.decorator_list)
            if not is_overload and not (ast.get_docstring(node) or "").strip():
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _undocumented(node, f"{prefix}{node.name}.")
        elif not _is_text(following):
            for name in _assigned(node):
                in_class = isinstance(scope, ast.ClassDef) and _has_line(of_scope, name)
                if not name.startswith("_") and not in_class:
                    yield prefix + name


def _assigned(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def _is_text(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and bool(node.value.value.strip())
    )


def _has_line(docstring: str, name: str) -> bool:
    return any(line.strip().startswith(f"{name}:") for line in docstring.splitlines())
