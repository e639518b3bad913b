"""Supervised fine-tuning on demonstrations, as a function: no command line and no files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl_entropy.runs.checkpoints import LATEST

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig, SFTTrainer

logger = logging.getLogger(__name__)


def train_sft(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: SFTConfig,
    peft_config: PeftConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> SFTTrainer:
    """Trains a model on demonstrations; the loss covers the completion and its end token.

    Args:
        model: A model, which is trained in place, or the name or path of one.
        tokenizer: Its tokenizer; it must have an end-of-text token, which the model learns to write.
        dataset: Columns `prompt` and `completion`, plain strings. Rows longer than `args.max_length` tokens are
            dropped, since a truncated demonstration would not teach the model to stop.
        args: TRL's settings. `args.train_sampling_strategy="sequential"` keeps the order of the dataset;
            `args.resume_from_checkpoint` is a path, or `"latest"` for the newest checkpoint of `args.output_dir`.
        peft_config: Trains an adapter instead of the whole model.
        callbacks: Beside those of the trainer.

    Returns:
        The trainer after training, with the trained model in `trainer.model`.

    Raises:
        ValueError: If a column is missing, the tokenizer has no end-of-text token, or no row is left.
    """
    tokenized = tokenize_demonstrations(dataset, tokenizer, args.max_length)
    return train_on_tokens(model, tokenizer, tokenized, args, peft_config, callbacks)


def train_on_tokens(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Dataset,
    args: SFTConfig,
    peft_config: PeftConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> SFTTrainer:
    """As [`train_sft`], on the columns `input_ids` and `labels` (-100 where nothing is to be learned)."""
    from trl import SFTTrainer

    from trl_entropy.runs.trackers import show_numbers_only

    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=tokenized,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    show_numbers_only(trainer.callback_handler.callbacks)
    resume: Any = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == LATEST else resume)
    return trainer


def tokenize_demonstrations(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Dataset:
    """Tokenizes prompt and completion separately, as in RL, where the prompt is tokenized first.

    Args:
        dataset: Columns `prompt` and `completion`, plain strings; other columns are dropped.
        tokenizer: It must have an end-of-text token, which is added to every completion that does not end with it.
        max_length: Rows with more tokens are dropped, and their number is logged. `None`: no limit.

    Returns:
        A dataset with the columns `input_ids` and `labels` (-100 on the prompt).

    Raises:
        ValueError: If a column is missing, the tokenizer has no end-of-text token, or no row is left.
    """
    missing = {"prompt", "completion"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"demonstrations need the columns prompt and completion; missing: {sorted(missing)}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, so no completion could be taught to end")

    def tokenize(rows: Mapping[str, list]) -> dict[str, list]:
        completions = [text.removesuffix(tokenizer.eos_token) for text in rows["completion"]]
        prompt_ids = tokenizer(rows["prompt"])["input_ids"]
        completion_ids = tokenizer(completions, add_special_tokens=False)["input_ids"]
        targets = [[*ids, tokenizer.eos_token_id] for ids in completion_ids]
        return {
            "input_ids": [prompt + target for prompt, target in zip(prompt_ids, targets, strict=True)],
            "labels": [[-100] * len(prompt) + target for prompt, target in zip(prompt_ids, targets, strict=True)],
        }

    tokenized = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)
    return tokenized if max_length is None else _drop_longer(tokenized, max_length)


def _drop_longer(tokenized: Dataset, max_length: int) -> Dataset:
    lengths = [len(ids) for ids in tokenized["input_ids"]]
    kept = [index for index, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise ValueError(f"no demonstration fits into max_length={max_length} tokens; the shortest has {min(lengths)}")
    if len(kept) < len(lengths):
        logger.warning(
            "dropped %d of %d demonstrations longer than %d tokens", len(lengths) - len(kept), len(lengths), max_length
        )
    return tokenized.select(kept)
