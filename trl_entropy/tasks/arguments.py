"""The settings of the task: which problems there are, what makes their prompts, and what is rewarded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from trl_entropy.tasks.named import absolute, is_of_user

T = TypeVar("T")

TASK_NAMES = ("word_problems", "gsm8k", "calculator", "explore", "trap", "dataset")
# The reward of a task, where none is named.
REWARD_OF_TASK = {"explore": "explore_reward", "trap": "trap_reward"}
DEFAULT_REWARD = "tag_pref"


class OfTask(str):
    """Help of a setting that some tasks alone read; HfArgumentParser hands a field's metadata to argparse, whole."""

    tasks: tuple[str, ...]


def of_task(tasks: str | tuple[str, ...], help: str, default: T) -> T:
    """A dataclass field that `tasks` alone read."""
    return field(default=default, metadata={"help": _help_of(tasks, help)})


def _help_of(tasks: str | tuple[str, ...], help: str) -> OfTask:
    tasks = (tasks,) if isinstance(tasks, str) else tasks
    text = OfTask(f"{' and '.join(tasks)}: {help}")
    text.tasks = tasks
    return text


_FILES = ("gsm8k", "dataset")
_OWN = ("dataset",)
_LISTS = ("reward_funcs", "tools", "metric_funcs")


@dataclass
class TaskArguments:
    """
    Which problems to train on, and what is rewarded. Training is set by [`DrGRPOConfig`], the model by `ModelConfig`.

    Functions are named as `package.module:function` or `path/to/file.py:function`, which imports the file.
    """

    task: str | None = field(
        default=None,
        metadata={
            "help": "The task to train on; not set: dataset where there is a dataset_name, else word_problems.",
            "choices": list(TASK_NAMES),
        },
    )
    dataset_name: str | None = of_task(
        _FILES,
        "a JSONL, JSON, CSV or Parquet file, a folder with a file for each split or a saved dataset, OWNER/NAME on "
        "the hub (hf://datasets/OWNER/NAME for gsm8k), or a function that gets the name of a split and returns its "
        "rows. gsm8k has openai/gsm8k if it is not set.",
        None,
    )
    dataset_config: str | None = of_task(_OWN, "the configuration of a dataset of the hub.", None)
    dataset_train_split: str = of_task(_OWN, "the split to train on.", "train")
    dataset_test_split: str = of_task(
        _OWN, "the split to evaluate on; where there is none, every tenth prompt of training is held out.", "test"
    )
    prompt_column: str = of_task(_OWN, "the column with the prompts: texts, or lists of messages.", "prompt")
    answer_column: str = of_task(
        _OWN, "the column with the right answers, which rewards get as `answer`; it may be missing.", "answer"
    )
    prompt_template: str = of_task(
        _OWN,
        "what makes the prompt of a row: none (as it is), r1 (reason in think tags, answer in answer tags), chat (one "
        "message of the user), or a function that gets the row and returns a text or messages.",
        "none",
    )
    dataset_filter: str | None = of_task(_OWN, "a function that gets a row and says whether it is kept.", None)
    num_train_problems: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of training problems; not set: 4096 (explore and trap: 2048), or all of a dataset "
            "of one's own."
        },
    )
    num_eval_problems: int = field(default=256, metadata={"help": "Largest number of held-out problems."})
    max_prompt_length: int | None = of_task(
        _FILES, "prompts with more tokens are dropped; not set: 200 for gsm8k, no limit for dataset.", None
    )
    reward_funcs: list[str] = field(
        default=None,  # type: ignore[arg-type]  # set in __post_init__
        metadata={
            "help": "Reward functions, which are summed: names of trl_entropy.tasks.rewards or of trl.rewards, "
            "functions of one's own, or reward models (OWNER/NAME or a folder). Not set: tag_pref, or what the task "
            "explore or trap pays."
        },
    )
    reward_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Keyword settings of reward functions, by the function's name: {brevity: {most: 20}}."},
    )
    metric_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Functions as reward_funcs, of which nothing is trained: their values stand in the tables of "
            "completions and are evaluated; metrics/NAME/mean, mean_stderr (over prompts) and std are of training's "
            "completions, probe_mean, probe_mean_stderr and probe_std of those that the entropy probe measures on."
        },
    )
    metric_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword settings of metric functions, as reward_kwargs."}
    )
    pass_reward: str | None = field(
        default=None,
        metadata={
            "help": "The reward function that says in an evaluation whether a completion passes; not set: the first "
            "one but format_reward."
        },
    )
    pass_threshold: float = field(
        default=1.0, metadata={"help": "A completion passes when its pass_reward is this much or more."}
    )
    tools: list[str] = field(
        default_factory=list, metadata={"help": _help_of(_OWN, "functions that the policy may call, as TRL's.")}
    )
    environment_factory: str | None = of_task(
        _OWN, "a class or function that makes an environment for each completion, as TRL's.", None
    )

    def __post_init__(self) -> None:
        self.task = self.task or implied_task(self.dataset_name)
        if self.reward_funcs is None:
            self.reward_funcs = [REWARD_OF_TASK.get(self.task, DEFAULT_REWARD)]
        for name in ("reward_kwargs", "metric_kwargs"):
            if isinstance(given := getattr(self, name), str):
                setattr(self, name, json.loads(given))
        for name in _LISTS:
            setattr(self, name, [absolute(one) for one in getattr(self, name)])
        for name in ("dataset_name", "prompt_template", "dataset_filter", "environment_factory"):
            if getattr(self, name):
                setattr(self, name, absolute(getattr(self, name)))

    def own_functions(self) -> dict[str, str]:
        """The functions of the user's own, which are imported -> the setting that names each."""
        found = {name: setting for setting in reversed(_LISTS) for name in getattr(self, setting)}
        for setting in ("dataset_name", "prompt_template", "dataset_filter", "environment_factory"):
            name = getattr(self, setting)
            if name and not Path(name).expanduser().exists():
                found[name] = setting
        return {name: setting for name, setting in found.items() if is_of_user(name)}


def implied_task(dataset_name: object) -> str:
    """The task where none is named."""
    return "dataset" if dataset_name else "word_problems"


def check_problem_numbers(task: object, prompts_per_step: int = 1) -> None:
    """
    Check the numbers of a task's settings, of which each says how many problems or tokens there are at most.

    Args:
        prompts_per_step: problems that a step draws, which must all be different.

    Raises:
        ValueError: for one below 1, and for fewer training problems than a step needs.
    """
    numbers = {one.name: getattr(task, one.name) for one in dataclasses.fields(task)}  # type: ignore[arg-type]
    for name, number in numbers.items():
        if isinstance(number, int) and not isinstance(number, bool) and number < 1:
            without = " To train without evaluation set eval_strategy=no." if name == "num_eval_problems" else ""
            raise ValueError(f"{name} is {number}; use 1 or more.{without}")
    if (numbers.get("num_train_problems") or prompts_per_step) < prompts_per_step:
        raise ValueError(too_few_prompts(f"num_train_problems is {numbers['num_train_problems']}", prompts_per_step))


def too_few_prompts(found: str, prompts_per_step: int) -> str:
    """What is wrong with a dataset that no step can be made of."""
    return (
        f"{found}, but a step draws {prompts_per_step} different prompts, so that no step could be made. Use more "
        "prompts, or lower num_prompts_per_step (per_device_train_batch_size, gradient_accumulation_steps)."
    )
