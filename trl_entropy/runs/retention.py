"""Of which steps a run keeps files that it cannot keep of all: by number of step, never by clock."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd


def retained(steps: Iterable[int], keep: int | None) -> list[int]:
    """
    At most `keep` of these steps, in order: evenly spaced from the first on, and the newest.

    As steps are added, every second one is given up whenever there would be too many, so that about half as many as
    allowed are there at least. What is left depends on the steps alone: a run that is resumed, and has given up more
    than it would have by the step from which it goes on, ends with the files of an uninterrupted one.

    Args:
        steps: those that have files now, in any order.
        keep: None keeps all, 1 the newest.
    """
    found = sorted(set(steps))
    if keep is None or len(found) <= keep // 2:
        return found
    if keep <= 1:
        return found[len(found) - keep :]
    first, newest = found[0], found[-1]
    stride = gcd(*(step - first for step in found))
    while -(-(newest - first) // stride) + 1 > keep:
        stride *= 2
    return [step for step in found if (step - first) % stride == 0 or step == newest]
