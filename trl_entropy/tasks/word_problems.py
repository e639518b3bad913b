"""The embedded task: word problems on small numbers, six kinds, with a held-out split that no training ever sees.

A problem is its kind, a name, an item and two or three numbers. Which split it belongs to is a property of the problem
(a hash of its id), so demonstrations, training and evaluation agree on it without sharing any state. Demonstrations
for the warm start are flawed in part, on purpose: a policy that has the skill but does not always use it leaves
reinforcement learning something to sharpen, and leaves entropy room to fall.
"""

import hashlib
import random
from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

from trl_entropy.tasks.r1_template import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, format_completion, format_prompt

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
ITEMS = ("apples", "books", "coins", "shells", "stamps", "cards", "pens", "eggs")
LEAD_WORDS = ("First", "So", "Now", "Then", "Here")
TEST_EVERY = 5  # one problem in five is held out
# The smallest kind, multiply, has 1,305 and 295 problems; drawing its last ones without repetition would take long.
MAX_PROBLEMS = {"train": 7_500, "test": 1_500}


class Kind(NamedTuple):
    """One kind of problem: its wording, the operator before each number but the first, and every number's range."""

    wording: str
    operators: str
    ranges: tuple[range, ...]


KINDS = {
    "add": Kind("{name} has {0} {item} and gets {1} more.", "+", (range(1, 10), range(1, 10))),
    "subtract": Kind("{name} has {0} {item} and gives away {1}.", "-", (range(3, 19), range(1, 10))),
    "multiply": Kind("{name} has {0} bags of {1} {item}.", "*", (range(2, 7), range(2, 7))),
    "add_subtract": Kind(
        "{name} has {0} {item}, gets {1} more and gives away {2}.", "+-", (range(1, 10), range(1, 10), range(1, 10))
    ),
    "multiply_add": Kind(
        "{name} has {0} bags of {1} {item} and gets {2} more.", "*+", (range(2, 7), range(2, 7), range(1, 10))
    ),
    "multiply_subtract": Kind(
        "{name} has {0} bags of {1} {item} and gives away {2}.", "*-", (range(2, 7), range(2, 7), range(1, 10))
    ),
}
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


