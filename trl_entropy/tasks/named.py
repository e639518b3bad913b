"""
Functions that a setting names: those of a table, `package.module:function`, or `path/to/file.py:function`.

Importing a file runs it, so only what the user's own settings name is imported; see [`Named.of_user`].
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

# How the names of files end that hold rows and no functions.
DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zip")


@dataclass(frozen=True)
class Named:
    """
    What a setting names.

    Attributes:
        name: as in the settings, a file by its absolute path.
        value: the function, or whatever stands there.
        file: the file that was imported for it; None for what this package or TRL ships.
    """

    name: str
    value: Any
    file: Path | None = None

    @property
    def short(self) -> str:
        """Its own name, by which TRL logs it."""
        return self.name.rpartition(":")[2].rpartition(".")[2] if self.file else self.name


def is_of_user(name: str) -> bool:
    """Whether a name stands for a file or a module to import, and for nothing that this package or TRL ships."""
    return ":" in name or ("." in name and "/" not in name and Path(name).suffix.lower() not in DATA_FILES)


def absolute(name: str) -> str:
    """`path/to/file.py:function` with the absolute path of the file, so that it is found from everywhere."""
    path, mark, function = name.rpartition(":")
    return f"{Path(path).expanduser().resolve()}:{function}" if mark and path.endswith(".py") else name


def named(setting: str, name: str, shipped: Mapping[str, Callable[[], Any]]) -> Named:
    """
    What `name` stands for.

    Args:
        setting: the setting that holds the name, for messages.
        shipped: name -> a function that returns what it stands for.

    Raises:
        ValueError: in one line, when it is none of these, or cannot be imported.
    """
    if name in shipped:
        return Named(name, shipped[name]())
    if not is_of_user(name):
        close = difflib.get_close_matches(name, shipped, n=1)
        meant = f"; is {close[0]} meant?" if close else f"; use {', '.join(shipped)}," if shipped else "; use"
        meant += "" if close else " package.module:function, or path/to/file.py:function."
        raise ValueError(f"{setting}: there is no {name!r}{meant}")
    place, _, attribute = name.rpartition(":") if ":" in name else name.rpartition(".")
    if not place or not attribute:
        raise ValueError(f"{setting}: {name!r} must be package.module:function, or path/to/file.py:function.")
    module = _file(setting, Path(place).expanduser()) if place.endswith(".py") else _module(setting, place)
    if not hasattr(module, attribute):
        own = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise ValueError(f"{setting}: {place} has no {attribute!r}; it has {', '.join(own) or 'no functions'}.")
    file = getattr(module, "__file__", None)
    return Named(absolute(name), getattr(module, attribute), Path(file) if file else None)


def files_of(names: Iterable[str]) -> dict[str, str]:
    """File -> the first digits of its hash, of functions that [`named`] has imported; nothing is imported here."""
    found = [_file_of(name.rpartition(":")[0] or name.rpartition(".")[0]) for name in names]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in found if file is not None}


def _file_of(place: str) -> Path | None:
    path = Path(place).expanduser() if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    return Path(path).resolve() if path and Path(path).is_file() else None


class _Uncached(SourceFileLoader):
    """Compiles what the file has now: Python's cache takes two versions of one second and one size for the same."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


@functools.cache
def _imported(path: Path, digest: str) -> ModuleType:
    """The module of a file; its folder joins the path of imports, as that of a script does."""
    name = f"{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Uncached(name, str(path)))
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _file(setting: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{setting}: there is no file {path} (seen from {Path.cwd()}).")
    path = path.resolve()
    try:
        return _imported(path, hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    except (Exception, SystemExit) as error:
        raise ValueError(f"{setting}: {path}{_line_of(error, path)}: {described(error)}.") from error


def _module(setting: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{setting}: the module {name} cannot be imported: {described(error)}.") from error


def described(error: BaseException) -> str:
    said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {said}".removesuffix(".")


def _line_of(error: BaseException, path: Path) -> str:
    """The last line of the file that the error came from."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def line_of(error: BaseException, one: Named) -> str:
    """Where in its file a function raised: `FILE, line N`; its name where the file is not known."""
    return one.name if one.file is None else f"{one.file}{_line_of(error, one.file)}"


def with_settings(setting: str, one: Named, given: Mapping[str, Any], called_with: str) -> Callable[..., Any]:
    """
    The function with these keyword settings. What does not take `called_with` makes the function: it is called with
    the settings, and must return it; so is a class.

    Raises:
        ValueError: when it is no function, or does not take a setting.
    """
    if not callable(one.value):
        raise ValueError(f"{setting}: {one.name} is no function, it is {one.value!r:.80}.")
    takes = _parameters(one.value)
    is_called = not inspect.isclass(one.value) and _takes(takes, called_with)
    # The **kwargs of what is called are for TRL's columns; a setting is a parameter of its own, or a misspelt one.
    if unknown := [name for name in given if not (name in takes if is_called else _takes(takes, name))]:
        own = [name for name, one in takes.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        raise ValueError(f"{setting}: {one.name} takes no {unknown[0]!r}; it takes {', '.join(own) or 'nothing'}.")
    if is_called:
        return _keeping_name(functools.partial(one.value, **given), one.short) if given else one.value
    try:
        made = one.value(**given)
    except Exception as error:
        raise ValueError(f"{setting}: {line_of(error, one)}: {described(error)}.") from error
    if not callable(made) or not _takes(_parameters(made), called_with):
        raise ValueError(
            f"{setting}: {one.name} takes no {called_with!r}, and returns no function that does; a function "
            f"(prompts, completions, **kwargs) is needed."
        )
    return made if hasattr(made, "__name__") else _keeping_name(made, one.short)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (ValueError, TypeError):  # of a function without a signature, such as one in C
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if name in parameters:
        return parameters[name].kind in by_name
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def _keeping_name(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    is_async = inspect.iscoroutinefunction(getattr(function, "func", function))
    kept: Any = awaited if is_async else called
    kept.__wrapped__ = function  # whose file and line an error is told with
    kept.__name__ = kept.__qualname__ = name
    return kept
