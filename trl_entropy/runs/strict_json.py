"""Strict JSON lines: nan and infinities, which JSON does not have, are written as null and named beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from sys import intern
from typing import Any

# An object of JSON or YAML, as `json.loads` and `yaml.safe_load` give it.
Json = dict[str, Any]
# A line of `metrics.jsonl`, or a row of another table: values by name, numbers for the most part, None where unknown.
Row = dict[str, Any]

NOT_FINITE = "not_finite"


def without_nan(value: object) -> object:
    """`value` with every nan and infinity replaced by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if _is_not_finite(value) else value


def to_line(row: Mapping[str, object]) -> str:
    """`row` as one line of JSON; a nan is written as null, and `not_finite` says what it was: `{"loss": "nan"}`."""
    not_finite = {name: str(value) for name, value in row.items() if _is_not_finite(value)}
    named = {NOT_FINITE: not_finite} if not_finite else {}
    return json.dumps({name: without_nan(value) for name, value in row.items()} | named, allow_nan=False)


def from_line(text: str) -> Row:
    """
    The row that [`to_line`] wrote, with nan and infinities restored; Python's own `NaN` is read too.

    Raises:
        ValueError: when the text is cut, or no object of JSON.
    """
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError(f"a line of metrics is an object of JSON, got {text[:40]!r}")
    for name, value in (row.pop(NOT_FINITE, None) or {}).items():
        row[name] = float(value)
    return {intern(name): value for name, value in row.items()}  # every line names the same keys: kept once


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
