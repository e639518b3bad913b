"""Faults in the package's own code, planted while it runs, so that their file and line are those of the package."""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest


def plant(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], right: str, wrong: str) -> None:
    """Have `function` run with the text `wrong` in the place of `right`, which must occur in it once."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{right!r} occurs {source.count(right)} times in {function.__qualname__}"
    file = function.__code__.co_filename
    tree = ast.parse(source.replace(right, wrong))
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    module = compile(tree, file, "exec", flags=__future__.annotations.compiler_flag)
    code = next(each for each in module.co_consts if isinstance(each, CodeType) and each.co_name == function.__name__)
    monkeypatch.setattr(function, "__code__", code)
