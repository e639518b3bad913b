"""`Finding`: a problem or a note about a run, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """
    What was found, and what to do about it.

    Attributes:
        is_problem: False for a note, with which the run can start.
        stops: Training would end with it for certain, so that `trl-entropy train` refuses to begin, in these words.
            An estimate, as of memory, is never certain.
    """

    text: str
    remedy: str = ""
    is_problem: bool = True
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}".strip()


Findings = Iterable[Finding]
