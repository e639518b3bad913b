"""The comparison of two answers as texts, where no mathematics is needed."""

from __future__ import annotations

import enum
import functools

from trl_entropy.tasks.answers.limits import MAX_CHARS, reject_reason
from trl_entropy.tasks.answers.phrases import (
    Phrase,
    numbers_of,
    read_phrase,
    same_phrase,
    without_formatting,
    without_words_around,
)


class Verdict(enum.Enum):
    """The result of a comparison; only `EQUAL` earns a reward."""

    EQUAL = "equal"
    DIFFERENT = "different"
    REJECTED = "rejected"  # beyond the limits, not given to math-verify
    TIMEOUT = "timeout"  # the worker reached its deadline
    FAILED = "failed"  # the worker died or ran out of memory, and so did a new one


UNDECIDED = (Verdict.TIMEOUT, Verdict.FAILED)

_DASHES = str.maketrans(dict.fromkeys("‐‑‒–−", "-"))


def clean_answer(answer: object) -> str:
    """The text to compare: `None` is empty, whitespace is collapsed, bold markers (`**72**`) and a plus removed."""
    text = "" if answer is None else " ".join(str(answer).split())
    return text.strip("* ").lstrip("+ ").translate(_DASHES)


def expression(text: str) -> str:
    """What math-verify is given of a cleaned text: no formatting, and no words before and after."""
    return without_words_around(without_formatting(text))


def quick_verdict(gold: str, answer: str) -> Verdict | None:
    """The verdict on two cleaned texts if no mathematics is needed; `None` if math-verify has to decide."""
    if not gold or not answer:
        return Verdict.DIFFERENT
    if gold == answer:
        return Verdict.EQUAL
    if max(len(gold), len(answer)) > MAX_CHARS:
        return Verdict.REJECTED
    (gold_text, gold_phrase), (answer_text, answer_phrase) = _read(gold), _read(answer)
    if gold_text and gold_text == answer_text:
        return Verdict.EQUAL
    if gold_phrase and answer_phrase:
        return Verdict.EQUAL if same_phrase(gold_phrase, answer_phrase) else Verdict.DIFFERENT
    if gold_phrase and not numbers_of(gold_phrase):
        return Verdict.DIFFERENT  # only the same words are equal to words
    if reject_reason(expression(gold)) or reject_reason(expression(answer)):
        return Verdict.REJECTED
    return None


def unusable_reason(gold: str) -> str | None:
    """Why only an answer that repeats a cleaned gold answer literally is equal to it, else `None`."""
    if len(gold) > MAX_CHARS:
        return reject_reason(gold)
    return None if _read(gold)[1] else reject_reason(expression(gold))


@functools.lru_cache(maxsize=10_000)
def _read(text: str) -> tuple[str, Phrase | None]:
    plain = without_formatting(text)
    return plain, read_phrase(plain)
