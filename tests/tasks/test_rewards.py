"""Rewards: what they mean, that math-verify agrees, and that no text and no worker can hurt a training run."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trl_entropy.tasks import rewards
from trl_entropy.tasks.answers import (
    AnswerChecker,
    Verdict,
    clean_answer,
    expression,
    quick_verdict,
    reject_reason,
    shared_checker,
)
from trl_entropy.tasks.answers.limits import _SizeBound
from trl_entropy.tasks.answers.phrases import read_phrase
from trl_entropy.tasks.answers.worker import math_verify_equal
from trl_entropy.tasks.rewards import (
    extract_answer,
    format_reward,
    is_well_formed,
    tag_math_correct,
    tag_pref,
    think_length,
)

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
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
    rewards._warn_of_unusable.cache_clear()  # whatever another test has made it say already
    golds = [72, 72.0, "72", "$72", "**72**", None, "", float("nan"), True, "7" * 500, "\x00"]
    for _ in range(2):
        values = tag_pref(prompts=None, completions=[answered("72")] * len(golds), answer=golds)
        assert values == [1.0] * 5 + [0.0] * 6
    assert sorted(record.getMessage()[:16] for record in caplog.records) == [
        "a gold answer is",
        "the gold answer ",
        "the gold answer ",
    ]


@pytest.mark.parametrize("answer", ["", " ", "**", "72"])
def test_an_empty_gold_answer_earns_nothing_and_an_empty_answer_neither(answer: str) -> None:
    golds = [None, "", " ", "**", *(["72"] if answer != "72" else [])]
    assert tag_pref(prompts=None, completions=[answered(answer)] * len(golds), answer=golds) == [0.0] * len(golds)


# ---- Which answers are right ----

EXACT_ANSWERS = [  # equal without mathematics
    ("3.5", "3 1/2"),
    ("3.5", "3 and a half hours"),
    ("2.5", "2½"),
    ("2.25", "2 1/4 hours"),
    ("-2.5", "-2½"),
    ("12345", "12 345"),
    ("12345", "12\u202f345"),
    ("12345", r"12\,345"),
    ("12345", "12'345"),
    ("9500", "$9{,}500"),
    ("9500", "9 500"),
    ("-18", "-$18"),
    ("-18", "$-18"),
    ("-18", "- 18 dollars"),
    ("-18", "minus 18"),
    ("-18", "negative 18"),
    ("-18", "–18"),
    ("-18", "-18%"),
    ("-5", r"-5\%"),
    ("18", "18 km/h"),
    ("18", "18 cm^2"),
    ("18", r"18\text{ cm}^2"),
    ("18", r"18\,\mathrm{m/s}"),
    ("18", "18 L"),
    ("18", "€18"),
    ("18", "18 — as computed above"),
    ("18", "**18** dollars"),
    ("5", "5 ml"),
    ("5", "5:00 p.m."),
    ("5", "US$5.00 each"),
    ("70000", "$70,000"),
    ("70000", "70,000 dollars"),
    ("-5", r"\boxed{-5}"),
    ("28", "28%"),
    ("28", "28 percent"),
    ("0.5", "50%"),
    ("28%", "0.28"),
    ("42", r"\fbox{42}"),
    ("73", "**73**"),
    ("42", "42 is the number that we get from all this"),
    ("72", "72 dollars"),
    ("72", r"\boxed{72}"),
    ("72", "The answer is 72."),
    ("72", "5 apples + 67 apples = 72 apples"),
    ("72", r"\frac{144}{2}"),
    ("5", "5 cm"),
    ("5 cm", "5"),
    ("5 m", "5"),
    ("90", r"90^\circ"),
    ("50", r"50\%"),
    ("1/2", "0.5"),
    ("1/3", "0.333333"),
    (r"1\frac{1}{2}", "3/2"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", r"\frac{1}{2} cups"),
    (r"\text{east}", "East."),
    ("yes", r"\boxed{\text{Yes}}"),
    ("Paris", "The capital is Paris."),
    ("4210_{5}", "$4210_{5}$"),
    ("9 chickens and 10 rabbits", "9 chickens, 10 rabbits"),
]
NOT_EXACT_ANSWERS = [  # different or beyond the limits without mathematics
    ("2", "3 1/2"),
    ("17.5", "3 5/2"),
    ("3", "2 3/3"),
    ("2", "2½"),
    ("357", "12 345"),
    ("0", "70 000"),
    ("12", "1 2"),
    ("1000", "1 000 1"),
    ("18", "- 18 dollars"),
    ("18", "minus 18"),
    ("28", "0.28"),
    ("0.28", "28"),
    ("1", "100%"),
    ("1/3", "0.33"),
    ("1/3", "0.333334"),
    ("2/3", "0.67"),
    ("1/4", "0.3"),
    ("east", "seat"),
    ("no", "on"),
    ("even", "it is not even"),
    ("up", "pu"),
    ("Paris", "pairs"),
    ("east", r"s \cdot e \cdot a \cdot t"),
    ("72", "27 dollars"),
    ("4", "3 apples and 4 pears"),
    ("5", "3+4 apples and 5 pears"),
    ("72", "72 or 73 dollars"),
    ("20", "10 out of 20"),
    ("30", "5 hours 30 minutes"),
    ("9 chickens and 10 rabbits", "3 chickens and 10 rabbits"),
    ("9 chickens and 10 rabbits", "10 chickens and 9 rabbits"),
    ("1, 2, \\ldots, n", "1, 3, 5, \\ldots, 2n-1"),
    ("1,2,...,n", "1,2,...,m"),
    ("10^{-8}", "0.0000001"),
]
EQUAL_ANSWERS = [  # by math-verify
    ("72", "x = 72"),
    ("72", "The answer is 70+2 dollars."),
    ("x+1", "The answer is $x+1$."),
    (r"\frac{x}{2}", r"so we get \boxed{\frac{x}{2}} cups"),
    ("120", "5!"),
    (r"\sqrt{2}", "sqrt(2)"),
    ("2x+3", "3 + 2x"),
    ("x^2+2x+1", r"\(2x+x^2+1\)"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1, 2\}", "2, 1"),
    ("3, 4", "4 and 3"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    ("2^{2023}", r"2 \cdot 2^{2022}"),
    ("10^{-23}", r"1 \times 10^{-23}"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    (r"2\pi", r"2\pi\text{ cm}^2"),
    ("-3 < x < 5", "The answer is $-3 < x < 5$."),
    (r"\log_2 5", r"\(\log_2 5\)."),
    (r"2\sqrt{3}", r"2\sqrt{3}\,km/h"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\binom{5}{2}", "10"),
    ("1+2i", "2i+1"),
    ("2xyz", "2zyx"),
]
DIFFERENT_ANSWERS = [
    ("2", "2x+3"),
    ("2", "2xyz"),
    ("2", "2a"),
    ("2", "2 a"),
    ("2", "2ab"),
    ("2", "2t"),
    ("2", "2 pi"),
    ("2", "2 sin x"),
    ("5", "the"),
    ("5", "F(5)"),
    ("6", "Tom = 5, Ann = 6"),
    ("5", "5²"),
    ("5", "5m + 1"),
    ("18", "18!"),
    ("2x+3", "2"),
    ("3", "3 and 4"),
    ("4", "3 and 4"),
    ("3", "3 or 4"),
    ("6", "x = 5, y = 6"),
    ("5", r"\frac{1}{"),
    ("2^{-99}", "2^{-98}"),
    (r"1/2^{99}", r"1/2^{98}"),
    (r"\{e^{-50}\}", r"\{e^{-51}\}"),
    (r"1-1/\mathrm{e}", r"1+1/\mathrm{e}"),
]


@pytest.mark.parametrize(("gold", "answer"), EXACT_ANSWERS)
def test_right_answers_that_need_no_mathematics(gold: str, answer: str) -> None:
    assert quick_verdict(clean_answer(gold), clean_answer(answer)) is EQUAL


@pytest.mark.parametrize(("gold", "answer"), NOT_EXACT_ANSWERS)
def test_wrong_answers_that_need_no_mathematics(gold: str, answer: str) -> None:
    assert quick_verdict(clean_answer(gold), clean_answer(answer)) in (DIFFERENT, REJECTED)


def test_math_verify_is_asked() -> None:
    pairs = EQUAL_ANSWERS + DIFFERENT_ANSWERS
    quick = {pair: quick_verdict(*map(clean_answer, pair)) for pair in pairs}
    assert not any(quick.values()), "these shall reach a worker"
    expected = [EQUAL] * len(EQUAL_ANSWERS) + [DIFFERENT] * len(DIFFERENT_ANSWERS)
    assert dict(zip(pairs, shared_checker().check(pairs), strict=True)) == dict(zip(pairs, expected, strict=True))


def test_only_right_answers_earn_the_reward() -> None:
    right, wrong = EXACT_ANSWERS + EQUAL_ANSWERS, NOT_EXACT_ANSWERS + DIFFERENT_ANSWERS
    for pairs, expected in ((right, 1.0), (wrong, 0.0)):
        golds, answers = zip(*pairs, strict=True)
        assert set(tag_pref(None, [answered(answer) for answer in answers], answer=golds)) == {expected}


def test_no_record_of_gsm8k_loses() -> None:
    """The gold answer earns the reward, and so does the last calculation as the solution spells it, with its unit."""
    if not GSM8K.is_dir():
        pytest.skip("the GSM8K files are not beside this checkout")
    lost, num_spelled = [], 0
    for split, num_records in (("train", 7473), ("test", 1319)):
        lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == num_records
        for line in lines:
            solution, _, gold = json.loads(line)["answer"].rpartition("#### ")
            answer = gold.replace(",", "")
            forms = [gold, answer, *last_calculation(solution, answer)]
            num_spelled += len(forms) > 2
            lost += [(answer, form) for form in forms if quick_verdict(answer, clean_answer(form)) is not EQUAL]
    assert not lost
    assert num_spelled > 8000


def last_calculation(solution: str, answer: str) -> list[str]:
    """The number behind the last `<<...>>` with its sign and currency: alone, with one word, and to its clause's end.

    Nothing if it is not the answer, as where the last calculation is a check.
    """
    before, _, after = solution.rpartition(">>")
    prefix = re.search(r"[$€£]?\s?-?$", before.rpartition("<<")[0])[0]
    number = re.match(r"\s*[\d,]*\.?\d+", after)
    if number is None or float(number[0].replace(",", "")) != float(answer):
        return []
    text = prefix + after
    word = re.match(r"\D*[\d.,]+(:00)?(\S+| [^\s\d]{2,}(?=\s|$)|)", text)[0]
    clause = re.match(r"\D*[\d.,]+(:00)?[^\d\n]*?(?=[.!?;](\s|$)|\s\S*\d|\n|$)", text)[0]
    return [prefix + number[0], word, clause]


def spelled(number: Fraction) -> st.SearchStrategy[str]:
    """Ways to write a number, with units and currencies."""
    whole, rest = divmod(abs(number), 1)
    forms = [f"{abs(number)}", rf"\frac{{{abs(number).numerator}}}{{{number.denominator}}}"] if rest else []
    if rest and whole:
        forms += [f"{whole} {rest}", rf"{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}"]
    if number.denominator in (1, 2, 4, 5):
        decimal = f"{float(abs(number)):,.2f}"
        forms += [decimal, *(decimal.replace(",", comma) for comma in ("", " ", "{,}", r"\,", "'", "\u00a0"))]
    if not rest:
        forms += [f"{whole}", f"{whole:,}", f"{whole}."]
    around = ["{}", "${}", "{}$", "€{}", "{} dollars", "{} km/h", "{} L", "{} of them", "about {}", "**{}**"]
    around += [r"\boxed{{{}}}", "${}$", r"\({}\)", r"{}\text{{ cm}}^2", "we get {} in the end"]
    signs = ["-", "- ", "minus ", "–", "−"] if number < 0 else [""]
    return st.tuples(*map(st.sampled_from, (signs, forms, around))).map(
        lambda parts: parts[2].format(parts[0] + parts[1])
    )


NUMBERS = st.one_of(
    st.integers(-30, 30).map(Fraction),
    st.integers(-(10**7), 10**7).map(Fraction),
    st.fractions(-40, 40, max_denominator=8),
)


@given(NUMBERS.flatmap(lambda number: st.tuples(spelled(number), spelled(number))))
@settings(max_examples=500, deadline=None)
def test_every_spelling_of_a_number_is_equal_to_every_other(pair: tuple[str, str]) -> None:
    assert quick_verdict(*map(clean_answer, pair)) is EQUAL


@st.composite
def gold_and_other_numbers(draw: st.DrawFn) -> tuple[str, str]:
    gold = draw(NUMBERS)
    numbers = draw(st.lists(NUMBERS.filter(lambda number: number != gold), min_size=1, max_size=3))
    joint = draw(st.sampled_from([" and ", " or ", ", ", "; ", ". ", ": ", " : ", " = ", " out of ", " then "]))
    return draw(spelled(gold)), joint.join(draw(spelled(number)) for number in numbers)


@example(("we get minus 1.00 in the end", "1.00 and 1.00"))
@given(gold_and_other_numbers())
@settings(max_examples=300, deadline=None)
def test_an_answer_whose_numbers_all_differ_from_the_gold_answers_is_wrong(pair: tuple[str, str]) -> None:
    assert shared_checker().check([pair]) != [EQUAL]


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


def test_numbers_agree_with_math_verify() -> None:
    rng = random.Random(0)
    pairs = {pair for _ in range(40) for pair in itertools.product(spellings(rng), repeat=2) if rng.random() < 0.5}
    decided = {True: 0, False: 0}
    for pair in sorted(pairs):
        gold, answer = map(clean_answer, pair)
        if read_phrase(expression(gold)) is None or read_phrase(expression(answer)) is None:
            continue
        expected = gold == answer or math_verify_equal(expression(gold), expression(answer))
        assert quick_verdict(gold, answer) is (EQUAL if expected else DIFFERENT), (gold, answer)
        decided[expected] += 1
    assert min(decided.values()) > 100


@pytest.mark.parametrize(
    "text",
    [
        *["1,23", "1,2345", "12,34,567", "0,123", "1 23", "3 5/2", "1/0", "1/2/3", "1e5", "$", ".", "-", "٣", "5²"],
        *["5!", "3x", "2 xy", "2 pi", "x5", "5/x", "5 - 3", "5-3", "(1, 2)", "18.5.3", "F(5)", "2sinx", "COVID-19"],
    ],
)
def test_not_a_number(text: str) -> None:
    assert read_phrase(text) is None


def test_numbers_need_no_worker_and_no_time() -> None:
    checker = AnswerChecker(verify_path="does_not_exist.py:verify")
    start = time.process_time()
    assert checker.check([(str(i), f"{i}.0") for i in range(10_000)]) == [EQUAL] * 10_000
    assert time.process_time() - start < 5


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
        (r"1, 2, \ldots, n", "command"),
        ("the answer is that every one of the twelve children gets 5 apples and 3 apples are left", "words"),
        (r"\frac{east}{2}", "words"),
        ("1 000 1", "misread"),
        ("1, 2, ..., n", "misread"),
        ("0.0000001x", "misread"),
        (r"\frac 1 2", None),
        ("2xyz", None),
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
    reasons = {None, "length", "characters", "digits", "nesting", "command", "words", "misread", "size"}
    assert {reject_reason(clean_answer(text)), reject_reason(expression(clean_answer(text)))} <= reasons
    read_phrase(clean_answer(text))


def test_long_texts_take_linear_time() -> None:
    start = time.process_time()
    for unit in ("<answer>", "</answer>", "<answer>5</answer>", "<", "</think>", " ", "<answer> </think>"):
        text = unit * (3 * 10**6 // len(unit))
        reward(tag_pref, text, "5"), reward(tag_math_correct, text, "5"), reward(format_reward, text, "5")
    assert time.process_time() - start < 10


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
    return [("x", answer) for answer in answers]


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
        f"def verify(gold, answer):\n    if answer == 'h':\n        {hang}\n    return True\n", deadline=0.2
    )
    start = time.monotonic()
    assert checker.check(pairs_of("h", "a", "b")) == [Verdict.TIMEOUT, EQUAL, EQUAL]
    assert checker.check(pairs_of("h")) == [Verdict.TIMEOUT], "remembered, not waited for again"
    assert time.monotonic() - start < 30


def test_the_end_of_its_cpu_time_is_a_timeout_however_busy_the_machine(make_checker) -> None:
    """The kernel's signal comes at once; the clock on the wall would take a hundred times as long."""
    end = "import os, signal\ndef verify(gold, answer):\n    os.kill(os.getpid(), signal.SIGXCPU)\n"
    checker = make_checker(end, deadline=25.0)
    start = time.monotonic()
    assert checker.check(pairs_of("h")) == [Verdict.TIMEOUT] and time.monotonic() - start < 12 * 25


