"""The comparison of two answers as texts, where no mathematics is needed."""

from __future__ import annotations

import enum
import re
from fractions import Fraction

from trl_entropy.tasks.answers.limits import reject_reason


class Verdict(enum.Enum):
    """The result of a comparison; only `EQUAL` earns a reward."""

    EQUAL = "equal"
    DIFFERENT = "different"
    REJECTED = "rejected"  # beyond the limits, not given to math-verify
    TIMEOUT = "timeout"  # the worker reached its deadline
    FAILED = "failed"  # the worker died or ran out of memory, and so did a new one


# At most 15 digits, six of them decimals: math-verify rounds floats to six decimals, so exact comparison agrees with
# it.
_PLAIN_NUMBER = re.compile(
    r"\$?(?P<sign>-?)(?P<value>(?:[0-9]{1,9}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,2})(?:\.[0-9]{0,6})?|\.[0-9]{1,6})"
)


def clean_answer(answer: object) -> str:
    """The text to compare: `None` is empty, whitespace is collapsed, bold markers (`**72**`) and a plus removed."""
    text = "" if answer is None else " ".join(str(answer).split())
    return text.strip("* ").lstrip("+ ").replace("−", "-")


def plain_number(text: str) -> Fraction | None:
    """The exact value of an integer or decimal such as `72`, `-1,234.50` or `$5`; `None` for other texts."""
    match = _PLAIN_NUMBER.fullmatch(text)
    if match is None:
        return None
    value = Fraction("0" + match["value"].replace(",", "").rstrip("."))
    return -value if match["sign"] else value


def quick_verdict(gold: str, answer: str) -> Verdict | None:
    """The verdict on two cleaned texts if no mathematics is needed; `None` if math-verify has to decide."""
    if not gold or not answer:
        return Verdict.DIFFERENT
    if gold == answer:
        return Verdict.EQUAL
    gold_number, answer_number = plain_number(gold), plain_number(answer)
    if gold_number is not None and answer_number is not None:
        return Verdict.EQUAL if gold_number == answer_number else Verdict.DIFFERENT
    if reject_reason(gold) or reject_reason(answer):
        return Verdict.REJECTED
    return None
