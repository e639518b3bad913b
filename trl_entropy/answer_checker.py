"""Is this answer equal to the gold answer? math-verify decides, in worker processes that can be killed.

Three questions are asked in this order, so that the speed of the machine never changes a reward:

1. Can it be decided without mathematics? Identical text is equal, plain numbers are compared exactly, an empty answer
   is wrong.
2. Is the text within limits? `reject_reason` looks at length, characters, nesting, commands and a bound on how large
   the text can grow when it is evaluated. It is a pure function of the text.
3. math-verify decides, in a worker. Within the limits it needs milliseconds, rarely a second. What still runs into the
   deadline of many seconds of CPU time is a `Verdict.TIMEOUT`, which is counted and logged.

This file is also the program of the worker, which is started by path in a fresh interpreter: `multiprocessing` would
import the training script a second time, and torch with it. A worker ends when its standard input closes, whatever
became of the process that started it.
"""

from __future__ import annotations

import atexit
import enum
import functools
import json
import logging
import math
import os
import queue
import re
import resource
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 256
MAX_DIGIT_CHARS = 120  # all digits of the text together
MAX_DEPTH = 8  # of brackets
MAX_SUBSCRIPTS = 10
MAX_BARS = 12
MAX_DIGITS = 1000.0  # of the largest number that the text can evaluate to
MAX_DEGREE = 100.0  # of the largest polynomial that the text can expand to
MAX_TERMS = 300.0  # of that polynomial


class Verdict(enum.Enum):
    """What came of one comparison; only `EQUAL` earns a reward."""

    EQUAL = "equal"
    DIFFERENT = "different"
    REJECTED = "rejected"  # outside the limits, never shown to math-verify
    TIMEOUT = "timeout"  # the worker ran into its deadline
    FAILED = "failed"  # the worker died or ran out of memory, and again in a fresh one


# ---- 1. Decided without mathematics ----

# At most 15 digits, six of them decimals: there exact equality is math-verify's, which rounds floats to six decimals.
_PLAIN_NUMBER = re.compile(
    r"\$?(?P<sign>-?)(?P<value>(?:[0-9]{1,9}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,2})(?:\.[0-9]{0,6})?|\.[0-9]{1,6})"
)


def clean_answer(answer: object) -> str:
    """The text that is compared: `None` is empty, whitespace is collapsed, bold markers (`**72**`) and a plus go."""
    text = "" if answer is None else " ".join(str(answer).split())
    return text.strip("* ").lstrip("+ ").replace("−", "-")


def plain_number(text: str) -> Fraction | None:
    """The exact value of an integer or decimal such as `72`, `-1,234.50` or `$5`; `None` for any other text."""
    match = _PLAIN_NUMBER.fullmatch(text)
    if match is None:
        return None
    value = Fraction("0" + match["value"].replace(",", "").rstrip("."))
    return -value if match["sign"] else value


def quick_verdict(gold: str, answer: str) -> Verdict | None:
    """The verdict on two cleaned texts where it takes no mathematics, `None` where math-verify has to decide."""
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


# ---- 2. Limits ----

_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
# Commands that stand for a bounded amount of work. Not here: integrals, sums, limits, determinants, operator names ...
_COMMAND_NAMES = """
frac dfrac tfrac cfrac sqrt binom dbinom tbinom cdot cdots times div pm mp left right mleft mright text textbf
textit textrm textnormal mathrm mathbf mathit mathbb mathcal mathsf mbox boxed fbox rm displaystyle textstyle pi
infty in notin cup cap setminus emptyset varnothing leq le geq ge leqslant geqslant lt gt neq ne approx equiv
sim to rightarrow percent circ degree angle triangle quad qquad sin cos tan cot sec csc arcsin arccos arctan log
ln lg exp overline underline bar vec hat tilde overrightarrow begin end ldots dots lfloor rfloor lceil rceil
lvert rvert vert lVert rVert langle rangle mid gcd lcm mod pmod bmod prime ast star land lor wedge vee perp
parallel cong subset subseteq lbrace rbrace lbrack rbrack big Big alpha beta delta epsilon varepsilon zeta
eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Delta Theta
Lambda Xi Pi Sigma Phi Psi Omega ell hbar euro pounds checkmark
"""
_COMMANDS = frozenset(_COMMAND_NAMES.split())
_MATRICES = frozenset({"matrix", "pmatrix", "bmatrix", "Bmatrix"})
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_ROW_END = re.compile(r"\\\\")
_REMOVED = re.compile(r"\\!\s*|\\?\$|[\"']|\\displaystyle")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{([^{}]*)\}")


