"""`RolloutBatch`: the completions of one optimizer step, read from TRL's micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.rollouts.groups import groups_with_different_rewards
from trl_entropy.rollouts.pixel_inputs import COLUMN_KEYS, PixelInputs

# What keys of a batch begin with that hold a number of each completion which a probe measures the change of.
VALUE = "value/"


class GenerationBatch(TypedDict):
    """TRL's batch of completions: a whole generation, or a micro-batch of it."""

    prompt_ids: Int[Tensor, "B S"]
    prompt_mask: Int[Tensor, "B S"]
    completion_ids: Int[Tensor, "B T"]
    completion_mask: Int[Tensor, "B T"]
    advantages: Float[Tensor, "B *T"]
    num_items_in_batch: NotRequired[Tensor]
    tool_mask: NotRequired[Int[Tensor, "B T"]]  # 0 for tokens of tools and environments, which the policy did not draw
    old_per_token_logps: NotRequired[Float[Tensor, "B T"]]
    ref_per_token_logps: NotRequired[Float[Tensor, "B T"]]
    sampling_per_token_logps: NotRequired[Float[Tensor, "B T"]]  # of vLLM, or of what a rollout_func drew with


class TrainingBatch(GenerationBatch):
    """TRL's batch with what `DrGRPOTrainer` adds (see [`RolloutBatch`]), and `token_control_mask` for `kl_cov`."""

    prompt_index: Int[Tensor, " B"]
    rewards: Float[Tensor, " B"]
    raw_advantages: Float[Tensor, " B"]
    length_scale: Float[Tensor, " B"]
    token_control_mask: NotRequired[Bool[Tensor, "B T"]]


def loss_mask_of(batch: GenerationBatch) -> Int[Tensor, "B T"]:
    """1 for the tokens that the policy drew and the loss counts; 0 for padding and for tokens of tools."""
    tool_mask = batch.get("tool_mask")
    return batch["completion_mask"] if tool_mask is None else batch["completion_mask"] * tool_mask


