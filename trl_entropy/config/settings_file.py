"""A YAML file of settings: its values converted to the types of their fields, or refused by name and line."""

from __future__ import annotations

import difflib
import enum
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from trl_entropy.runs.secrets import masked_text

ENVIRONMENT = "env"  # TRL's parser sets these variables

# YAML 1.1 reads a number with an exponent as text unless it has a point and the exponent a sign: 1e-6, 1.0e6.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_TAKES_BOOLEANS = ("resume_from_checkpoint",)  # beside the text of their annotation
_BOOLEANS |= {"y": True, "n": False, "t": True, "f": False}


class Settings(NamedTuple):
    """The settings of a file, converted, and the variables to set in the environment."""

    values: dict[str, object]
    environment: dict[str, str]


def read_settings(path: str, hints: Mapping[str, Any]) -> Settings:
    """
    The settings of a YAML file.

    Args:
        hints: the annotated type of every field that a file may set.

    Raises:
        ValueError: in one line that names the file, and the line and the field where there is one.
    """
    values, environment = dict[str, object](), dict[str, str]()
    lines = dict[str, int]()
    for name, value, line in _entries(path):
        where = f"{path}, line {line}"
        if name in lines:
            raise ValueError(f"{where}: {name} stands in line {lines[name]} already; keep one of the two.")
        lines[name] = line
        if name == ENVIRONMENT:
            environment = _environment(value, where)
        elif name in hints:
            values[name] = convert_setting(name, value, hints[name], f"{where}: ")
        else:
            raise ValueError(f"{where}: there is no setting {name!r}{_closest(name, hints)}")
    return Settings(values, environment)


