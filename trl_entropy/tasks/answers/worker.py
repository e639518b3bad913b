"""
The program of a worker: compares answers by math-verify, one line each, within limits on CPU time and memory.

It is started by its path in a new interpreter, because `multiprocessing` would import the training script and torch
again. It ends when its standard input closes, which also happens when the process that started it dies.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

# Differences below 10 to the minus this count as zero; the limits exclude numbers that small
_NUM_DIGITS = 1000


def math_verify_equal(gold: str, answer: str) -> bool:
    """Whether math-verify finds two expressions equal. Without limits on time and memory: only for the worker."""
    from math_verify import verify
    from sympy.core.random import seed

    seed(0)  # simplify tests some identities at random points
    return verify(_parse(gold), _parse(answer), numeric_precision=_NUM_DIGITS, timeout_seconds=None)


def _parse(text: str) -> list:
    """What math-verify reads as LaTeX; nothing if it cannot read the whole text, of which it would pick a number."""
    from math_verify import LatexExtractionConfig, parse

    normalization = replace(LatexExtractionConfig().normalization_config, units=False)  # of `3ab` it would drop `ab`
    config = LatexExtractionConfig(normalization_config=normalization)
    return parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)


def _load_verify(path: str | None) -> Callable[[str, str], bool]:
    if path is None:
        import math_verify  # noqa: F401  before the first deadline runs

        logging.disable(logging.CRITICAL)
        return math_verify_equal
    file, _, name = path.rpartition(":")
    return runpy.run_path(file)[name]


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _limit_cpu_time(seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + seconds))


def _serve(deadline: str, memory_limit: str, verify_path: str | None = None) -> None:
    """Reply to each line `[gold, answer]` with one byte, `1` or `0`, until the standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer; this process ends when its input closes
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not count as a reply
    try:
        _limit(resource.RLIMIT_CORE, 0)
        if sys.platform == "linux":  # macOS refuses to set it
            _limit(resource.RLIMIT_AS, int(memory_limit))
        verify = _load_verify(verify_path)
    except Exception as error:
        replies.write(repr(error).encode())
        return
    replies.write(b"r")
    for line in sys.stdin.buffer:
        _limit_cpu_time(float(deadline))
        try:
            equal = verify(*json.loads(line))
        except MemoryError:
            os._exit(1)  # the parent tries again in a new process
        except Exception:  # an answer that cannot be read is not equal to anything
            equal = False
        replies.write(b"1" if equal else b"0")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
