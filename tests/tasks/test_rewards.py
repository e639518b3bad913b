"""Rewards: what they mean, that math-verify agrees, and that no text and no worker can hurt a training run."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_entropy.tasks import rewards
from trl_entropy.tasks.answers import (
    AnswerChecker,
    Verdict,
    clean_answer,
    plain_number,
    quick_verdict,
    reject_reason,
    shared_checker,
)
from trl_entropy.tasks.answers.limits import _SizeBound
from trl_entropy.tasks.answers.worker import math_verify_equal
from trl_entropy.tasks.rewards import (
    extract_answer,
    format_reward,
    is_well_formed,
    tag_math_correct,
    tag_pref,
    think_length,
)

EQUAL, DIFFERENT, REJECTED = Verdict.EQUAL, Verdict.DIFFERENT, Verdict.REJECTED


def answered(content: str) -> str:
    return f"some thoughts</think>\n<answer>{content}</answer>"


def reward(func, completion, gold) -> float:
    (value,) = func(prompts=["p"], completions=[completion], completion_ids=[[1]], answer=[gold])
    return value


# ---- What the rewards mean ----


@pytest.mark.parametrize(
    ("text", "answer", "pref", "math_correct"),
    [
        ("<answer>5</answer>", "5", 1.0, 1.0),
        ("x</think><answer> 5\n</answer> and more", " 5\n", 1.0, 1.0),
        ("<answer>4</answer>", "4", 0.0, 0.0),
        ("<answer>4</answer><answer>5</answer>", "5", 0.0, 1.0),
        ("<answer>5</answer><answer>4</answer>", "4", 0.0, 0.0),
        ("<answer>5</answer> <answer>", "5", 0.0, 1.0),
        ("<answer>5</answer> </answer>", "5", 0.0, 1.0),
        ("<answer><answer>5</answer></answer>", "5", 0.0, 1.0),
        ("</answer>5<answer>", None, 0.0, 0.0),
        ("<answer>5", None, 0.0, 0.0),
        ("5</answer>", None, 0.0, 0.0),
        ("<ANSWER>5</ANSWER>", None, 0.0, 0.0),
        ("<answer></answer>", "", 0.0, 0.0),
        ("5", None, 0.0, 0.0),
        ("", None, 0.0, 0.0),
    ],
)
def test_answer_tags(text: str, answer: str | None, pref: float, math_correct: float) -> None:
    assert extract_answer(text) == answer
    assert reward(tag_pref, text, "5") == pref
    assert reward(tag_math_correct, text, "5") == math_correct


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("thoughts</think>\n<answer>5</answer>", True),
        ("</think><answer>anything at all</answer> \n", True),
        ("thoughts <answer>5</answer>", False),
        ("thoughts</think> so <answer>5</answer>", False),
        ("thoughts</think><answer>5</answer>.", False),
        ("thoughts</think></think><answer>5</answer>", False),
        ("<think>thoughts</think><answer>5</answer>", False),
        ("<answer>5</answer></think><answer>5</answer>", False),
        ("thoughts</think><answer>5</answer><answer>5</answer>", False),
        ("thoughts</think><answer>5", False),
        ("thoughts</think></answer>5<answer>", False),
        ("thoughts</think><answer>", False),
        ("", False),
    ],
)
def test_format(text: str, well_formed: bool) -> None:
    assert is_well_formed(text) is well_formed
    assert reward(format_reward, text, None) == float(well_formed)


def test_conversations_and_texts_are_read_alike() -> None:
    text = answered("5")
    message = [{"role": "assistant", "content": text}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": text}, {"type": "image"}]}]
    tool = [{"role": "assistant", "content": None}, {"role": "tool", "content": "<answer>6</answer>"}, *message]
    for completion in (text, message, parts, tool):
        assert [reward(func, completion, "5") for func in (tag_pref, tag_math_correct, format_reward)] == [1.0] * 3
        assert think_length(completion) == len("some thoughts")
    assert think_length("never closed") == len("never closed")
    assert reward(tag_pref, [], "5") == 0.0


def test_missing_column_is_an_error_that_says_what_to_add() -> None:
    with pytest.raises(ValueError, match=r"dataset column `answer`.*solution"):
        tag_pref(prompts=["p"], completions=["x"], completion_ids=[[1]], solution=["5"])


def test_gold_answers_of_any_type(caplog: pytest.LogCaptureFixture) -> None:
    golds = [72, 72.0, "72", "$72", "**72**", None, "", float("nan"), True, "7" * 500, "\x00"]
    for _ in range(2):
        values = tag_pref(prompts=None, completions=[answered("72")] * len(golds), answer=golds)
        assert values == [1.0] * 5 + [0.0] * 6
    assert sorted(record.getMessage()[:16] for record in caplog.records) == [
        "a gold answer is",
        "the gold answer ",
        "the gold answer ",
    ]


# ---- math-verify decides, and where it is not asked it would have said the same ----

EQUAL_ANSWERS = [
    ("72", "72 dollars"),
    ("72", r"\frac{144}{2}"),
    ("72", r"\boxed{72}"),
    ("72", "x = 72"),
    ("72", "The answer is 72."),
    ("5", "5 cm"),
    ("50", r"50\%"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"1\frac{1}{2}", "3/2"),
    (r"\sqrt{2}", "sqrt(2)"),
    ("2x+3", "3 + 2x"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1, 2\}", "2, 1"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    (r"\text{east}", "east"),
    ("2^{2023}", r"2 \cdot 2^{2022}"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\binom{5}{2}", "10"),
    ("1+2i", "2i+1"),
]
DIFFERENT_ANSWERS = [
    ("72", "27 dollars"),
    ("2", "2x+3"),
    ("2x+3", "2"),
    ("3", "3 and 4"),
    ("3", "3 or 4"),
    ("72", "72 or 73 dollars"),
    ("1000", "1 000 1"),
    (r"\frac{1}{2}", "0.4999"),
    ("5", "the"),
    ("5", r"\frac{1}{"),
]


def test_math_verify_is_asked() -> None:
    pairs = EQUAL_ANSWERS + DIFFERENT_ANSWERS
    assert all(quick_verdict(gold, answer) is None for gold, answer in pairs), "these shall reach a worker"
    expected = [EQUAL] * len(EQUAL_ANSWERS) + [DIFFERENT] * len(DIFFERENT_ANSWERS)
    assert dict(zip(pairs, shared_checker().check(pairs), strict=True)) == dict(zip(pairs, expected, strict=True))


def spellings(rng: random.Random) -> list[str]:
    """Ways to write a number, and one of another number that looks like it."""
    whole, decimals = (
        rng.choice([0, 7, 12, 100, 1234, 98765, 1234567]),
        rng.choice(["", "0", "5", "50", "125", "000001"]),
    )
    sign = rng.choice(["", "", "-", "+", "−"])
    point = f".{decimals}" if decimals else rng.choice(["", ".", ".0", ".00"])
    forms = [f"{sign}{whole}{point}", f"{sign}{whole:,}{point}", f"{sign}00{whole}{point}", f"${whole:,}{point}"]
    return [*forms, f"{sign}{whole + rng.choice([-1, 1, 10])}{point}", f"{sign}{point}" if decimals else f"{whole}0"]


def test_plain_numbers_agree_with_math_verify() -> None:
    rng = random.Random(0)
    pairs = {pair for _ in range(40) for pair in itertools.product(spellings(rng), repeat=2) if rng.random() < 0.5}
    decided = {True: 0, False: 0}
    for pair in sorted(pairs):
        gold, answer = map(clean_answer, pair)
        if plain_number(gold) is None or plain_number(answer) is None:
            continue
        expected = gold == answer or math_verify_equal(gold, answer)
        assert quick_verdict(gold, answer) is (EQUAL if expected else DIFFERENT), (gold, answer)
        decided[expected] += 1
    assert min(decided.values()) > 100


@pytest.mark.parametrize(
    "text",
    [
        "1,23",
        "1,2345",
        "12,34,567",
        "0,123",
        "5%",
        "1/2",
        "1e5",
        "-$5",
        "$",
        ".",
        "-",
        "٣",
        "1.2345678",
        "1234567890123",
    ],
)
def test_not_a_plain_number(text: str) -> None:
    assert plain_number(text) is None


def test_plain_numbers_need_no_worker_and_no_time() -> None:
    checker = AnswerChecker(verify_path="does_not_exist.py:verify")
    start = time.perf_counter()
    assert checker.check([(str(i), f"{i}.0") for i in range(10_000)]) == [EQUAL] * 10_000
    assert time.perf_counter() - start < 5


# ---- Limits: a function of the text, before any clock runs ----


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9^9^9", "size"),
        ("9**9**9", "size"),
        ("9^{9^{9}}", "size"),
        ("(9^{99})^{99}", "size"),
        (")9^9^9", "size"),
        ("2^1E9", "size"),
        ("1E99999", "size"),
        ("٩^٩٩٩٩٩٩", "size"),
        ("9^1'0'0'0'0", "size"),
        ("99999!", "size"),
        ("5!!", "size"),
        ("(9999999)_{5}", "size"),
        (r"2^\frac{99999}{1}", "size"),
        (r"|99^{99}|^{99}", "size"),
        (r"\exp(\exp(99))", "size"),
        (r"\exp 99\cdot 99\cdot 99", "size"),
        (r"\binom{99999}{5}", "size"),
        (r"\binom{\alpha}{99}", "size"),
        (r"(x+1)^{9999}", "size"),
        (r"(a+b+c+d+f)^{10}", "size"),
        (r"\begin{pmatrix}a&b\\c&d\end{pmatrix}^{20}", "size"),
        ("((((((((((1))))))))))", "nesting"),
        ("x_" * 20, "nesting"),
        ("|x|" * 10, "nesting"),
        ("1" * 200, "digits"),
        ("+".join("x" * 200), "length"),
        ("a\x00b", "characters"),
        ("\x1b[31m5", "characters"),
        ("\ud800", "characters"),
        ("\u202e5", "characters"),
        (r"\int x", "command"),
        (r"\in\!t x", "command"),
        (r'\in"t x', "command"),
        (r"\\sum x", "command"),
        (r"\operatorname{eye}(99999)", "command"),
        (r"\begin{vmatrix}1\end{vmatrix}", "command"),
        *[(gold, None) for gold, _ in EQUAL_ANSWERS],
        ("The answer is that every one of the twelve children gets 5 apples and there are 3 apples left over.", None),
        (r"\left(-\infty, -\frac{1}{2}\right) \cup [3, \infty)", None),
        (r"3x^{10} - 2x^5y^5 + (x+y)^{10}", None),
        (r"\frac{-b \pm \sqrt{b^2 - 4ac}}{2a}", None),
        (r"10^{-23}", None),
        (r"e^{x^2}", None),
    ],
)
def test_limits(text: str, reason: str | None) -> None:
    assert reject_reason(clean_answer(text)) == reason


EXPRESSIONS = st.recursive(
    st.integers(0, 12).map(lambda n: (str(n), n)),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda ab: (f"({ab[0][0]}+{ab[1][0]})", ab[0][1] + ab[1][1])),
        st.tuples(inner, inner).map(lambda ab: (rf"({ab[0][0]}\cdot {ab[1][0]})", ab[0][1] * ab[1][1])),
        st.tuples(inner, st.integers(0, 9)).map(lambda ab: (rf"{{{ab[0][0]}}}^{{{ab[1]}}}", ab[0][1] ** ab[1])),
        st.tuples(st.integers(0, 5), inner).map(
            lambda ab: (f"{ab[0]}^{{{ab[1][0]}}}", ab[0] ** ab[1][1] if ab[1][1] < 2000 else 1)
        ),
        inner.map(lambda a: (f"({a[0]})!", math.factorial(a[1]) if a[1] < 200 else 1)),
    ),
    max_leaves=5,
)


@given(EXPRESSIONS)
@settings(max_examples=200, deadline=None)
def test_size_bound_is_an_upper_bound(expression: tuple[str, int]) -> None:
    text, value = expression
    assert _SizeBound(text).of_text().digits >= math.log10(max(value, 1)) - 1e-9


# ---- No text can crash, hang or slow a reward ----

HOSTILE = [
    "",
    " \n\t",
    "\x00",
    "5\x00",
    "\x1b[2J\x1b[31m5\x1b[0m",
    "\ud800\udfff",
    "\u202e5\u202c",
    "5\u200b",
    "\x07" * 1000,
    "9" * 10**6,
    "-" * 10**5 + "5",
    "9^9^9^9",
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "((9^{99})^{99})^{99}",
    "99999999!",
    "5!!!!!!",
    r"\binom{10^9}{10^8}",
    "1E999999999",
    r"\frac{1}{" * 5000 + "1" + "}" * 5000,
    r"\frac{1}{1+" * 8 + "x" + "}" * 8,
    r"\frac" * 40,
    r"\sqrt{" * 100000,
    "(" * 10**6,
    "{" * 8 + "2" + "}" * 8,
    "[(" * 4 + "1,2" + ")]" * 4,
    r"\left(" * 20 + "1",
    "|" * 200,
    "|x|" * 6,
    "$" * 200,
    "$5$ or " * 30,
    r"\[" * 80,
    "answer " * 30 + "5",
    "answer: " + "1 " * 50 + "=",
    "final answer is " * 15,
    "1 + " * 60,
    "1,1," * 40,
    " " * 10**6 + "5",
    "x=" * 100,
    "x_{" * 10,
    r"\text{" * 8 + "a" + "}" * 8,
    "\\" * 250,
    "%" * 250,
    "^" * 250,
    "!" * 250,
    "_" * 10,
    "=" * 250,
    r"\int_0^\infty \frac{\sin^9 x}{x^9} dx",
    r"\sum_{i=1}^{10^{9}} i^i",
    r"\prod_{i=1}^{10^9} i",
    r"\begin{pmatrix}" * 10,
    r"\begin{vmatrix}" + r"a&b&c&d&e&f\\" * 6 + r"\end{vmatrix}",
    r"\operatorname{eye}(100000)",
    r"\sin(10^{999})",
    r"\cos(\pi/9999)",
    "import os; os.system('true')",
    "__import__('os')._exit(1)",
    "{0.__class__}",
    "5</answer",
    "<answer>5",
    "<answer>" * 10**5,
    "</answer>" * 10**5,
    "<answer></answer>" * 10**5,
]


def test_hostile_texts() -> None:
    start = time.perf_counter()
    completions = [form for text in HOSTILE for form in (text, answered(text))]
    metrics: dict[str, float] = {}
    for gold in ("5", r"\frac{x}{2}"):
        golds = [gold] * len(completions)
        for func in (tag_pref, tag_math_correct, format_reward):
            values = func(
                prompts=None,
                completions=completions,
                completion_ids=None,
                answer=golds,
                log_metric=metrics.__setitem__,
            )
            assert len(values) == len(completions) and set(values) <= {0.0, 1.0}
    assert metrics["answer_check/timeout_fraction"] == metrics["answer_check/failed_fraction"] == 0.0
    assert time.perf_counter() - start < 60
    assert set(tag_pref(None, [answered("5")] * len(HOSTILE), answer=HOSTILE)) <= {0.0, 1.0}, "as gold answers, too"


TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Nd"]), max_size=20),
    st.lists(
        st.sampled_from(
            [*r"0123456789xyei+-*/^_=!%$(){}[]|,.\& ", r"\frac", r"\sqrt", r"\cdot", r"\pi", "\\\\", "answer"]
        ),
        max_size=25,
    ).map("".join),
    st.lists(st.sampled_from(["<answer>", "</answer>", "</think>", "<think>", "5", " "]), max_size=8).map("".join),
)


@given(TEXTS, st.one_of(st.just("5"), st.none(), st.integers(), TEXTS))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_gives_zero_or_one(text: str, gold: str | int | None) -> None:
    for completion in (text, answered(text)):
        pref, correct, form = (reward(func, completion, gold) for func in (tag_pref, tag_math_correct, format_reward))
        assert {pref, correct, form} <= {0.0, 1.0}
        assert pref <= correct


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_limits_never_raise(text: str) -> None:
    assert reject_reason(clean_answer(text)) in (None, "length", "characters", "digits", "nesting", "command", "size")


def test_long_texts_take_linear_time() -> None:
    start = time.perf_counter()
    for unit in ("<answer>", "</answer>", "<answer>5</answer>", "<", "</think>", " ", "<answer> </think>"):
        text = unit * (3 * 10**6 // len(unit))
        reward(tag_pref, text, "5"), reward(tag_math_correct, text, "5"), reward(format_reward, text, "5")
    assert time.perf_counter() - start < 10


# ---- Workers can hang, die and run out of memory ----


@pytest.fixture
def make_checker(tmp_path: Path):
    """A checker whose workers run `verify(gold, answer)` from the given source, with `here` their directory."""
    checkers: list[AnswerChecker] = []

    def make(source: str, **kwargs) -> AnswerChecker:
        path = tmp_path / "verify_for_tests.py"
        head = "import os, sys, time, pathlib\nhere = pathlib.Path(__file__).parent\n"
        path.write_text(head + textwrap.dedent(source))
        checkers.append(AnswerChecker(verify_path=f"{path}:verify", **kwargs))
        return checkers[-1]

    yield make
    for checker in checkers:
        checker.close()


def pairs_of(*answers: str) -> list[tuple[str, str]]:
    return [("gold", answer) for answer in answers]


def wait_for(path: Path) -> str:
    end = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.01)
    return path.read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid: int) -> None:
    end = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < end, "the worker outlived its trainer"
        time.sleep(0.01)


@pytest.mark.parametrize("hang", ["time.sleep(1000)", "while True: pass", "'x' * 9 + str(9 ** 9 ** 8)"])
def test_hang_is_a_timeout(make_checker, hang: str) -> None:
    checker = make_checker(
        f"def verify(gold, answer):\n    if answer == 'hang':\n        {hang}\n    return True\n", deadline=0.2
    )
    start = time.monotonic()
    assert checker.check(pairs_of("hang", "a", "b")) == [Verdict.TIMEOUT, EQUAL, EQUAL]
    assert checker.check(pairs_of("hang")) == [Verdict.TIMEOUT], "remembered, not waited for again"
    assert time.monotonic() - start < 30


def test_one_call_is_bounded_even_if_every_comparison_hangs(make_checker) -> None:
    checker = make_checker("def verify(gold, answer):\n    time.sleep(1000)\n", deadline=0.1)
    start = time.monotonic()
    assert set(checker.check(pairs_of(*(f"hang {i}" for i in range(50))))) == {Verdict.TIMEOUT}
    assert time.monotonic() - start < 20, "50 comparisons one after the other would take 30 s"


def test_timeouts_are_logged_and_training_goes_on(make_checker, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = make_checker(
        "def verify(gold, answer):\n    time.sleep(1000 * (answer == 'hang'))\n    return True\n", deadline=0.1
    )
    monkeypatch.setattr(rewards, "shared_checker", lambda: checker)
    contents = ["hang", "fine", "9^9^9", "gold"]
    for func in (tag_pref, tag_math_correct):
        metrics: dict[str, float] = {}
        completions = [*map(answered, contents), "no answer", "<answer>", "", ""]
        assert func(None, completions, answer=["gold"] * 8, log_metric=metrics.__setitem__) == [0, 1, 0, 1, 0, 0, 0, 0]
        assert metrics == {
            "answer_check/timeout_fraction": 1 / 8,
            "answer_check/rejected_fraction": 1 / 8,
            "answer_check/failed_fraction": 0.0,
        }


def test_killed_in_the_middle_of_a_check(make_checker, tmp_path: Path) -> None:
    checker = make_checker(
        """
        def verify(gold, answer):
            if not (here / "pid").exists():
                (here / "pid").write_text(str(os.getpid()))
                time.sleep(1000)
            return True
        """
    )
    killer = threading.Thread(target=lambda: os.kill(int(wait_for(tmp_path / "pid")), signal.SIGKILL))
    killer.start()
    assert checker.check(pairs_of("answer")) == [EQUAL]
    killer.join()


def test_killed_while_idle(make_checker, tmp_path: Path) -> None:
    checker = make_checker(
        "def verify(gold, answer):\n    (here / 'pid').write_text(str(os.getpid()))\n    return True\n", num_workers=1
    )
    assert checker.check(pairs_of("a")) == [EQUAL]
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert checker.check(pairs_of("b")) == [EQUAL]


@pytest.mark.parametrize("death", ["os._exit(3)", "os.abort()", "bytearray(2 << 30)"])
def test_death_and_memory_are_a_failure_of_that_answer_only(make_checker, death: str) -> None:
    checker = make_checker(
        f"def verify(gold, answer):\n    if answer == 'die':\n        {death}\n    return True\n", num_workers=1
    )
    assert checker.check(pairs_of("a", "die", "b")) == [EQUAL, Verdict.FAILED, EQUAL]


def test_memory_limit_is_the_workers_own(make_checker) -> None:
    source = "import resource\ndef verify(gold, answer):\n    return resource.getrlimit(resource.RLIMIT_AS)[0] == "
    source += "int(answer)\n"
    assert make_checker(source, memory_limit=300 << 20).check(pairs_of(str(300 << 20))) == [EQUAL]


def test_a_worker_that_cannot_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"did not start.*math-verify.*memory limit"):
        AnswerChecker(memory_limit=40 << 20).check(pairs_of("x + y"))


def test_exceptions_and_prints_of_the_verifier_are_harmless(make_checker) -> None:
    checker = make_checker("def verify(gold, answer):\n    print('1' * 9999)\n    raise RecursionError(answer)\n")
    assert checker.check(pairs_of("a", "b")) == [DIFFERENT, DIFFERENT]


def test_verdicts_keep_the_order_of_their_pairs(make_checker) -> None:
    checker = make_checker(
        "def verify(gold, answer):\n    time.sleep(0.02 * (len(answer) % 3))\n    return answer.endswith('y')\n"
    )
    answers = [letter * n + end for n in (1, 2, 3) for letter in "ab" for end in "yn"]
    assert checker.check(pairs_of(*answers, *answers)) == [EQUAL, DIFFERENT] * 12


def test_verdicts_are_remembered_within_bounds(make_checker, tmp_path: Path) -> None:
    source = (
        "def verify(gold, answer):\n    with open(here / 'calls', 'a') as calls:\n        calls.write(answer + ' ')\n"
    )
    checker = make_checker(source, num_workers=1, cache_size=2)
    for answers, expected in [
        ("aab", "a b"),
        ("ba", "a b"),
        ("c", "a b c"),
        ("a", "a b c"),
        ("b", "a b c b"),  # was used least recently, and had to go
    ]:
        assert checker.check(pairs_of(*answers)) == [DIFFERENT] * len(answers)
        assert (tmp_path / "calls").read_text().strip() == expected


# ---- Workers and the program around them ----


def test_worker_imports_neither_torch_nor_trl_nor_this_package(make_checker) -> None:
    source = "def verify(gold, answer):\n    return not {'torch', 'trl', 'trl_entropy'} & set(sys.modules)\n"
    assert make_checker(source).check(pairs_of("a")) == [EQUAL]


def run_script(tmp_path: Path, source: str) -> subprocess.Popen:
    script = tmp_path / "train_without_main_guard.py"
    script.write_text(textwrap.dedent(source))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)


CHECK_IN_A_SCRIPT = """
    import sys
    from trl_entropy.tasks.answers import shared_checker
    from trl_entropy.tasks.rewards import tag_pref
    print("started", tag_pref(None, ["<answer>x+1</answer>"], answer=["1+x"]), "torch" in sys.modules)
    print(*[worker.pid for worker in shared_checker()._workers if worker.pid], flush=True)
"""


def test_the_training_script_is_not_run_again_and_leaves_no_worker(tmp_path: Path) -> None:
    process = run_script(tmp_path, CHECK_IN_A_SCRIPT)
    output, _ = process.communicate(timeout=60)
    started, pids = output.splitlines()
    assert started == "started [1.0] False" and process.returncode == 0
    assert pids and not any(map(is_alive, map(int, pids.split())))


def test_workers_end_with_a_killed_trainer(tmp_path: Path) -> None:
    process = run_script(tmp_path, CHECK_IN_A_SCRIPT + "    import time\n    time.sleep(1000)\n")
    process.stdout.readline()
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert pids and all(map(is_alive, pids))
    process.kill()
    process.communicate()
    for pid in pids:
        wait_until_dead(pid)


def test_a_forked_process_leaves_the_workers_alone(make_checker) -> None:
    checker = make_checker("def verify(gold, answer):\n    return str(os.getpid()) == gold\n", num_workers=1)
    checker.check(pairs_of("a"))
    pid = checker._workers[0].pid
    child = os.fork()
    if child == 0:
        checker.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert checker.check([(str(pid), "b")]) == [EQUAL], "the same process answers"
