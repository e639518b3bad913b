"""The held-out problems that an evaluation takes."""

from __future__ import annotations

from collections import Counter
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


def held_out_problems(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> list[Row]:
    """
    The held-out problems to evaluate on; with the same seed a smaller selection is part of a larger one.

    Args:
        tokenizer: None: prompts are not sorted out by their length.

    Raises:
        OSError: when a file or a dataset of the hub cannot be read.
        ValueError: when a record cannot be parsed, when none is left, and when a question is there twice.
    """
    task = TaskArguments(**settings.task)
    problems = task_of(task).load(task, Wanted("test", None, tokenizer))
    _check_distinct(problems, task)
    chosen = np.random.default_rng(settings.seed).permutation(len(problems))[: settings.num_of(len(problems))]
    return [problems[int(row)] for row in chosen]


def _check_distinct(problems: Dataset, task: TaskArguments) -> None:
    """Correct answers are counted by question."""
    twice = {name for name, count in Counter(problems["prompt_id"]).items() if count > 1}
    if not twice:
        return
    first = next(problem for problem in problems if problem["prompt_id"] in twice)
    where = task_of(task).source(task)
    raise ValueError(
        f"{where} holds {counted(len(twice), 'held-out question')} more than once, the first is "
        f"{first.get('question', first['prompt'])!r:.200}. An evaluation counts correct answers by question: leave "
        "each in once."
    )
