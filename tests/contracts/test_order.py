"""Nothing depends on the order of a set, which differs with PYTHONHASHSEED: neither sums nor the order of keys."""

import ast
from pathlib import Path

import pytest

import trl_entropy

PACKAGE = Path(trl_entropy.__file__).parent
WITHOUT_ORDER = {"sorted", "any", "all", "set", "frozenset", "min", "max", "len"}
KEEPS_ORDER = {"list", "tuple", "join", "enumerate", "sum", "fromkeys"}


def _name(call: ast.AST) -> str:
    if not isinstance(call, ast.Call):
        return ""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def is_set(node: ast.AST) -> bool:
    """Whether the expression itself says that it is a set; a name that stands for one is not seen."""
    if isinstance(node, ast.Set | ast.SetComp) or _name(node) in ("set", "frozenset"):
        return True
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.BitAnd | ast.BitOr | ast.BitXor):
        return any(is_set(side) or _name(side) == "keys" for side in (node.left, node.right))
    methods = ("difference", "union", "intersection", "symmetric_difference")
    return _name(node) in methods and is_set(node.func.value)


def loops_over_sets(source: str) -> list[int]:
    """Lines on which a set's order gets into a loop, a list, a text or a sum."""
    tree, found = ast.parse(source), []
    harmless = {id(part) for node in ast.walk(tree) if _name(node) in WITHOUT_ORDER for part in node.args}
    for node in ast.walk(tree):
        iterables = [node.iter] if isinstance(node, ast.For) else []
        if isinstance(node, ast.ListComp | ast.DictComp | ast.GeneratorExp) and id(node) not in harmless:
            iterables = [generator.iter for generator in node.generators]
        if _name(node) in KEEPS_ORDER:
            iterables = node.args
        found += [node.lineno for iterable in iterables if is_set(iterable)]
    return found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("for x in a.keys() - b: pass", [1]),
        ("y = {x: 1 for x in {f(z) for z in a}}", [1]),
        ("', '.join(set(a))", [1]),
        ("y = sum(x for x in set(a).difference(b))", [1]),
        ("y = sorted(set(a)); z = any(x for x in {1, 2}); w = {x for x in set(a)}", []),
        ("for x in sorted(a.keys() - b): pass", []),
    ],
)
def test_what_is_found(source, lines):
    assert loops_over_sets(source) == lines


def test_no_loop_of_the_package_runs_over_a_set():
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        for line in loops_over_sets(path.read_text())
    }
    assert not found, "loop over a dict, or over sorted(...)"
