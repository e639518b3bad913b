"""
Tables as columns of JSON, and back. A column is one of

    [1, 2.5, null]                              values
    {"constant": 3}                             the same value in every row
    {"values": [0, 1], "counts": [20, 18]}      runs of equal values
    {"texts": ["a", "b"], "index": [0, 1, 0]}   texts, each once; an index of -1 is no text

and the table is {"rows": 3, "columns": {...}}. Numbers that are nan or infinite are null. Imports no torch.
"""

from __future__ import annotations

import itertools
import math

import pandas as pd

from trl_entropy.analysis.view_columns import column
from trl_entropy.runs.strict_json import Json

_SHORT = 4  # runs of equal values are written as such where they are this long on average


def encoded(view: str, table: pd.DataFrame) -> Json:
    """A table of a view as JSON, its numbers rounded to the digits that `COLUMNS` gives them."""
    return {"rows": len(table), "columns": {name: _encoded(table[name], column(view, name).digits) for name in table}}


def decoded(table: Json) -> dict[str, list]:
    """The columns of [`encoded`] as lists: what the page's script does too."""
    return {name: _decoded(given, table["rows"]) for name, given in table["columns"].items()}


def rounded(value: float, digits: int) -> float | int | None:
    """`value` with this many significant digits; a whole number as it is, and None for nan and infinities."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}") if digits else value
    return int(short) if short == int(short) and abs(short) < 2**53 else short


def _encoded(values: pd.Series, digits: int) -> object:
    if pd.api.types.is_bool_dtype(values):
        plain: list = [int(value) for value in values]
    elif pd.api.types.is_numeric_dtype(values):
        plain = [rounded(value, digits) for value in values.tolist()]
    else:
        return _texts(values.tolist())
    return _shorter(plain)


def _shorter(plain: list) -> object:
    if len(plain) > 1 and all(value == plain[0] for value in plain):
        return {"constant": plain[0]}
    runs = [(value, len(list(same))) for value, same in itertools.groupby(plain)]
    if len(runs) * _SHORT > len(plain):
        return plain
    return {"values": [value for value, _ in runs], "counts": [count for _, count in runs]}


def _texts(values: list) -> Json:
    known = [value if isinstance(value, str) else None for value in values]
    texts = list(dict.fromkeys(value for value in known if value is not None))
    numbers = {text: number for number, text in enumerate(texts)}
    return {"texts": texts, "index": _shorter([-1 if value is None else numbers[value] for value in known])}


def _decoded(given: object, rows: int) -> list:
    if isinstance(given, list):
        return given
    assert isinstance(given, dict)
    if "constant" in given:
        return [given["constant"]] * rows
    if "counts" in given:
        return [value for value, count in zip(given["values"], given["counts"], strict=True) for _ in range(count)]
    return [None if number < 0 else given["texts"][number] for number in _decoded(given["index"], rows)]
