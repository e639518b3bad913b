"""The embedded agent's task: word problems on numbers of two digits, and a calculator to call.

A completion is an episode of two turns: the policy calls the calculator, reads the result, and answers. The numbers
are too large for a tiny model to reckon with, so that the reward depends on the call. Demonstrations for the warm
start are flawed in part, on purpose, as those of [`word_problems`] are.
"""

from __future__ import annotations

import hashlib
import random
import re
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

from trl_entropy.tasks.r1_template import ANSWER_CLOSE, ANSWER_OPEN
from trl_entropy.tasks.word_problems import ITEMS, LEAD_WORDS, NAMES, OPERATORS, TEST_EVERY, Kind
from trl_entropy.tasks.word_problems import KINDS as SMALL_KINDS

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {
    "add": SMALL_KINDS["add"]._replace(ranges=(range(10, 100), range(10, 100))),
    "subtract": SMALL_KINDS["subtract"]._replace(ranges=(range(50, 100), range(10, 50))),
    "multiply": SMALL_KINDS["multiply"]._replace(ranges=(range(2, 10), range(10, 100))),
}
MAX_PROBLEMS = {"train": 100_000, "test": 25_000}
_SUM = re.compile(r"(\d{1,9})([-+*])(\d{1,9})")


def calculate(expression: str) -> str:
    """
    Calculate a sum, a difference or a product.

    Args:
        expression: Two whole numbers with an operator between them, such as 37+58.

    Returns:
        The result.
    """
    found = _SUM.fullmatch(expression)
    if found is None:
        raise ValueError("no sum")
    return str(OPERATORS[found[2]](int(found[1]), int(found[3])))


class CalculatorEnvironment:
    """
    The calculator as an environment for TRL's `environment_factory`: `reset()` takes a row of the dataset. It gives no
    reward of its own.
    """

    def __init__(self) -> None:
        self.num_calls = 0

    def reset(self, **row: object) -> None:
        """Begin another episode; there is nothing to add to the prompt."""
        self.num_calls = 0

    def calculate(self, expression: str) -> str:
        """
        Calculate a sum, a difference or a product.

        Args:
            expression: Two whole numbers with an operator between them, such as 37+58.

        Returns:
            The result.
        """
        self.num_calls += 1
        return calculate(expression)


class CalculatorProblem(NamedTuple):
    """One problem; everything else about it follows from these fields."""

    kind: str
    name: str
    item: str
    numbers: tuple[int, int]

    @property
    def prompt_id(self) -> str:
        """A readable id that no seed, process or position changes, such as `add/Ana/apples/37/58`."""
        return "/".join((self.kind, self.name, self.item, *map(str, self.numbers)))

    @property
    def split(self) -> str:
        digest = hashlib.sha256(self.prompt_id.encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % TEST_EVERY == 0 else "train"

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The question, as the one message of a conversation."""
        statement = _kind(self).wording.format(*self.numbers, name=self.name, item=self.item)
        return [{"role": "user", "content": f"{statement} How many {self.item}?"}]

    @property
    def answer(self) -> str:
        return calculate(self.expression)

    @property
    def expression(self) -> str:
        """What to calculate."""
        return f"{self.numbers[0]}{_kind(self).operators}{self.numbers[1]}"


class Episode(NamedTuple):
    """
    A demonstration: what the policy says and calls, what the calculator gives, and what the policy says then.

    `expression` is None where nothing is called; then `last` alone follows the prompt.
    """

    first: str
    expression: str | None
    last: str


def load_calculator_problems(split: str = "train", num_problems: int = 1024, seed: int = 0) -> Dataset:
    """
    Draws distinct problems of one split, the kinds in turn.

    Args:
        split: `"train"` or `"test"`; a problem is in exactly one of them, whatever the seed.
        num_problems: how many, at most `MAX_PROBLEMS`.
        seed: which problems are drawn, and in which order.

    Returns:
        A dataset with the columns `prompt` (a conversation), `answer` (a string) and `prompt_id`.

    Raises:
        ValueError: if the split has too few problems.
    """
    from datasets import Dataset

    if not 0 < num_problems <= MAX_PROBLEMS[split]:
        raise ValueError(f"num_problems of the {split} split: 1 to {MAX_PROBLEMS[split]}, got {num_problems}")
    rng, drawn, kinds = random.Random(f"calculator/{split}/{seed}"), dict[CalculatorProblem, None](), cycle(KINDS)
    while len(drawn) < num_problems:
        kind, num_before = next(kinds), len(drawn)
        while len(drawn) == num_before:
            drawn[_draw(rng, split, kind)] = None
    return Dataset.from_list([{"prompt": p.prompt, "answer": p.answer, "prompt_id": p.prompt_id} for p in drawn])


def demonstrations(number: int, seed: int, flawed_share: float) -> list[tuple[CalculatorProblem, Episode]]:
    """
    Episodes for the warm start, of problems of the train split.

    Args:
        number: how many.
        seed: which problems, words and flaws.
        flawed_share: probability of a flaw: no call and a guess, a wrong operator, or another answer than the
            calculator's, each equally likely.
    """
    rng = random.Random(f"calculator/demonstrations/{seed}")
    found = []
    for _ in range(number):
        problem = _draw(rng, "train", rng.choice(list(KINDS)))
        write = rng.choice((_guess, _wrong_operator, _slip)) if rng.random() < flawed_share else _demonstrate
        found.append((problem, write(problem, rng)))
    return found


def _kind(problem: CalculatorProblem) -> Kind:
    return KINDS[problem.kind]


def _draw(rng: random.Random, split: str, kind: str) -> CalculatorProblem:
    while True:
        first, second = (rng.choice(numbers) for numbers in KINDS[kind].ranges)
        problem = CalculatorProblem(kind, rng.choice(NAMES), rng.choice(ITEMS), (first, second))
        if problem.split == split:
            return problem


def _demonstrate(problem: CalculatorProblem, rng: random.Random, expression: str = "", error: int = 0) -> Episode:
    expression = expression or problem.expression
    return Episode(_word(rng), expression, _answer(int(calculate(expression)) + error, rng))


def _guess(problem: CalculatorProblem, rng: random.Random) -> Episode:
    return Episode("", None, _answer(rng.randrange(10, 200), rng))


def _wrong_operator(problem: CalculatorProblem, rng: random.Random) -> Episode:
    own = _kind(problem).operators
    other = rng.choice([operator for operator in OPERATORS if operator != own])
    return _demonstrate(problem, rng, problem.expression.replace(own, other))


def _slip(problem: CalculatorProblem, rng: random.Random) -> Episode:
    return _demonstrate(problem, rng, error=rng.choice((-2, -1, 1, 2)))


def _word(rng: random.Random) -> str:
    return f" {rng.choice(LEAD_WORDS)}"


def _answer(result: int, rng: random.Random) -> str:
    return f"{_word(rng)} {ANSWER_OPEN}{result}{ANSWER_CLOSE}"
