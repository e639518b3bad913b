"""Comparisons by math-verify in worker processes that can be killed."""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trl_entropy.tasks.answers.text import Verdict, clean_answer, expression, quick_verdict

PROGRAM = Path(__file__).with_name("worker.py")

# The deadline of a comparison is CPU time, which the worker limits itself, so that a busy machine changes no verdict.
# A worker counts as hanging when one comparison has taken this many times the deadline in wall-clock time. The clock
# starts when the worker gets the comparison, however many were before it.
_WALL_CLOCK_FACTOR = 12


class _Process:
    """A running worker process and the two pipes to it."""

    _START_DEADLINE = 300.0

    def __init__(self, arguments: list[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a scheduler's SIGTERM to the group is for the trainer, which ends its workers
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of sets must not reach a verdict
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self.num_requests = 0
        self._wait_until_ready()

    def ask(self, request: bytes, timeout: float) -> bytes | None:
        """The reply, one byte; empty if the process has ended, `None` if the time is over."""
        self.num_requests += 1
        try:
            self._requests.write(request)
        except BrokenPipeError:
            return b""
        return self._read(timeout)

    def kill(self) -> int:
        """End the process and return its exit code, which shows whether it had ended by itself."""
        self._process.kill()
        self._requests.close()
        self._replies.close()
        return self._process.wait()

    def _read(self, timeout: float) -> bytes | None:
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        return self._replies.read(1) if poll.poll(1000 * timeout) else None

    def _wait_until_ready(self) -> None:
        reply = self._read(self._START_DEADLINE)
        if reply == b"r":
            return
        error = "no answer" if reply is None else (reply + self._replies.read()).decode()
        self.kill()
        raise RuntimeError(
            f"the math-verify worker did not start: {error!r}. Check that `pip install math-verify` was done for "
            f"{sys.executable} and that the memory limit leaves room for the import of sympy (about 200 MB)."
        )


class _Worker:
    """One worker process, started at the first comparison, killed when it hangs, and replaced when it dies."""

    _CHECKS_PER_PROCESS = 2000  # then a new process, as the caches of sympy and of the LaTeX parser grow

    def __init__(self, deadline: float, memory_limit: int, verify_path: str | None):
        self._deadline = deadline
        self._arguments = [str(deadline), str(memory_limit), *([verify_path] if verify_path else [])]
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def check(self, gold: str, answer: str) -> Verdict:
        request = json.dumps([expression(gold), expression(answer)]).encode() + b"\n"
        for _ in range(3):  # a process killed from outside, even twice, must not change a verdict
            reply = self._running().ask(request, _WALL_CLOCK_FACTOR * self._deadline)
            if reply == b"1" or reply == b"0":
                return Verdict.EQUAL if reply == b"1" else Verdict.DIFFERENT
            exit_code = self.kill()
            if reply is None or exit_code == -signal.SIGXCPU:
                return Verdict.TIMEOUT
        return Verdict.FAILED

    def kill(self) -> int | None:
        process, self._process = self._process, None
        return process.kill() if process else None

    def _running(self) -> _Process:
        if self._process and self._process.num_requests >= self._CHECKS_PER_PROCESS:
            self.kill()
        if self._process is None:
            self._process = _Process(self._arguments)
        return self._process


class AnswerChecker:
    """Compares answers with gold answers, by math-verify where needed, in worker processes of its own.

    Args:
        num_workers: Processes that run math-verify. They start with the first answer that needs mathematics.
        deadline: Seconds of CPU time for one comparison, far more than a text within the limits needs.
        memory_limit: Bytes of address space of a worker.
        cache_size: Number of verdicts to keep; the least recently used is dropped first.
        verify_path: For tests: `file.py:function`, which the worker calls in place of `math_verify_equal`.
    """

    def __init__(
        self,
        num_workers: int = 2,
        deadline: float = 10.0,
        memory_limit: int = 1 << 30,
        cache_size: int = 50_000,
        verify_path: str | None = None,
    ):
        self._deadline = deadline
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._cache_size = cache_size
        self._workers = [_Worker(deadline, memory_limit, verify_path) for _ in range(num_workers)]
        atexit.register(self.close)

    def check(self, pairs: Sequence[tuple[object, object]]) -> list[Verdict]:
        """The verdict on each pair of gold answer and answer, in order.

        Raises:
            RuntimeError: If no worker can be started. No text makes this raise.
        """
        keys = [(clean_answer(gold), clean_answer(answer)) for gold, answer in pairs]
        with self._lock:
            known = {key: quick_verdict(*key) or self._cached(key) for key in keys}
            verified = self._verify([key for key, verdict in known.items() if verdict is None])
        return [known[key] or verified[key] for key in keys]

    def close(self) -> None:
        """End the workers. A later `check` starts new ones."""
        if os.getpid() == self._owner:  # not in a forked process
            for worker in self._workers:
                worker.kill()

    def _verify(self, keys: list[tuple[str, str]]) -> dict[tuple[str, str], Verdict]:
        if not keys:
            return {}
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def verify(key: tuple[str, str]) -> Verdict:
            worker = idle.get()
            try:
                return self._remember(key, worker.check(*key))
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as executor:
            return dict(zip(keys, executor.map(verify, keys), strict=True))

    def _cached(self, key: tuple[str, str]) -> Verdict | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _remember(self, key: tuple[str, str], verdict: Verdict) -> Verdict:
        self._cache[key] = verdict
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return verdict


@functools.cache
def _checker_of_process(pid: int) -> AnswerChecker:
    return AnswerChecker()


def shared_checker() -> AnswerChecker:
    """The checker of this process; a forked process gets its own."""
    return _checker_of_process(os.getpid())
