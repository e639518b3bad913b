"""JSON that any reader opens, without the nan and the infinities that Python writes into it. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NOT_FINITE = "not_finite"


def without_nan(value: Any) -> Any:
    """nan and infinities as null, however deep."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if _is_not_finite(value) else value


def to_line(row: Mapping[str, Any]) -> str:
    """One line: what is not finite is null, and `not_finite` beside it says what it was, as `{"loss": "nan"}`."""
    not_finite = {name: str(value) for name, value in row.items() if _is_not_finite(value)}
    named = {NOT_FINITE: not_finite} if not_finite else {}
    return json.dumps(without_nan(row) | named, allow_nan=False)


def from_line(text: str) -> dict[str, Any]:
    """The row of [`to_line`], nan and infinities restored. Lines with Python's `NaN` in them are read too."""
    row = json.loads(text)
    return row | {name: float(value) for name, value in row.pop(NOT_FINITE, {}).items()}


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
