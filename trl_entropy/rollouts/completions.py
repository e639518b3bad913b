"""`Completions`: what is scored, wherever the completions come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.rollouts.batch import RolloutBatch


@dataclass(frozen=True)
class Completions:
    """
    B completions to score: prompts on the left, completions in the last T columns.

    Attributes:
        input_ids, attention_mask: of prompt and completion together, padded on both sides.
        completion_mask: from the token ids: the end token counts, nothing after it.
        prompt_index: group of each row; completions of different prompts are independent.
        sampling_logps: log-probability of each completion token under what drew it, nats, if that is not the policy.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    completion_mask: Int[Tensor, "B T"]
    prompt_index: Int[Tensor, " B"]
    sampling_logps: Float[Tensor, "B T"] | None = None

    @classmethod
    def of(cls, batch: RolloutBatch) -> Completions:
        """Those of a step's rollouts."""
        return cls(batch.input_ids, batch.attention_mask, batch.completion_mask, batch.prompt_index)

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        return self.completion_mask.sum(dim=1)

    def rows(self, index: Any) -> Completions:
        """The rows of `index`, in its order."""
        return Completions(**{name: tensor[index] for name, tensor in self.tensors().items()})

    def trimmed(self) -> Completions:
        """Without the columns in which no row has a token."""
        used = self.attention_mask.any(dim=0).nonzero()
        width = self.completion_mask.shape[1]
        keep = int(self.completion_mask.any(dim=0).nonzero().max()) + 1 if self.completion_mask.any() else 1
        start, end = int(used.min()), self.input_ids.shape[1] - width + keep
        return Completions(
            self.input_ids[:, start:end],
            self.attention_mask[:, start:end],
            self.completion_mask[:, :keep],
            self.prompt_index,
            None if self.sampling_logps is None else self.sampling_logps[:, :keep],
        )
