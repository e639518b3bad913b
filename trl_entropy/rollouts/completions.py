"""`Completions`: prompts and completions to be scored, from a probe batch or from a step's rollouts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.pixel_inputs import PixelInputs


@dataclass(frozen=True)
class Completions:
    """
    B completions to score: prompts on the left, completions in the last T columns.

    Attributes:
        input_ids, attention_mask: prompt and completion together, padded on both sides.
        completion_mask: 1 for every token of the completion up to and including its end token: what the model attends
            to. It says which columns there are, never which tokens count.
        prompt_index: number of each row's prompt group; completions of different prompts are independent.
        sampling_logps: log-probability of each completion token under its sampler, nats; None if that is the policy.
        loss_mask: 1 for completion tokens that the policy drew: those of `completion_mask` but for the tokens of tools
            and environments. These alone are scored, differentiated, weighted and counted; the others are context.
        first_position: position of each row's first column, where training counts columns from another one (see
            `position_ids`); None: training has not seen the rows, and a row's first token has position 0.
        pixel_inputs: the images of the rows; None if there are none.
        column_types: what `token_type_ids` and the like say of each column, for models that take them.
        values: numbers of each row by name, such as its reward, nan where there is none: what a step's change is
            measured of beside the entropy.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    completion_mask: Int[Tensor, "B T"]
    prompt_index: Int[Tensor, " B"]
    sampling_logps: Float[Tensor, "B T"] | None = None
    loss_mask: Int[Tensor, "B T"] = field(kw_only=True)
    first_position: Int[Tensor, " B"] | None = field(default=None, kw_only=True)
    pixel_inputs: PixelInputs | None = field(default=None, kw_only=True)
    column_types: dict[str, Int[Tensor, "B L"]] = field(default_factory=dict, kw_only=True)
    values: dict[str, Float[Tensor, " B"]] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls, batch: RolloutBatch) -> Completions:
        """The completions of a step."""
        return cls(
            batch.input_ids,
            batch.attention_mask,
            batch.completion_mask,
            batch.prompt_index,
            batch.sampling_logps,
            loss_mask=batch.loss_mask,
            first_position=batch.first_position,
            pixel_inputs=batch.pixel_inputs,
            column_types=batch.column_types,
            values=batch.values,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps (see `ProbeFiles.write`): the tensors that are not None."""
        return self._given({"first_position"})

    def _given(self, omitted: Collection[str] = ()) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in omitted}
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens that the policy drew."""
        return self.loss_mask.sum(dim=1)

    @property
    def widths(self) -> Int[Tensor, " B"]:
        """Columns of the completion that a row needs, its context from tools and environments included."""
        return self.completion_mask.sum(dim=1)

    @property
    def prompt_columns(self) -> int:
        """Columns before the completions."""
        return self.input_ids.shape[1] - self.completion_mask.shape[1]

    @property
    def position_ids(self) -> Int[Tensor, "B L"]:
        """
        The position of each column's token, 0 before the first, for a model that learns positions: as TRL's loss
        counts them, which is by columns of its batch, or for rows of a probe batch as `generate` does.
        """
        if self.first_position is None:
            return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (self.first_position.unsqueeze(1) + columns).clamp(min=0)

    def drawn_with(self, policy_logps: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """
        Log-probabilities under what drew the tokens: the sampler's own if it returned any, else those of the policy,
        also of a token for which the sampler returned none: its weight is 1, as in TRL's loss.
        """
        own = self.sampling_logps
        return policy_logps if own is None else own.where(~own.isnan(), policy_logps)

    def rows(self, index: Any) -> Completions:
        """The rows that `index` selects, in its order."""
        return Completions(
            **{name: tensor[index] for name, tensor in self._given().items()},
            pixel_inputs=None if self.pixel_inputs is None else self.pixel_inputs.chosen(index),
            column_types={name: tensor[index] for name, tensor in self.column_types.items()},
            values={name: tensor[index] for name, tensor in self.values.items()},
        )

    def trimmed(self) -> Completions:
        """The same without the columns in which no row has a token."""
        length, width = self.input_ids.shape[1], self.completion_mask.shape[1]
        used = torch.cat([self.attention_mask.any(dim=0), self.completion_mask.any(dim=0)]).tolist()  # read at once
        keep = max((column + 1 for column in range(width) if used[length + column]), default=1)
        start, end = used.index(True), length - width + keep
        return Completions(
            self.input_ids[:, start:end],
            self.attention_mask[:, start:end],
            self.completion_mask[:, :keep],
            self.prompt_index,
            None if self.sampling_logps is None else self.sampling_logps[:, :keep],
            loss_mask=self.loss_mask[:, :keep],
            first_position=None if self.first_position is None else self.first_position + start,
            pixel_inputs=self.pixel_inputs,
            column_types={name: tensor[:, start:end] for name, tensor in self.column_types.items()},
            values=self.values,
        )
