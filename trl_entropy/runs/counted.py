"""Numbers with the noun that they count, as messages print them."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """`1 step`, `2 steps`, `0.5 epochs`, `2 processes`."""
    plural = noun + ("es" if noun.endswith(("s", "x", "tch", "sh")) else "s")
    return f"{f'{number:g}' if isinstance(number, float) else number} {noun if number == 1 else plural}"
