"""`RolloutBatch`, a frozen view of TRL's batch of completions, and the shuffle that keeps prompt groups together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig
from trl.trainer import grpo_trainer


@dataclass(frozen=True)
class RolloutBatch:
    """
    This process's completions of one optimizer step (B rows), as the loss sees them.

    Attributes:
        prompt_ids, prompt_mask: the prompts, padded on the left.
        completion_ids, completion_mask: the completions, padded on the right; the end token counts.
        prompt_index: number of the row's prompt group, unique over processes and over the run.
        rewards: weighted sum of the reward functions.
        raw_advantages: equation (T1), before `length_normalizer` or any entropy control.
        length_scale: `max_completion_length` / L_i of (T2).
        advantages: what the loss gets.
    """

    prompt_ids: Int[Tensor, "B S"]
    prompt_mask: Int[Tensor, "B S"]
    completion_ids: Int[Tensor, "B T"]
    completion_mask: Int[Tensor, "B T"]
    prompt_index: Int[Tensor, " B"]
    rewards: Float[Tensor, " B"]
    raw_advantages: Float[Tensor, " B"]
    length_scale: Float[Tensor, " B"]
    advantages: Float[Tensor, "B *T"]

    @classmethod
    def from_micro_batches(cls, micro_batches: list[dict[str, Any]]) -> RolloutBatch:
        """Join the micro-batches of one optimizer step; those of one generation are padded alike by TRL."""
        return cls(
            **{name: join_rows([batch[name] for batch in micro_batches], name) for name in cls.__dataclass_fields__}
        )

    @property
    def input_ids(self) -> Int[Tensor, "B L"]:
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Int[Tensor, "B L"]:
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        return self.completion_mask.sum(dim=1)

    @property
    def accepted(self) -> Bool[Tensor, " P"]:
        """By group, in the order of their number: whether its rewards differ (`resample_uninformative_groups`)."""
        _, groups = self.prompt_index.unique(return_inverse=True)
        return groups_with_different_rewards(self.rewards, groups)


def join_rows(parts: list[Tensor], name: str, fill: int = 0) -> Tensor:
    """Concatenate along rows; pad to the widest part with `fill`, prompts on the left, the rest on the right."""
    if parts[0].ndim == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    missing = [width - part.shape[1] for part in parts]
    sides = [(gap, 0) if name.startswith("prompt") else (0, gap) for gap in missing]
    return torch.cat(
        [torch.nn.functional.pad(part, side, value=fill) for part, side in zip(parts, sides, strict=True)]
    )


def group_numbers(num_rows: int, num_generations: int, process_index: int, device: torch.device) -> Int[Tensor, " B"]:
    """Number of each local row's prompt group: TRL hands rows out in order, G after G, over the processes."""
    first = process_index * num_rows
    return torch.arange(first, first + num_rows, device=device) // num_generations


def groups_with_different_rewards(rewards: Float[Tensor, " B"], groups: Int[Tensor, " B"]) -> Bool[Tensor, " P"]:
    """
    Which groups have two completions of different rewards: only those have an advantage that is not 0.

    Args:
        rewards: NaN where no function scored the completion; it then is no evidence.
        groups: number of each completion's group, 0 to P - 1.
    """
    scored, num_groups = ~rewards.isnan(), int(groups.max()) + 1
    highest, lowest = (rewards.new_full((num_groups,), sign * torch.inf) for sign in (-1, 1))
    highest.scatter_reduce_(0, groups[scored], rewards[scored], "amax")
    lowest.scatter_reduce_(0, groups[scored], rewards[scored], "amin")
    return highest > lowest