def reject_reason(text: str) -> str | None:
    """Why a cleaned text is not shown to math-verify, or `None`: a function of the text alone, in linear time."""
    if len(text) > MAX_CHARS:
        return "length"
    if not text.isprintable():  # control and format characters, surrogates, private use
        return "characters"
    if sum(map(str.isdecimal, text)) > MAX_DIGIT_CHARS:
        return "digits"
    if _depth(text) > MAX_DEPTH or text.count("_") > MAX_SUBSCRIPTS or text.count("|") > MAX_BARS:
        return "nesting"
    text = _REMOVED.sub("", text)  # as math-verify does: `\in"t` becomes an integral
    if not _known_commands(text):
        return "command"
    bound = _SizeBound(text).of_text()
    too_large = bound.digits > MAX_DIGITS or bound.degree > MAX_DEGREE or bound.log_terms > math.log(MAX_TERMS)
    return "size" if too_large else None


def _known_commands(text: str) -> bool:
    # In a matrix a double backslash ends a row, elsewhere math-verify reads it before a name as a single one
    commands = _COMMAND.findall(_ROW_END.sub(" ", text) if "matrix" in text else text)
    return _COMMANDS.issuperset(commands) and _MATRICES.issuperset(_ENVIRONMENT.findall(text))


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in _OPENING) - (char in _CLOSING)
        deepest = max(deepest, depth)
    return deepest


class _Size(NamedTuple):
    digits: float = 0.0
    degree: float = 0.0
    log_terms: float = 0.0


