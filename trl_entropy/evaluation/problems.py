"""The held-out problems that an evaluation takes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from trl_entropy.evaluation.plan import Settings
from trl_entropy.runs.counted import counted
from trl_entropy.runs.strict_json import Row
from trl_entropy.tasks.arguments import TaskArguments, load_task
from trl_entropy.tasks.word_problems import MAX_PROBLEMS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_EVERY_HELD_OUT = {"word_problems": MAX_PROBLEMS["test"], "gsm8k": 10**9}


def held_out_problems(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> list[Row]:
    """
    The held-out problems to evaluate on; with the same seed a smaller selection is part of a larger one.

    Args:
        tokenizer: None: prompts are not sorted out by their length.

    Raises:
        OSError: when a file or a dataset of the hub cannot be read.
        ValueError: when a record cannot be parsed, when none is left, and when a question is there twice.
    """
    task = TaskArguments(**{**settings.task, "num_train_problems": 1})
    task.num_eval_problems = _EVERY_HELD_OUT[task.task]
    _, problems = load_task(task, tokenizer, seed=0)
    _check_distinct(problems, task)
    chosen = np.random.default_rng(settings.seed).permutation(len(problems))[: settings.num_of(len(problems))]
    return [problems[int(row)] for row in chosen]


def _check_distinct(problems: Dataset, task: TaskArguments) -> None:
    """Correct answers are counted by question."""
    twice = {name for name, count in Counter(problems["prompt_id"]).items() if count > 1}
    if not twice:
        return
    first = next(problem for problem in problems if problem["prompt_id"] in twice)
    where = task.dataset_path if task.task == "gsm8k" else task.task
    raise ValueError(
        f"{where} holds {counted(len(twice), 'held-out question')} more than once, the first is "
        f"{first.get('question', first['prompt_id'])!r:.200}. An evaluation counts correct answers by question: leave "
        "each in once."
    )
