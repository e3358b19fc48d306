"""How many values a module returns, read from its code: what takes its place must return as many."""

import ast
import inspect
import textwrap

from torch import nn


def returned(module: nn.Module) -> int | None:
    """How many values the module returns in a tuple, None for a bare tensor.

    Read from its last return statement, because annotations are often out of date.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    value = max((n for n in ast.walk(tree) if isinstance(n, ast.Return)), key=lambda node: node.lineno).value
    if not isinstance(value, ast.Name):
        return _length(value)
    sets = [
        _length(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == value.id for t in node.targets)
    ]
    lengths = [length for length in sets if length is not None]
    return lengths[-1] + _added(tree, value.id) if lengths else None


def _length(value: ast.expr | None) -> int | None:
    if isinstance(value, ast.Tuple | ast.List):
        return len(value.elts)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        sides = [_length(value.left), _length(value.right)]
        return None if sides == [None, None] else 2  # what is added may be empty, and is never unpacked
    return _length(value.body) if isinstance(value, ast.IfExp) else None


def _added(tree: ast.AST, name: str) -> int:
    """How many values `name += (...)` adds in any case: where only one branch of an `if` does it, it is left out."""

    def of(statements: list[ast.stmt]) -> int:
        total = 0
        for node in statements:
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                total += _length(node.value) or 0
            elif isinstance(node, ast.If) and node.orelse:
                total += min(of(node.body), of(node.orelse))
        return total

    return sum(of(node.body) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
