"""
Limits on a text and its value within which math-verify needs milliseconds and reads the whole text.

Which form an answer must have to earn a reward, `tasks/rewards.py` says.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from trl_entropy.tasks.answers.phrases import has_prose

MAX_CHARS = 256
MAX_DIGIT_CHARS = 120  # all digits of the text together
MAX_DEPTH = 8  # of brackets
MAX_SUBSCRIPTS = 10
MAX_BARS = 12
MAX_DIGITS = 1000.0  # of the largest number that the text can evaluate to
MAX_DEGREE = 100.0  # of the largest polynomial that the text can expand to
MAX_TERMS = 300.0  # of that polynomial

_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
# Commands with a bounded amount of work; not integrals, sums, limits, determinants, operator names or dots, which
# math-verify drops.
_COMMAND_NAMES = """
frac dfrac tfrac cfrac sqrt binom dbinom tbinom cdot times div pm mp left right mleft mright text textbf
textit textrm textnormal mathrm mathbf mathit mathbb mathcal mathsf mbox boxed fbox rm displaystyle textstyle pi
infty in notin cup cap setminus emptyset varnothing leq le geq ge leqslant geqslant lt gt neq ne approx equiv
sim to rightarrow percent circ degree angle triangle quad qquad sin cos tan cot sec csc arcsin arccos arctan log
ln lg exp overline underline bar vec hat tilde overrightarrow begin end lfloor rfloor lceil rceil
lvert rvert vert lVert rVert langle rangle mid gcd lcm mod pmod bmod prime ast star land lor wedge vee perp
parallel cong subset subseteq lbrace rbrace lbrack rbrack big Big alpha beta delta epsilon varepsilon zeta
eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Delta Theta
Lambda Xi Pi Sigma Phi Psi Omega ell hbar euro pounds checkmark
"""
_COMMANDS = frozenset(_COMMAND_NAMES.split())
_MATRICES = frozenset({"matrix", "pmatrix", "bmatrix", "Bmatrix"})
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_ROW_END = re.compile(r"\\\\")
# math-verify joins numbers that stand side by side, reads `1,2,...,n` as 1.2, and rounds decimals to six places
_MISREAD = re.compile(r"(?<!_)(?<!frac)(?<!frac )(?<!binom )[0-9]\.?\s+[0-9]|\.\.|…|(?<![0-9])0*\.0{5}")
_REMOVED = re.compile(r"\\!\s*|\\?\$|[\"']|\\displaystyle")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{([^{}]*)\}")


def reject_reason(text: str) -> str | None:
    """Why a cleaned text is not given to math-verify, else `None`. Depends on the text alone; takes linear time."""
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
    if has_prose(text, min_letters=4):  # math-verify reads a word as a product of its letters
        return "words"
    if _MISREAD.search(text):
        return "misread"
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
    """Upper bounds on digits, degree and terms of a text, LaTeX or not, when it is evaluated and expanded.

    Things side by side count as a product, which also bounds their sum (a number counts as at least 2). A power
    multiplies by the value of its exponent, `n!` and `\\binom` by the value of `n`. The bounds are coarse and ignore
    the syntax on purpose: no text may exceed its bound, and what they reject has no place in an answer.
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
        """Reads up to the closing bracket or the end of the text."""
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
        """A command with the arguments in brackets that follow it."""
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
        """The next atom with its own powers, which bind more tightly: a tower is evaluated from its top."""
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
