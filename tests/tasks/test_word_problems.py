import random
import re
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.tasks.r1_template import R1_INSTRUCTION, format_completion, format_prompt
from trl_entropy.tasks.word_problems import (
    FLAWS,
    ITEMS,
    KINDS,
    MAX_PROBLEMS,
    NAMES,
    WordProblem,
    _draw_distinct,
    _results,
    demonstrate,
    draw_problem,
    load_demonstrations,
    load_word_problems,
)

ANSWER = re.compile(r" [^<>]* </think> <answer>(-?\d+)</answer>")


def solve(prompt: str) -> int:
    """Solves a problem from its words alone."""
    question = prompt.split("Question: ")[1]
    numbers = list(map(int, re.findall(r"\d+", question)))
    value = numbers[0] * numbers[1] if "bags" in question else numbers[0]
    for word, number in re.findall(r"(gets|gives away) (\d+)", question):
        value += int(number) if word == "gets" else -int(number)
    return value


def all_problems(kind: str) -> list[WordProblem]:
    numbers = [choice for choice in product(*KINDS[kind].ranges) if min(_results(KINDS[kind].operators, choice)) >= 0]
    return [WordProblem(kind, *rest) for rest in product(NAMES, ITEMS, numbers)]


def split_of(prompt_id: str) -> str:
    kind, name, item, *numbers = prompt_id.split("/")
    return WordProblem(kind, name, item, tuple(map(int, numbers))).split


def test_answers_are_right():
    dataset = load_word_problems("train", 1200)
    assert [str(solve(prompt)) for prompt in dataset["prompt"]] == dataset["answer"][:]
    assert set(Counter(dataset["kind"]).values()) == {200}


def test_a_problem_is_in_one_split():
    problems = all_problems("multiply") + all_problems("add")
    assert len({problem.question for problem in problems}) == len(problems), "two ids with one question would leak"
    assert {problem.split for problem in problems} == {"train", "test"}
    held_out = [problem.split == "test" for problem in problems]
    assert sum(held_out) / len(held_out) == pytest.approx(1 / 5, abs=0.02)


def test_splits_are_disjoint():
    train, test = load_word_problems("train", 1200), load_word_problems("test", 1200)
    assert not set(train["prompt_id"]) & set(test["prompt_id"])
    assert not set(train["prompt"]) & set(test["prompt"])


def test_the_smallest_kind_is_large_enough():
    sizes = Counter(problem.split for problem in all_problems("multiply"))
    assert all(sizes[split] * len(KINDS) >= most for split, most in MAX_PROBLEMS.items())
    assert len(set(_draw_distinct("test", MAX_PROBLEMS["test"], 0))) == MAX_PROBLEMS["test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_drawing(split):
    first, again, other = (load_word_problems(split, 100, seed) for seed in (3, 3, 4))
    assert first.column_names == ["prompt", "answer", "prompt_id", "kind"]
    assert first[:] == again[:]
    assert first["prompt_id"][:] != other["prompt_id"][:]
    assert len(set(first["prompt_id"])) == 100


def test_another_process_draws_the_same():
    code = "from trl_entropy.tasks import word_problems as w; "
    code += "print([p.prompt_id for p in w._draw_distinct('test', 30, 5)])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == str([problem.prompt_id for problem in _draw_distinct("test", 30, 5)])


def test_importing_the_data_imports_no_torch():
    code = "import sys, trl_entropy.tasks.word_problems; assert not {'torch', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("split, num_problems", [("train", 0), ("train", 10**6), ("validation", 8)])
def test_impossible_draws_are_refused(split, num_problems):
    with pytest.raises(ValueError, match="split"):
        _draw_distinct(split, num_problems, 0)


def test_demonstrations_come_from_the_train_split_only():
    dataset = load_demonstrations(2000, seed=1)
    assert {split_of(prompt_id) for prompt_id in dataset["prompt_id"]} == {"train"}
    assert dataset[:] == load_demonstrations(2000, seed=1)[:]
    flaws = Counter(dataset["flaw"])
    assert set(flaws) == {"none", *FLAWS}
    assert flaws["none"] == pytest.approx(1000, abs=100)


def test_clean_demonstrations_are_right():
    dataset = load_demonstrations(500, flawed_share=0.0)
    for row in dataset:
        assert int(ANSWER.fullmatch(row["completion"])[1]) == solve(row["prompt"])
        for a, operator, b, result in re.findall(r"(-?\d+)([+*-])(\d+)=(-?\d+)", row["completion"]):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator] == int(result)


@given(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 10**6))
def test_each_flaw_is_what_it_says(kind, seed):
    rng = random.Random(seed)
    problem = draw_problem(rng, "train", kind)
    answers = {name: ANSWER.fullmatch(flaw(problem, rng)) for name, flaw in FLAWS.items()}
    assert answers.pop("missing_tag") is None
    assert all(answers.values())
    assert int(answers["slip"][1]) - problem.answer in (-2, -1, 1, 2)
    assert int(ANSWER.fullmatch(demonstrate(problem, rng))[1]) == problem.answer


def test_template():
    assert format_prompt(" Why? ") == f"{R1_INSTRUCTION}\nQuestion: Why?\nResponse: <think>"
    assert format_completion(" 1+1=2 ", "2") == " 1+1=2 </think> <answer>2</answer>"
