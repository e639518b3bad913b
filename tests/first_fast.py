"""The short command runs the first cases of a test that trains for each of them; `--slow` runs the others too."""

from collections.abc import Iterable

import pytest


def first_fast(cases: Iterable, keep: int = 1) -> list:
    """`cases` for `pytest.mark.parametrize`, all but the first `keep` marked `slow`."""
    return [case if number < keep else pytest.param(case, marks=pytest.mark.slow) for number, case in enumerate(cases)]
