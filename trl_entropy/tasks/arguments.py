"""Which task a run trains on, and its problems as datasets."""

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
    """What is trained on; the settings of training itself are [`DrGRPOConfig`], those of the model `ModelConfig`."""

    task: str = field(default="word_problems", metadata={"help": "The task.", "choices": list(TASKS)})
    dataset_path: str = field(
        default="openai/gsm8k", metadata={"help": "gsm8k: name on the hub, or a local JSONL file or folder."}
    )
    num_train_problems: int = field(default=4096, metadata={"help": "Problems to train on, at most."})
    num_eval_problems: int = field(default=256, metadata={"help": "Held-out problems to evaluate on, at most."})
    max_prompt_length: int = field(default=200, metadata={"help": "gsm8k: drop prompts of more tokens than this."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["tag_pref"], metadata={"help": "Functions of trl_entropy.tasks.rewards, summed."}
    )


def load_task(task: TaskArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset]:
    """Problems to train on and held-out problems, with columns `prompt`, `answer`, `prompt_id`."""
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