@dataclass(frozen=True)
class RolloutBatch:
    """
    This process's completions of one optimizer step (B rows), as the loss sees them.

    Attributes:
        prompt_ids, prompt_mask: the prompts, padded on the left.
        completion_ids, completion_mask: the completions, padded on the right; the mask is 1 for all that the model
            attends to, the end token and tokens of tools and environments included.
        loss_mask: 1 for completion tokens that the policy drew, 0 for those of tools and environments and for padding:
            what is scored, differentiated and counted.
        prompt_index: number of the row's prompt group, unique over processes and over the run.
        rewards: weighted sum of the reward functions.
        raw_advantages: equation (T1), before `length_normalizer` or any entropy control.
        length_scale: `max_completion_length` / L_i of (T2).
        advantages: the advantages that the loss reads, one per completion or per token.
        first_position: position of each row's first column, as the loss counts columns: 0, or below 0 where the row
            is padded further here than in its micro-batch.
        sampling_logps: log-probability of each completion token under what drew it, nats; None if that is the policy
            that the step starts from.
        pixel_inputs: the images of the rows; None if there are none.
        column_types: what `token_type_ids` and the like say of each column, for models that take them.
        values: numbers of each completion by name, nan where there is none: what a probe measures the change of.
        has_tool_mask: whether TRL told the policy's tokens from those of tools and environments, also where a step
            holds none of the latter: the same on all processes and in all steps.
    """

    prompt_ids: Int[Tensor, "B S"]
    prompt_mask: Int[Tensor, "B S"]
    completion_ids: Int[Tensor, "B T"]
    completion_mask: Int[Tensor, "B T"]
    loss_mask: Int[Tensor, "B T"]
    prompt_index: Int[Tensor, " B"]
    rewards: Float[Tensor, " B"]
    raw_advantages: Float[Tensor, " B"]
    length_scale: Float[Tensor, " B"]
    advantages: Float[Tensor, "B *T"]
    first_position: Int[Tensor, " B"]
    sampling_logps: Float[Tensor, "B T"] | None = None
    pixel_inputs: PixelInputs | None = None
    column_types: dict[str, Int[Tensor, "B L"]] = field(default_factory=dict)
    values: dict[str, Float[Tensor, " B"]] = field(default_factory=dict)
    has_tool_mask: bool = False

    @classmethod
    def from_micro_batches(
        cls, micro_batches: Sequence[TrainingBatch], by_present_policy: bool = False
    ) -> RolloutBatch:
        """
        Join the micro-batches of one optimizer step, and pad those of different generations to one width.

        Args:
            by_present_policy: whether the present policy drew them; else they are by the policy of TRL's
                `old_per_token_logps`, if it computes these.
        """
        width = max(batch["prompt_ids"].shape[1] for batch in micro_batches)
        parts: list[dict[str, Any]] = [
            {
                **batch,
                "loss_mask": loss_mask_of(batch),
                "sampling_logps": _sampling_logps(batch, by_present_policy),
                "first_position": torch.full_like(batch["prompt_index"], batch["prompt_ids"].shape[1] - width),
            }
            for batch in micro_batches
        ]
        names = (name for name in cls.__dataclass_fields__ if parts[0].get(name) is not None)
        sizes = [len(part["prompt_ids"]) for part in parts]
        images = [PixelInputs.of(part, size) for part, size in zip(parts, sizes, strict=True)]
        return cls(
            **{name: join_rows([part[name] for part in parts], name) for name in names},
            pixel_inputs=PixelInputs.joined(images, sizes),
            column_types={name: _joined_columns(parts, name) for name in COLUMN_KEYS if name in parts[0]},
            values={
                name.removeprefix(VALUE): torch.cat([part[name] for part in parts])
                for name in parts[0]
                if name.startswith(VALUE)
            },
            has_tool_mask="tool_mask" in parts[0],
        )

    def rows(self, index: Tensor) -> RolloutBatch:
        """The rows that `index` selects, in its order."""
        return replace(
            self,
            **{name: values[index] for name, values in vars(self).items() if isinstance(values, Tensor)},
            pixel_inputs=None if self.pixel_inputs is None else self.pixel_inputs.chosen(index),
            column_types={name: values[index] for name, values in self.column_types.items()},
            values={name: values[index] for name, values in self.values.items()},
        )

    @property
    def input_ids(self) -> Int[Tensor, "B L"]:
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Int[Tensor, "B L"]:
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens that the policy drew."""
        return self.loss_mask.sum(dim=1)

    @property
    def accepted(self) -> Bool[Tensor, " P"]:
        """For each group, ordered by number, whether its rewards differ (see `resample_uninformative_groups`)."""
        _, groups = self.prompt_index.unique(return_inverse=True)
        return groups_with_different_rewards(self.rewards, groups)


def _sampling_logps(batch: GenerationBatch, by_present_policy: bool) -> Float[Tensor, "B T"] | None:
    logps = batch.get("sampling_per_token_logps")
    return batch.get("old_per_token_logps") if logps is None and not by_present_policy else logps


def _joined_columns(parts: Sequence[Mapping[str, Any]], name: str) -> Int[Tensor, "B L"]:
    """Rows as wide as prompt and completion, of which each part is padded on its own side."""
    widths = [part["prompt_ids"].shape[1] for part in parts]
    prompts = [part[name][:, :width] for part, width in zip(parts, widths, strict=True)]
    completions = [part[name][:, width:] for part, width in zip(parts, widths, strict=True)]
    return torch.cat([join_rows(prompts, "prompt"), join_rows(completions, "completion")], dim=1)


def join_rows(parts: list[Tensor], name: str, fill: int = 0) -> Tensor:
    """Concatenate rows, padded to the widest part with `fill`: prompts on the left, other tensors on the right."""
    if parts[0].ndim == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    missing = [width - part.shape[1] for part in parts]
    sides = [(gap, 0) if name.startswith("prompt") else (0, gap) for gap in missing]
    return torch.cat(
        [torch.nn.functional.pad(part, side, value=fill) for part, side in zip(parts, sides, strict=True)]
    )
