"""
Comparison of an answer with the gold answer, by math-verify in worker processes that can be killed.

There are three stages, in this order, so that the speed of the machine never changes a reward:

1. What can be read exactly (`phrases.py`, `text.py`): numbers with sign, unit and currency, mixed numbers, and plain
   words are compared by exact arithmetic and as words. An empty answer is wrong, and identical texts are equal.
2. Limits (`limits.py`): `reject_reason` checks length, characters, nesting, commands, words, and a bound on the size
   that the text can have when it is evaluated. The result depends on the text alone.
3. math-verify in a worker (`checker.py`, `worker.py`). Within the limits it needs milliseconds, rarely a second. A
   comparison that still exceeds its deadline of many seconds of CPU time is a `Verdict.TIMEOUT`, which is logged.
"""

from trl_entropy.tasks.answers.checker import AnswerChecker, shared_checker
from trl_entropy.tasks.answers.limits import reject_reason
from trl_entropy.tasks.answers.text import UNDECIDED, Verdict, clean_answer, expression, quick_verdict, unusable_reason

__all__ = [
    "UNDECIDED",
    "AnswerChecker",
    "Verdict",
    "clean_answer",
    "expression",
    "quick_verdict",
    "reject_reason",
    "shared_checker",
    "unusable_reason",
]
