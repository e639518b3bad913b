"""Prompts, which are texts or conversations, and their tokens."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl_entropy.tasks.named import described

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]


def token_ids(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> list[list[int]]:
    """
    The tokens of each prompt as TRL gives it to the model: a conversation in the tokenizer's chat template.

    Args:
        kwargs: for the template: TRL's `chat_template_kwargs`.

    Raises:
        ValueError: for a conversation, when the tokenizer has no chat template.
    """
    if all(isinstance(prompt, str) for prompt in prompts):
        return list(tokenizer(list(prompts))["input_ids"]) if prompts else []
    return [
        tokenizer(rendered(prompt, tokenizer, **kwargs), add_special_tokens=False)["input_ids"] for prompt in prompts
    ]


def rendered(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str:
    """The text that the model sees."""
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ValueError(
            f"a prompt is a conversation, {prompt!r:.120}, but the tokenizer has no chat template. Use a model that "
            "was taught to chat (of the embedded ones embedded-agent), or a prompt_template that makes texts."
        )
    try:
        return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **kwargs))
    except Exception as error:  # of the template, which is the model's, and of jinja
        raise ValueError(f"the model's chat template refuses {prompt!r:.120}: {described(error)}.") from error


def check_conversations(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` if the first conversation among the prompts cannot be given to the model."""
    first = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if first is not None:
        rendered(first, tokenizer)


def prompt_id(task: str, prompt: Prompt) -> str:
    """An id that depends on the prompt alone, so that filters and the order of rows do not change it."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return f"{task}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def short_enough(dataset: Dataset, longest: int | None, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    """
    The dataset without the prompts of more tokens, whose number is logged.

    Args:
        longest: with the template; None: no limit.
        tokenizer: None: no prompt is dropped.

    Raises:
        ValueError: when none is left.
    """
    if longest is None or tokenizer is None:
        return dataset
    lengths = [len(ids) for ids in token_ids(dataset["prompt"], tokenizer)]
    kept = [place for place, length in enumerate(lengths) if length <= longest]
    if not kept:
        raise ValueError(
            f"no prompt of {len(lengths)} fits into max_prompt_length={longest} tokens (the shortest has "
            f"{min(lengths)}); raise it"
        )
    if dropped := len(lengths) - len(kept):
        logger.warning("dropped %d of %d prompts longer than %d tokens", dropped, len(lengths), longest)
    return dataset.select(kept)