def shuffle_groups(rows: dict[str, Any]) -> dict[str, Any]:
    """
    Permute TRL's generation batch by whole prompt groups (runs of equal `prompt_index`), rows of a group in order.

    Args:
        rows: TRL's batch; tensors and lists are permuted along their first axis, 0-d tensors and None are kept.
    """
    _, run_lengths = torch.unique_consecutive(rows["prompt_index"], return_counts=True)
    runs = torch.arange(len(rows["prompt_index"])).split(run_lengths.tolist())
    order = torch.cat([runs[i] for i in torch.randperm(len(runs)).tolist()])

    def permute(values: Any) -> Any:
        if values is None or (isinstance(values, Tensor) and values.ndim == 0):
            return values
        return values[order.to(values.device)] if isinstance(values, Tensor) else [values[i] for i in order.tolist()]

    return {name: permute(values) for name, values in rows.items()}


@contextlib.contextmanager
def whole_group_shuffling() -> Iterator[None]:
    """
    Make TRL's `_prepare_inputs` shuffle whole groups: it looks `shuffle_sequence_dict` up in its module.

    TRL shuffles single completions, which scatters a group over micro-batches; then no micro-batch gradient is a sum
    of independent groups. Written against trl 1.16, `tests/contracts` holds the fact.
    """
    original = grpo_trainer.shuffle_sequence_dict
    grpo_trainer.shuffle_sequence_dict = shuffle_groups
    try:
        yield
    finally:
        grpo_trainer.shuffle_sequence_dict = original


def group_max_lengths(all_lengths: Int[Tensor, " N"], num_generations: int) -> Int[Tensor, " N"]:
    """
    Length of the longest completion in each row's group, in tokens: L_i of (T2) for `length_normalizer="group_max"`.

    Args:
        all_lengths: completion lengths over all processes in rank order, so that split groups are seen whole.
        num_generations: completions of a group, G.
    """
    return all_lengths.view(-1, num_generations).amax(dim=1).repeat_interleave(num_generations)


def answer_end(tokenizer: Any, completion_ids: list[int], tag: str) -> int | None:
    """
    Number of tokens up to and with the one that completes `tag`, or None when the completion has no `tag`.

    Bisection over prefixes: a tag may be spelled by several tokens, or end inside one.
    """

    def closed(num_tokens: int) -> bool:
        return tag in tokenizer.decode(completion_ids[:num_tokens], skip_special_tokens=True)

    if not closed(len(completion_ids)):
        return None
    low, high = 0, len(completion_ids)  # closed(high) holds, closed(low) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if closed(middle) else (middle, high)
    return high


@contextlib.contextmanager
def stopping_at(model: Any, tokenizer: Any, text: str) -> Iterator[None]:
    """
    Make `model.generate` stop a completion once it contains `text`.

    TRL passes no tokenizer to `generate`, which `stop_strings` needs, so both are bound to it for the while.
    """
    generate = model.generate
    model.generate = functools.partial(generate, stop_strings=text, tokenizer=tokenizer)
    try:
        yield
    finally:
        del model.generate


@contextlib.contextmanager
def generating_with_the_model(trainer: Any) -> Iterator[None]:
    """
    Make a trainer of TRL's generate with the model itself, from its full distribution, whatever it uses for rollouts.

    Written against trl 1.16, whose `_generate_single_turn` asks these attributes.
    """
    kept = {name: getattr(trainer, name) for name in ("use_vllm", "use_transformers_continuous_batching")}
    if not any(kept.values()):
        yield
        return
    settings = {
        "max_new_tokens": trainer.max_completion_length,
        "do_sample": True,
        "temperature": trainer.temperature,
        "top_k": 0,
        "pad_token_id": trainer._tokenizer.pad_token_id,
        "eos_token_id": trainer.eos_token_ids,
    }
    config = {"generation_config": GenerationConfig(**settings, disable_compile=True), "generation_kwargs": settings}
    kept |= {name: getattr(trainer, name, None) for name in config}
    vars(trainer).update(dict.fromkeys(("use_vllm", "use_transformers_continuous_batching"), False) | config)
    try:
        yield
    finally:
        vars(trainer).update(kept)