def _closest(name: str, known: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; is {found[0]} meant?" if found else "."


def _environment(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: env is {value!r:.80}; names of variables with their values are needed.")
    return {str(name): str(text) for name, text in value.items()}


# ---- the file


def _entries(path: str) -> list[tuple[str, object, int]]:
    """Name, value and line of each setting."""
    text = _text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise ValueError(f"{path} is empty: it needs lines such as `max_steps: 60`.")
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path} holds no settings: it needs lines such as `max_steps: 60`.")
        return [(str(_value_of(key)), _value_of(value), key.start_mark.line + 1) for key, value in root.value]
    except yaml.YAMLError as error:
        raise ValueError(_syntax(path, text, error)) from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: it is nested too deeply.") from error


def _text(path: str) -> str:
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: the file is not UTF-8; save it as UTF-8.") from error
    except FileNotFoundError as error:
        raise ValueError(f"--config: there is no file {path} (seen from {Path.cwd()}). Correct the path.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"--config: {path!r} cannot be read: {one_line(error)}.") from error


def _value_of(node: yaml.Node) -> object:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # such as the date 2024-99-99, or a list as a key
        raise yaml.MarkedYAMLError(problem=one_line(error), problem_mark=node.start_mark) from error
    finally:
        loader.dispose()


def _syntax(path: str, text: str, error: yaml.YAMLError) -> str:
    """What is wrong with the file, and in which line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return f"{path} is no YAML: {one_line(error)}."
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        return f"{path}, line {mark.line + 1}: a tab, which YAML does not take here; use spaces."
    problem = getattr(error, "problem", None) or getattr(error, "context", None)
    return f"{path}, line {mark.line + 1}: {problem}."


def one_line(error: object) -> str:
    """The message of an error in one line, without the full stop at its end."""
    text = masked_text(" ".join(str(error).split()))
    return text.removesuffix(".") or type(error).__name__


def sentence(error: object) -> str:
    """The message of an error in one line, with a full stop at its end unless it ends with a question."""
    text = one_line(error)
    return text if text.endswith("?") else f"{text}."


# ---- the values


def convert_setting(name: str, value: object, hint: Any, where: str = "") -> object:
    """
    A value of a file or of the command line as the type of its field.

    Raises:
        ValueError: naming the field.
    """
    if name in _TAKES_BOOLEANS and isinstance(value, bool):
        return value or None
    try:
        if name.endswith("_kwargs") and isinstance(value, str) and not value.startswith("{"):
            raise ValueError(f"{_needed(dict)} is needed")
        return converted(value, hint)
    except ValueError as error:
        raise ValueError(f"{where}{name} is {_shown(value)}; {error}.") from error


def _shown(value: object) -> str:
    return "empty" if value is None else "true" if value is True else "false" if value is False else f"{value!r:.80}"


def converted(value: object, hint: Any) -> object:
    """
    `value` as the annotated type `hint`: the member of a union that it already is, else the first that takes it.

    Raises:
        ValueError: saying what is needed.
    """
    union = get_origin(hint) in (Union, types.UnionType)
    options = [option for option in (get_args(hint) if union else (hint,)) if option is not types.NoneType]
    if value is None and (hint is types.NoneType or (union and types.NoneType in get_args(hint))):
        return None
    if value is None and not any(option is object or option is Any for option in options):
        raise ValueError(f"{_needed(options[0])} is needed, or leave the setting out")
    if isinstance(value, str) and value.startswith("{") and any((get_origin(o) or o) is dict for o in options):
        value = _parsed_json(value)
    if any((get_origin(option) or option) is dict for option in options) and not isinstance(value, str):
        options = [option for option in options if option is not str]
    failed: ValueError | None = None
    for option in sorted(options, key=lambda option: not _is_already(value, option)):
        try:
            return _as(value, option)
        except ValueError as error:
            failed = failed or error
    raise failed or ValueError("no value fits")


def _is_already(value: object, option: Any) -> bool:
    kind = get_origin(option) or option
    if kind is Literal:
        return value in get_args(option)
    return isinstance(kind, type) and (type(value) is kind or (kind in (list, dict) and isinstance(value, kind)))


def _needed(option: Any) -> str:
    kind = get_origin(option) or option
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    names[dict] = "a map of names to values, such as {min_lr: 1e-6},"
    return names.get(kind, "another value")


def _as(value: object, option: Any) -> object:
    """`value` as one type that is no union."""
    kind, inner = get_origin(option) or option, get_args(option)
    if kind is Literal:
        return _choice(value, inner)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _choice(value, tuple(member.value for member in kind))
    if kind is list:
        members = value if isinstance(value, list | tuple) else [value]
        return [converted(member, inner[0] if inner else object) for member in members]
    if kind is dict:
        return _mapping(value, inner[1] if inner else object)
    simple = {bool: _boolean, int: _integer, float: _number, str: _string}.get(kind)
    return _free(value) if simple is None else simple(value)


def _choice(value: object, choices: tuple[Any, ...]) -> object:
    if value in choices and not (isinstance(value, bool) and all(choice is not value for choice in choices)):
        return value
    quotes = ' (YAML reads no as false; write "no" in quotes)' if value is False and "no" in choices else ""
    raise ValueError(f"use one of {', '.join(map(str, choices))}{quotes}")


def _boolean(value: object) -> bool:
    known = value if isinstance(value, bool) else _BOOLEANS.get(str(value).lower())
    if not isinstance(known, bool):
        raise ValueError(f"{_needed(bool)} is needed")
    return known


def _integer(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{1,18}", value):
        return int(value)
    number = _number_or_none(value)
    if number is None or not number.is_integer():
        raise ValueError(f"{_needed(int)} is needed")
    return int(number)


def _number(value: object) -> float | int:
    number = _number_or_none(value)
    if number is None or math.isnan(number):
        raise ValueError(f"{_needed(float)} is needed")
    return value if isinstance(value, int) else number  # as it was before: config.yaml shows what was written


def _number_or_none(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _string(value: object) -> str:
    if isinstance(value, bool | list | dict | set | tuple):
        quotes = "; YAML reads no, off, yes and on as false and true: write the text in quotes"
        raise ValueError(f"{_needed(str)} is needed{quotes if isinstance(value, bool) else ''}")
    text = str(value)
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _parsed_json(text: str) -> object:
    """Fields that take a mapping take one in JSON too, as a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({one_line(error)})") from error


def _mapping(value: object, hint: Any) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{_needed(dict)} is needed")
    return {str(name): converted(member, hint) for name, member in value.items()}


def _free(value: object) -> object:
    """A value whose type is not said: numbers that YAML takes for text become numbers, however deep they stand."""
    if isinstance(value, Mapping):
        return {str(name): _free(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_free(member) for member in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def hints_of(classes: typing.Iterable[type]) -> dict[str, Any]:
    """The annotated types of the fields of these dataclasses."""
    return {name: hint for one in classes for name, hint in typing.get_type_hints(one).items()}
