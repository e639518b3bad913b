"""`Finding`: a problem of a run, or a note, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """What was found and what to do; a note (`is_problem=False`) stops nothing."""

    text: str
    remedy: str = ""
    is_problem: bool = True

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}".strip()


Findings = Iterable[Finding]