def test_a_deadline_is_for_each_pair(make_checker) -> None:
    """Many comparisons on a busy machine, each within its deadline, take longer than the deadline of one."""
    checker = make_checker("def verify(gold, answer):\n    time.sleep(0.1)\n    return True\n", deadline=0.05)
    start = time.monotonic()
    assert checker.check(pairs_of(*(f"a+{i}" for i in range(40)))) == [EQUAL] * 40
    assert time.monotonic() - start > 12 * 0.05


def test_timeouts_are_logged_and_training_goes_on(make_checker, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = make_checker(
        "def verify(gold, answer):\n    time.sleep(1000 * (answer == 'h'))\n    return True\n", deadline=0.1
    )
    monkeypatch.setattr(rewards, "shared_checker", lambda: checker)
    contents = ["h", "f", "9^9^9", "x"]
    for func in (tag_pref, tag_math_correct):
        metrics: dict[str, float] = {}
        completions = [*map(answered, contents), "no answer", "<answer>", "", ""]
        assert func(None, completions, answer=["x"] * 8, log_metric=metrics.__setitem__) == [0, 1, 0, 1, 0, 0, 0, 0]
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
    assert checker.check(pairs_of("a")) == [EQUAL]
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
        f"def verify(gold, answer):\n    if answer == 'd':\n        {death}\n    return True\n", num_workers=1
    )
    assert checker.check(pairs_of("a", "d", "b")) == [EQUAL, Verdict.FAILED, EQUAL]


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
    answers = [f"{letter}+{n}{end}" for n in (1, 22, 333) for letter in "ab" for end in "yn"]
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


def test_a_process_is_replaced_before_its_caches_have_grown(make_checker, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("trl_entropy.tasks.answers.checker._Worker._CHECKS_PER_PROCESS", 2)
    source = "def verify(gold, answer):\n    with open(here / 'pids', 'a') as pids:\n"
    source += "        pids.write(f'{os.getpid()} ')\n"
    make_checker(source, num_workers=1).check(pairs_of("a", "b", "c", "d", "e"))
    pids = (tmp_path / "pids").read_text().split()
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 1]


def test_a_forked_process_has_a_checker_of_its_own() -> None:
    """With the one of its parent it would read replies that are for the parent."""
    checker, child = shared_checker(), os.fork()
    if child == 0:
        os._exit(shared_checker() is checker)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and shared_checker() is checker


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
