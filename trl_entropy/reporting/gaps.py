"""What a page lacks: a part that cannot be made becomes a sentence, so that the rest is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from trl_entropy.runs.reading import why

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Gaps:
    """
    Collects the parts that could not be made.

    Attributes:
        sentences: one for each part, with what went wrong; a file that cannot be read is named.
    """

    sentences: list[str] = field(default_factory=list)

    def attempt(self, part: str, run: str | Path, make: Callable[..., T], *arguments: object) -> T | None:
        """
        What `make(*arguments)` returns; if it raises, None, and the reason is kept and logged in one line.

        Args:
            part: names the part in words.
            run: names the run, or the runs.
        """
        try:
            return make(*arguments)
        except Exception as error:
            sentence = f"{part} of {run} is left out: {why(error)}."
            logger.warning("%s", sentence)
            logger.debug("%s", sentence, exc_info=True)
            self.sentences.append(sentence)
            return None
