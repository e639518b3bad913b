"""`Finding`: a problem or a note about a run, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """What was found, and what to do about it. With `is_problem=False` it is a note, and the run can start."""

    text: str
    remedy: str = ""
    is_problem: bool = True

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}".strip()


Findings = Iterable[Finding]
