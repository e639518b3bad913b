"""Whose code an exception came from: which of the user's functions, its line, and what it was called with."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from trl_entropy.tasks.named import described

# The files of TRL and of this package with a function that calls `get_reward` of environments.
_ASKING_ENVIRONMENTS = (("trainer", "grpo_trainer.py"), ("tasks", "completion_functions.py"))


def codes_of(function: Any) -> list[CodeType]:
    """The code of a function and of what it wraps, the innermost last; none of one in C."""
    found = []
    while function is not None:
        called = function if hasattr(function, "__code__") or inspect.isclass(function) else type(function).__call__
        if (code := getattr(called, "__code__", None)) is not None:
            found.append(code)
        inner = getattr(function, "func", None) if isinstance(function, functools.partial) else None
        function = inner or getattr(function, "__wrapped__", None)
    return found


def line_of_function(error: BaseException, function: Any, name: str) -> str:
    """
    The last line of the function's file that the error came from, `FILE, line N`; `name` where there is none.

    Of what asks environments for their reward it is the file of the environment.
    """
    file = next((code.co_filename for code in reversed(codes_of(function))), None)
    frames = traceback.extract_tb(error.__traceback__)
    if file is not None and Path(file).parts[-2:] in _ASKING_ENVIRONMENTS:
        last = max((place for place, frame in enumerate(frames) if frame.filename == file), default=-1)
        file = frames[last + 1].filename if last + 1 < len(frames) else file
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"{file}, line {lines[-1]}" if lines else name


def parts_of_episodes(tools: Iterable[Any], factories: Iterable[Any], kinds: Iterable[type] = ()) -> dict[str, Any]:
    """
    All that TRL calls in an episode, by the name for messages.

    Args:
        factories: of environments; a class stands for itself.
        kinds: the classes of environments that they have made.
    """
    factories = list(factories)
    found = {f"tool {_name_of(tool)}": tool for tool in tools}
    found |= {f"environment_factory {_name_of(made)}": made for made in factories if not inspect.isclass(made)}
    for kind in dict.fromkeys([*kinds, *filter(inspect.isclass, factories)]):
        methods = inspect.getmembers(kind, inspect.isfunction)
        found |= {f"environment {kind.__name__}.{name}": method for name, method in methods}
    return found


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


@contextmanager
def naming_what_fails(parts: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """
    Inside, an exception that comes out of one of these parts becomes a `ValueError` of one line: which part, where,
    what, and what it was called with.

    Args:
        parts: gives the parts by name, as [`parts_of_episodes`]; it is called when something has failed.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        told = _told(error, parts())
        if told is None:
            raise
        raise ValueError(told) from error


def _told(error: BaseException, parts: Mapping[str, Any]) -> str | None:
    """The line that names the part that failed; None if it was none of them."""
    by_code = {code: (name, part) for name, part in parts.items() for code in codes_of(part)}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code in by_code:
            name, part = by_code[frame.f_code]
            return f"{name}, {line_of_function(error, part, name)}: {described(error)}{_called_with(frame)}"
    return None


def _called_with(frame: FrameType) -> str:
    """The arguments of a call; those that are bound to nothing any more are left out."""
    names, more, keywords, values = inspect.getargvalues(frame)
    given = {name: values[name] for name in names if name in values and name != "self"}
    given |= values.get(keywords) or {} if keywords else {}
    given |= {more: values[more]} if more and values.get(more) else {}
    told = ", ".join(f"{name}={value!r:.120}" for name, value in given.items())
    return f", called with {told:.300}" if told else ""
