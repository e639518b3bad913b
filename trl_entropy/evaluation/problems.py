"""The held-out problems that an evaluation takes."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import numpy as np

from trl_entropy.evaluation.plan import Settings
from trl_entropy.runs.counted import counted
from trl_entropy.runs.strict_json import Row
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.registry import Wanted, task_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def held_out_problems(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> list[Row]:
    """
    The held-out problems to evaluate on; with the same seed a smaller selection is part of a larger one.

    Args:
        tokenizer: None: prompts are not sorted out by their length.

    Raises:
        OSError: when a file or a dataset of the hub cannot be read.
        ValueError: when a record cannot be parsed, when none is left, and when a question is there twice with another
            answer or other columns; one that is the same is left out, and that is said.
    """
    task = TaskArguments(**settings.task)
    problems = distinct(task_of(task).load(task, Wanted("test", None, tokenizer)), task)
    chosen = np.random.default_rng(settings.seed).permutation(len(problems))[: settings.num_of(len(problems))]
    return [problems[int(row)] for row in chosen]


def distinct(problems: Dataset, task: TaskArguments) -> Dataset:
    """
    Each question once: correct answers are counted by question.

    Raises:
        ValueError: when a question is there twice with another answer or other columns.
    """
    places = {name: place for place, name in reversed([*enumerate(problems["prompt_id"])])}  # of the first of each
    if len(places) == len(problems):
        return problems
    where, name_of = task_of(task).source(task), problems["prompt_id"]
    others = [row for place, row in enumerate(problems) if row != problems[places[name_of[place]]]]
    if not others:
        _say_left_out(where, len(problems) - len(places))
        return problems.select(sorted(places.values()))
    asked = str(others[0].get("question", others[0]["prompt"]))[-200:]
    raise ValueError(
        f"{where} holds {counted(len({row['prompt_id'] for row in others}), 'held-out question')} more than once with "
        f"other answers or columns, the first is {asked!r}. An evaluation "
        "counts correct answers by question: leave each in once."
    )


@functools.cache
def _say_left_out(where: str, number: int) -> None:
    logger.warning("%s has %s a second time, which are evaluated once", where, counted(number, "held-out question"))
