"""The short command runs the first cases of a test that trains for each of them; `--slow` runs the others too."""

from collections.abc import Iterable

import pytest


def first_fast(cases: Iterable, keep: int = 1) -> list:
    """`cases` for `pytest.mark.parametrize`, all but the first `keep` marked `slow`."""
    cases = list(cases)
    values = [case if isinstance(case, tuple) else (case,) for case in cases[keep:]]
    return cases[:keep] + [pytest.param(*value, marks=pytest.mark.slow) for value in values]