class WordProblem(NamedTuple):
    """One problem; everything else about it follows from these four fields."""

    kind: str
    name: str
    item: str
    numbers: tuple[int, ...]

    @property
    def prompt_id(self) -> str:
        """A readable id that no seed, process or position changes, such as `add/Ana/apples/3/5`."""
        return "/".join((self.kind, self.name, self.item, *map(str, self.numbers)))

    @property
    def split(self) -> str:
        digest = hashlib.sha256(self.prompt_id.encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % TEST_EVERY == 0 else "train"

    @property
    def question(self) -> str:
        statement = KINDS[self.kind].wording.format(*self.numbers, name=self.name, item=self.item)
        return f"{statement} How many {self.item}?"

    @property
    def answer(self) -> int:
        return _results(KINDS[self.kind].operators, self.numbers)[-1]


def load_word_problems(split: str = "train", num_problems: int = 1024, seed: int = 0) -> "Dataset":
    """Draws distinct problems of one split, the kinds in turn.

    Args:
        split: `"train"` or `"test"`; a problem is in exactly one of them, whatever the seed.
        num_problems: How many problems, at most 7,500 of `"train"` and 1,500 of `"test"`; the kinds appear equally
            often (up to one).
        seed: Which problems are drawn, and in which order.

    Returns:
        A dataset with the columns `prompt`, `answer` (a string), `prompt_id` and `kind`.

    Raises:
        ValueError: If the split is unknown or has too few problems.
    """
    from datasets import Dataset

    problems = _draw_distinct(split, num_problems, seed)
    return Dataset.from_dict(
        {
            "prompt": [format_prompt(problem.question) for problem in problems],
            "answer": [str(problem.answer) for problem in problems],
            "prompt_id": [problem.prompt_id for problem in problems],
            "kind": [problem.kind for problem in problems],
        }
    )


def load_demonstrations(num_demonstrations: int = 16_000, seed: int = 0, flawed_share: float = 0.5) -> "Dataset":
    """Writes demonstrations for the warm start; problems of the train split only, drawn with replacement.

    Args:
        num_demonstrations: How many demonstrations.
        seed: Which problems, which lead words and which flaws.
        flawed_share: Probability that a demonstration carries a flaw: a result off by one or two, a guess, a wrong
            operator, or a missing tag, each equally likely. A flaw may by chance leave the answer right.

    Returns:
        A dataset with the columns `prompt`, `completion` (without the end token), `prompt_id` and `flaw`, the latter
        `"none"` or the name of the flaw.
    """
    from datasets import Dataset

    rng = random.Random(f"demonstrations/{seed}")
    rows = []
    for _ in range(num_demonstrations):
        problem = draw_problem(rng, "train", rng.choice(list(KINDS)))
        flaw = rng.choice(list(FLAWS)) if rng.random() < flawed_share else "none"
        completion = FLAWS[flaw](problem, rng) if flaw in FLAWS else demonstrate(problem, rng)
        row = {"prompt": format_prompt(problem.question), "completion": completion}
        rows.append(row | {"prompt_id": problem.prompt_id, "flaw": flaw})
    return Dataset.from_list(rows)


def demonstrate(problem: WordProblem, rng: random.Random) -> str:
    """Writes the right completion of a problem, each step led by a random word."""
    operators = KINDS[problem.kind].operators
    return _write(problem.numbers, operators, _results(operators, problem.numbers), rng)


def _results(operators: str, numbers: tuple[int, ...]) -> list[int]:
    results = [numbers[0]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        results.append(OPERATORS[operator](results[-1], number))
    return results[1:]


def _write(numbers: tuple[int, ...], operators: str, results: list[int], rng: random.Random) -> str:
    left = [numbers[0], *results]
    steps = [
        f"{rng.choice(LEAD_WORDS)} {a}{operator}{b}={result}"
        for a, operator, b, result in zip(left, operators, numbers[1:], results, strict=False)
    ]
    return format_completion(" ".join(steps), str(results[-1]))


def _slip(problem: WordProblem, rng: random.Random) -> str:
    """One result is off by one or two; the steps after it go on from there."""
    operators, slipped = KINDS[problem.kind].operators, rng.randrange(len(problem.numbers) - 1)
    value, results = problem.numbers[0], []
    for step, (operator, number) in enumerate(zip(operators, problem.numbers[1:], strict=True)):
        value = OPERATORS[operator](value, number) + (rng.choice((-2, -1, 1, 2)) if step == slipped else 0)
        results.append(value)
    return _write(problem.numbers, operators, results, rng)


def _guess(problem: WordProblem, rng: random.Random) -> str:
    return format_completion(f"{rng.choice(LEAD_WORDS)} guess", str(rng.randrange(1, 20)))


def _wrong_operator(problem: WordProblem, rng: random.Random) -> str:
    operators = list(KINDS[problem.kind].operators)
    place = rng.randrange(len(operators))
    operators[place] = rng.choice([operator for operator in OPERATORS if operator != operators[place]])
    return _write(problem.numbers, "".join(operators), _results("".join(operators), problem.numbers), rng)


def _missing_tag(problem: WordProblem, rng: random.Random) -> str:
    return demonstrate(problem, rng).replace(rng.choice((f" {THINK_CLOSE}", ANSWER_OPEN, ANSWER_CLOSE)), "")


FLAWS: dict[str, Callable[[WordProblem, random.Random], str]] = {
    "slip": _slip,
    "guess": _guess,
    "wrong_operator": _wrong_operator,
    "missing_tag": _missing_tag,
}


def draw_problem(rng: random.Random, split: str, kind: str) -> WordProblem:
    """Draws one problem of a kind uniformly from a split; no result on the way to its answer is negative."""
    while True:
        numbers = tuple(rng.choice(choices) for choices in KINDS[kind].ranges)
        problem = WordProblem(kind, rng.choice(NAMES), rng.choice(ITEMS), numbers)
        if min(_results(KINDS[kind].operators, numbers)) >= 0 and problem.split == split:
            return problem


def _draw_distinct(split: str, num_problems: int, seed: int) -> list[WordProblem]:
    if split not in MAX_PROBLEMS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if not 0 < num_problems <= MAX_PROBLEMS[split]:
        raise ValueError(f"num_problems of the {split} split: 1 to {MAX_PROBLEMS[split]}, got {num_problems}")
    rng = random.Random(f"{split}/{seed}")
    drawn: dict[WordProblem, None] = {}
    kinds = cycle(KINDS)
    while len(drawn) < num_problems:
        kind, num_before = next(kinds), len(drawn)
        while len(drawn) == num_before:
            drawn[draw_problem(rng, split, kind)] = None
    return list(drawn)