class _SizeBound:
    """Upper bounds on what a text, LaTeX or not, has when evaluated and expanded: digits, degree and terms.

    Everything that stands side by side is taken as a product, which bounds sums too (a number counts as at least 2).
    A power multiplies by the value of its exponent, `n!` and `\\binom` by the value of `n`. It is deliberately coarse
    and blind to syntax: what it forbids has no place in an answer, and no text should slip below it.
    """

    _TOKEN = re.compile(
        r"(?P<skip>\s+|\\(?:left|right|mleft|mright|big|Big)(?![A-Za-z])|\\[,;:! ]|\\begin\s*\{[^{}]*\})"
        r"|(?P<closed>\\end\s*\{[^{}]*\}|\\(?:rfloor|rceil|rvert|rVert|rangle|vert)(?![A-Za-z]))"
        r"|(?P<command>\\[A-Za-z]+)"
        r"|(?P<open>\\?[(\[{])|(?P<close>\\?[)\]}])"
        r"|(?P<e_notation>(?<=[\d.])\s?E\s?[-+]?\s?\d+)|(?P<number>\d+(?:\.\d*)?|\.\d+)"
        r"|(?P<power>\^|\*\*)|(?P<factorial>!)|(?P<subscript>_)|(?P<operator>[-+*/×÷=<>,;:&])"
        r"|(?P<word>[^\W\d_]{3,})|(?P<letter>[^\W\d_])|(?P<other>.)",
        re.DOTALL,
    )
    _BINOMIALS = frozenset({r"\binom", r"\dbinom", r"\tbinom"})

    def __init__(self, text: str):
        tokens = ((match.lastgroup or "other", match.group()) for match in self._TOKEN.finditer(text))
        self._tokens = [(kind, token) for kind, token in tokens if kind != "skip"][::-1]

    def of_text(self) -> _Size:
        return self._group(is_text=True)

    def _group(self, is_text: bool = False) -> _Size:
        """Consumes up to the closing bracket, or to the end of the text."""
        total, last = _Size(), _Size()  # `last` is what a power or a factorial applies to, `total` is the rest
        while self._tokens:
            kind, token = self._tokens.pop()
            if kind == "close" and not is_text:
                break
            if kind == "power":
                last = _power(last, self._exponent())
            elif kind == "factorial" or (kind == "subscript" and last.digits):  # (n)_{k} is read as permutations
                last = _factorial(last)
            elif kind in ("close", "closed", "other"):  # a bar, a prime ... may close anything that stands before it
                total, last = _Size(), _product(total, last)
            else:
                total, last = _product(total, last), self._atom(kind, token)
        return _product(total, last)

    def _atom(self, kind: str, token: str) -> _Size:
        if kind == "open":
            return self._group()
        if kind == "number":
            return _Size(_log10(token))
        if kind == "e_notation":
            return _Size(_value(_Size(_log10(re.sub(r"\D", "", token)))))
        if kind == "word":  # of prose, or a product of variables
            return _Size(0.0, 0.25)
        if kind == "letter":
            return {"i": _Size(0.5), "I": _Size(0.5), "e": _Size(0.5, 1.0)}.get(token, _Size(0.0, 1.0))
        return self._command(token) if kind == "command" else _Size()

    def _command(self, token: str) -> _Size:
        """A command with all bracketed arguments that follow it."""
        if token == r"\exp":
            return self._exponential()
        size = _Size(0.5, 1.0) if token == r"\pi" else _Size(0.0, 1.0)
        while self._next_is("open"):
            self._tokens.pop()
            size = _product(size, self._group())
        return _factorial(size) if token in self._BINOMIALS else size

    def _exponential(self) -> _Size:
        size = _Size(0.5, 1.0)
        if self._next_is("power"):
            self._tokens.pop()
            size = _power(size, self._exponent())
        if self._next_is("open"):
            return _power(size, self._exponent())
        argument = self._group()  # no brackets, so it may reach to the end of this group, which is still to be closed
        self._tokens.append(("close", ")"))
        return _power(size, argument)

    def _exponent(self) -> _Size:
        """The next atom with the powers on it, which bind first: a tower counts from its top."""
        while self._next_is("operator"):
            self._tokens.pop()
        if not self._tokens or self._next_is("close"):
            return _Size()
        exponent = self._atom(*self._tokens.pop())
        while self._tokens and self._tokens[-1][0] in ("power", "factorial", "e_notation"):
            kind, token = self._tokens.pop()
            if kind == "power":
                exponent = _power(exponent, self._exponent())
            else:
                exponent = _factorial(exponent) if kind == "factorial" else _product(exponent, self._atom(kind, token))
        return exponent

    def _next_is(self, kind: str) -> bool:
        return bool(self._tokens) and self._tokens[-1][0] == kind


def _log10(number: str) -> float:
    """Bounds |log10| of a decimal number from above, and is at least log10 2."""
    return math.log10(max(int(number), 2)) if number.isdecimal() else float(len(number))


def _value(size: _Size) -> float:
    return 10.0 ** min(size.digits, 9.0)


def _product(a: _Size, b: _Size) -> _Size:
    return _Size(a.digits + b.digits, a.degree + b.degree, a.log_terms + b.log_terms)


def _power(base: _Size, exponent: _Size) -> _Size:
    n = _value(exponent)
    if not base.degree:
        return _Size(base.digits * n)
    # A sum of v variables to the n has (v + n - 1 over n) terms
    v = max(base.degree, 1.0)
    return _Size(base.digits * n, v * n, math.lgamma(v + n) - math.lgamma(n + 1.0) - math.lgamma(v))


def _factorial(size: _Size) -> _Size:
    return _Size(size.digits * _value(size), size.degree * _value(size), size.log_terms)


# ---- 3. math-verify, in a worker ----

# The deadline of a comparison is CPU time, which the worker limits by itself: a busy machine changes no verdict. This
# factor is for what does not compute. It also keeps one call of `AnswerChecker.check` below a collective's time-out.
_WALL_CLOCK_FACTOR = 12


