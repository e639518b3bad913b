"""The settings of the task, and its problems as datasets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TASKS = ("word_problems", "gsm8k")
REWARDS = ("tag_pref", "tag_math_correct", "format_reward")


@dataclass
class TaskArguments:
    """Which problems to train on. Training is set by [`DrGRPOConfig`], the model by TRL's `ModelConfig`."""

    task: str = field(default="word_problems", metadata={"help": "The task to train on.", "choices": list(TASKS)})
    dataset_path: str = field(
        default="openai/gsm8k", metadata={"help": "gsm8k: name on the hub, or a local JSONL file or folder."}
    )
    num_train_problems: int = field(default=4096, metadata={"help": "Largest number of training problems."})
    num_eval_problems: int = field(default=256, metadata={"help": "Largest number of held-out problems."})
    max_prompt_length: int = field(default=200, metadata={"help": "gsm8k: prompts with more tokens are dropped."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["tag_pref"],
        metadata={"help": "Reward functions of trl_entropy.tasks.rewards; rewards are summed."},
    )


def load_task(task: TaskArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset]:
    """The training problems and the held-out problems, with the columns `prompt`, `answer` and `prompt_id`."""
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
