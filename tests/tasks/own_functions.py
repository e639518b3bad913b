"""Functions of a user's own, which tests name by this file's path."""

import math


def brevity(prompts, completions, most=20, **kwargs):
    return [1 - len(text.split()) / most for text in completions]


def same_answer(prompts, completions, answer, **kwargs):
    return [float(one in text) for one, text in zip(answer, completions, strict=True)]


async def slowly(prompts, completions, **kwargs):
    return [0.5 for _ in completions]


def some_none(prompts, completions, **kwargs):
    return [None, *(1.0 for _ in completions[1:])]


def too_few(prompts, completions, **kwargs):
    return [0.0]


def words(prompts, completions, **kwargs):
    return ["good" for _ in completions]


def raising(prompts, completions, **kwargs):
    return [1 / 0 for _ in completions]


def longer_than(least):
    def longer(prompts, completions, **kwargs):
        return [float(len(text) > least) for text in completions]

    return longer


class Judge:
    def __init__(self, grade=1.0):
        self.grade = grade

    def __call__(self, prompts, completions, **kwargs):
        return [self.grade for _ in completions]


def as_question(row):
    return f"Q: {row['question']}\nA:"


def as_conversation(row):
    return [{"role": "user", "content": row["question"]}]


def of_nothing(row):
    return None


def is_easy(row):
    return row["level"] == 1


def rows(split):
    return [{"prompt": f"{split} {number}", "answer": str(number)} for number in range(4)]


def no_rows(split):
    return 3


number = math.pi


def another_name(completions, solution, **kwargs):
    return [0.0] * len(completions)
