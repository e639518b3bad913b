"""
Comparison of an answer with the gold answer by math-verify, in worker processes that can be killed.

There are three stages, in this order, so that the speed of the machine never changes a reward:

1. Comparison of the texts (`text.py`): identical texts are equal, plain numbers are compared exactly, and an empty
answer
   is wrong.
2. Limits (`limits.py`): `reject_reason` checks length, characters, nesting, commands, and a bound on the size that the
   text can have when it is evaluated. The result depends on the text alone.
3. math-verify in a worker (`checker.py`, `worker.py`). Within the limits it needs milliseconds, rarely a second. A
   comparison that still exceeds the deadline of many seconds of CPU time is a `Verdict.TIMEOUT`, which is logged.
"""

from trl_entropy.tasks.answers.checker import AnswerChecker, shared_checker
from trl_entropy.tasks.answers.limits import reject_reason
from trl_entropy.tasks.answers.text import Verdict, clean_answer, plain_number, quick_verdict

__all__ = [
    "AnswerChecker",
    "Verdict",
    "clean_answer",
    "plain_number",
    "quick_verdict",
    "reject_reason",
    "shared_checker",
]
