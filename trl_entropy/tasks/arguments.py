"""The settings of the task, and its problems as datasets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

SINGLE_TURN_TASKS = ("word_problems", "gsm8k")
TASKS = (*SINGLE_TURN_TASKS, "calculator")
REWARDS = ("tag_pref", "tag_math_correct", "format_reward")


class OfTask(str):
    """Help of a setting that one task alone reads; HfArgumentParser hands a field's metadata to argparse, whole."""

    task: str


def of_task(task: str, help: str, default: T) -> T:
    """A dataclass field that `task` alone reads."""
    text = OfTask(f"{task}: {help}")
    text.task = task
    return field(default=default, metadata={"help": text})


@dataclass
class TaskArguments:
    """Which problems to train on. Training is set by [`DrGRPOConfig`], the model by TRL's `ModelConfig`."""

    task: str = field(default="word_problems", metadata={"help": "The task to train on.", "choices": list(TASKS)})
    dataset_path: str = of_task(
        "gsm8k",
        "openai/gsm8k, another dataset of the hub as hf://datasets/OWNER/NAME, or a local JSONL file or folder.",
        "openai/gsm8k",
    )
    num_train_problems: int = field(default=4096, metadata={"help": "Largest number of training problems."})
    num_eval_problems: int = field(default=256, metadata={"help": "Largest number of held-out problems."})
    max_prompt_length: int = of_task("gsm8k", "prompts with more tokens are dropped.", 200)
    reward_funcs: list[str] = field(
        default_factory=lambda: ["tag_pref"],
        metadata={"help": "Reward functions of trl_entropy.tasks.rewards; rewards are summed."},
    )


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
    if numbers.get("num_train_problems", prompts_per_step) < prompts_per_step:
        raise ValueError(too_few_prompts(f"num_train_problems is {numbers['num_train_problems']}", prompts_per_step))


def too_few_prompts(found: str, prompts_per_step: int) -> str:
    """What is wrong with a dataset that no step can be made of."""
    return (
        f"{found}, but a step draws {prompts_per_step} different prompts, so that no step could be made. Use more "
        "prompts, or lower num_prompts_per_step (per_device_train_batch_size, gradient_accumulation_steps)."
    )


def tools_of(task: TaskArguments) -> list[Callable[..., str]]:
    """What the policy may call, for TRL's `tools`; none for a task of single turns."""
    if task.task != "calculator":
        return []
    from trl_entropy.tasks.calculator import calculate

    return [calculate]


def check_agent_task(task: str, model: str, evaluate_checkpoints: str) -> None:
    """
    Check that the task's episodes can be drawn.

    Raises:
        ValueError: for the embedded model that was not taught to call, and for evaluations, which draw single turns.
    """
    if task in SINGLE_TURN_TASKS:
        return
    if model == "embedded":
        raise ValueError(
            f"task is {task}, but the embedded model calls no tools. Set model_name_or_path: embedded-agent."
        )
    if evaluate_checkpoints != "none":
        raise ValueError(
            f"evaluate_checkpoints is {evaluate_checkpoints}, which draws single turns, but task {task} has episodes "
            "with calls of tools. Set evaluate_checkpoints=none, and eval_strategy=steps to evaluate in training."
        )


def load_task(task: TaskArguments, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> tuple[Dataset, Dataset]:
    """
    The training problems and the held-out problems, with the columns `prompt`, `answer` and `prompt_id`.

    Args:
        tokenizer: None: prompts are not sorted out by their length.

    Raises:
        OSError: when a file or a dataset of the hub cannot be read.
        ValueError: when a record cannot be parsed, or none is left.
    """
    if task.task == "calculator":
        from trl_entropy.tasks.calculator import load_calculator_problems

        return (
            load_calculator_problems("train", task.num_train_problems, seed=seed),
            load_calculator_problems("test", task.num_eval_problems, seed=0),
        )
    if task.task == "word_problems":
        from trl_entropy.tasks.word_problems import load_word_problems

        return (
            load_word_problems("train", task.num_train_problems, seed=seed),
            load_word_problems("test", task.num_eval_problems, seed=0),
        )
    from trl_entropy.tasks.gsm8k import load_gsm8k

    def load(split: str, most: int) -> Dataset:
        dataset = load_gsm8k(task.dataset_path, split, tokenizer, task.max_prompt_length)
        return dataset.select(range(min(most, len(dataset))))

    return load("train", task.num_train_problems), load("test", task.num_eval_problems)
