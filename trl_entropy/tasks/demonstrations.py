"""The demonstrations that supervised fine-tuning learns from, and the settings that choose them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl_entropy.tasks.arguments import of_task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass
class DemonstrationArguments:
    """Which demonstrations to learn from. Training is set by TRL's `SFTConfig`, the model by its `ModelConfig`."""

    task: str = field(
        default="gsm8k", metadata={"help": "The task to learn from.", "choices": ["gsm8k", "word_problems"]}
    )
    dataset_name: str = of_task(
        "gsm8k",
        "openai/gsm8k, another dataset of the hub as hf://datasets/OWNER/NAME, or a local JSONL file or folder.",
        "openai/gsm8k",
    )
    num_demonstrations: int | None = field(
        default=None,
        metadata={"help": "Largest number of demonstrations; not set: all (word_problems: 4096)."},
    )
    max_prompt_length: int = of_task("gsm8k", "prompts with more tokens than this are dropped.", 200)
    merge_adapter: bool = field(
        default=False, metadata={"help": "Also save the model with its adapter merged, in <output_dir>/merged."}
    )


def load_demonstrations(task: DemonstrationArguments, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> Dataset:
    """Prompts in the R1 template with worked solutions, in the columns `prompt` and `completion`."""
    if task.task == "word_problems":
        from trl_entropy.tasks import word_problems

        return word_problems.load_demonstrations(task.num_demonstrations or 4096, seed, flawed_share=0.0)
    from trl_entropy.tasks.gsm8k import load_gsm8k_demonstrations

    dataset = load_gsm8k_demonstrations(task.dataset_name, "train", tokenizer, task.max_prompt_length)
    return dataset.select(range(min(task.num_demonstrations or len(dataset), len(dataset))))
