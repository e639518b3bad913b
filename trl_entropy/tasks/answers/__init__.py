"""
Is this answer equal to the gold answer? math-verify decides, in worker processes that can be killed.

Three questions are asked in this order, so that the speed of the machine never changes a reward:

1. Can it be decided without mathematics (`text.py`)? Identical text is equal, plain numbers are compared exactly, an
   empty answer is wrong.
2. Is the text within limits (`limits.py`)? `reject_reason` looks at length, characters, nesting, commands and a bound
   on how large the text can grow when it is evaluated. It is a pure function of the text.
3. math-verify decides, in a worker (`checker.py`, `worker.py`). Within the limits it needs milliseconds, rarely a
   second. What still runs into the deadline of many seconds of CPU time is a `Verdict.TIMEOUT`, which is counted and
   logged.
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