class _Process:
    """A running worker process and the two pipes to it."""

    _START_DEADLINE = 300.0

    def __init__(self, arguments: list[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of sets must not reach a verdict
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self.num_requests = 0
        self._wait_until_ready()

    def ask(self, request: bytes, timeout: float) -> bytes | None:
        """One byte of reply; empty if the process is gone, `None` if the time is over."""
        self.num_requests += 1
        try:
            self._requests.write(request)
        except BrokenPipeError:
            return b""
        return self._read(timeout)

    def kill(self) -> int:
        """End the process and return its exit code, which tells if it had ended before."""
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
    """A place for one process: started when first asked, killed when it hangs, replaced when it died."""

    _CHECKS_PER_PROCESS = 2000  # then a fresh one: the caches of sympy and of the LaTeX parser grow

    def __init__(self, deadline: float, memory_limit: int, verify_path: str | None):
        self._deadline = deadline
        self._arguments = [str(deadline), str(memory_limit), *([verify_path] if verify_path else [])]
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def check(self, gold: str, answer: str) -> Verdict:
        request = json.dumps([gold, answer]).encode() + b"\n"
        for _ in range(3):  # killed from outside while idle and again while it checks: that must not change a verdict
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
        num_workers: Processes that run math-verify. They start when the first answer comes that is not a plain number.
        deadline: Seconds of CPU time for one comparison, far more than what the limits let through needs.
        memory_limit: Bytes of address space of a worker.
        cache_size: Verdicts kept, least recently used first out.
        verify_path: For tests: `file.py:function` to call in the worker in place of `math_verify_equal`.
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
            RuntimeError: No worker can be started. No text is a reason to raise.
        """
        keys = [(clean_answer(gold), clean_answer(answer)) for gold, answer in pairs]
        with self._lock:
            known = {key: quick_verdict(*key) or self._cached(key) for key in keys}
            verified = self._verify([key for key, verdict in known.items() if verdict is None])
        return [known[key] or verified[key] for key in keys]

    def close(self) -> None:
        """End the workers. A later `check` starts them again."""
        if os.getpid() == self._owner:  # not from a process that was forked off this one
            for worker in self._workers:
                worker.kill()

    def _verify(self, keys: list[tuple[str, str]]) -> dict[tuple[str, str], Verdict]:
        if not keys:
            return {}
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)
        give_up = time.monotonic() + _WALL_CLOCK_FACTOR * self._deadline

        def verify(key: tuple[str, str]) -> Verdict:
            if time.monotonic() > give_up:
                return Verdict.TIMEOUT
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
    """The checker of this process; one forked off it gets its own."""
    return _checker_of_process(os.getpid())


# ---- The worker's side ----

_MATH_ENVIRONMENT = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_PROSE = re.compile(r"(?<!\S)(?!(?:and|sqrt|sin|cos|tan|cot|sec|csc|log|exp|inf)\b)[A-Za-z]{3,}(?![^\s.,:;!?])")


def math_verify_equal(gold: str, answer: str) -> bool:
    """Whether math-verify finds two cleaned answers equal. Without bounds on time and memory: for the worker."""
    from math_verify import verify
    from sympy.core.random import seed

    seed(0)  # simplify tests some identities at random points
    return verify(_parse(gold), _parse(answer), timeout_seconds=None)


def _parse(text: str) -> list:
    """What math-verify extracts from an answer.

    It looks for LaTeX only inside of a math environment, and elsewhere for numbers: of a bare `2x+3` it reads the 2.
    So an answer is put into one, unless it brings its own or is prose, where the last number counts (`72 dollars`).
    """
    from math_verify import parse

    read = functools.partial(parse, fallback_mode="no_fallback", parsing_timeout=None)
    if _MATH_ENVIRONMENT.search(text):
        return read(text)
    if "\\" not in text and _PROSE.search(text):
        return read(text) or read(f"${text}$")
    return read(f"${text}$")


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
    """Answer each line `[gold, answer]` by one byte, `1` or `0`, until the standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer; this process ends with its input
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no reply
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
            os._exit(1)  # the parent tries once more in a fresh process
        except Exception:  # an answer that cannot be read equals nothing
            equal = False
        replies.write(b"1" if equal else b"0")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
