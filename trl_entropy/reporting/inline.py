"""The script and the style of the page, from the readable files in `browser/`, for a page that is a single file."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

ENTRY = "main.js"
_IMPORT = re.compile(r'^import (?P<names>\{[^}]*\}) from "\./(?P<file>\w+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|const|class) (?P<name>\w+))", re.MULTILINE)


@cache
def style() -> str:
    """The style sheet."""
    return _source("style.css")


@cache
def script() -> str:
    """
    All modules as one script, each a function that returns what it exports, after those that it imports.

    The files are plain ES modules, of which this understands one form each: `import { a, b } from "./file.js";` and
    `export function`, `export const`, `export class`.
    """
    return f'(() => {{\n"use strict";\nconst modules = {{}};\n{"".join(map(_as_function, modules()))}}})();\n'


def _as_function(name: str) -> str:
    source = _source(name)
    exported = ", ".join(match["name"] for match in _EXPORT.finditer(source))
    body = _EXPORT.sub("", _IMPORT.sub(r'const \g<names> = modules["\g<file>"];\n', source))
    return f'modules["{name}"] = (() => {{\n{body}return {{ {exported} }};\n}})();\n'


def script_hash() -> str:
    """The script's hash for the page's Content-Security-Policy: no other script runs, wherever it came from."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()


def modules() -> list[str]:
    """The modules' files in an order in which each follows those that it imports."""
    found: list[str] = []

    def visit(name: str) -> None:
        for match in _IMPORT.finditer(_source(name)):
            if match["file"] not in found:
                visit(match["file"])
        if name not in found:
            found.append(name)

    visit(ENTRY)
    return found


def _source(name: str) -> str:
    return (files("trl_entropy.reporting") / "browser" / name).read_text(encoding="utf-8")
