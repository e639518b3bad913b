"""Which turns of the episodes moved the entropy: prose, calls of tools, or their arguments (T9)."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.attribution.shares import CategoryRecord, category_sums
from trl_entropy.estimators.attribution.turns import sums_by_category, turn_index
from trl_entropy.estimators.statistics.pooled import PooledParts
from trl_entropy.probes.step_statistics import means_logged
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.runs.metrics import KINDS, TURNS
from trl_entropy.runs.state import StateDict
from trl_entropy.tasks.tool_calls import calls_of, kinds_of_tokens


class EpisodeRecords:
    """
    The contributions of a step's tokens by turn and by kind, of this step and summed over the run. Both partition the
    tokens that the policy drew, whatever their advantage, so that the parts of a step sum to `entropy/delta_gradient`.
    """

    def __init__(self) -> None:
        self.records = {"turn": CategoryRecord.empty(TURNS), "kind": CategoryRecord.empty(KINDS)}

    def add(
        self,
        contributions: Float[Tensor, "B T"],
        token_entropy: Float[Tensor, "B T"],
        rollouts: RolloutBatch,
        kinds: Int[Tensor, "B T"],
        accelerator: Accelerator,
    ) -> dict[str, float]:
        """
        Add a step and return what it logs. Collective.

        Args:
            contributions: delta_ik of this rank's tokens, nats per token.
            token_entropy: their entropies before the step, nats.
            kinds: from [`kinds_of_rollouts`].
        """
        mask, logged = rollouts.loss_mask, dict[str, float]()
        prompts = accelerator.gather(rollouts.prompt_index).unique()
        position = torch.searchsorted(prompts, rollouts.prompt_index)
        for name, categories in (("turn", turn_index(mask, len(TURNS) - 1)), ("kind", kinds)):
            record = self.records[name]
            size = len(record.names)
            sums, counts = category_sums(contributions, categories, mask, position, len(prompts), size)
            sums, counts = (accelerator.reduce(part, reduction="sum") for part in (sums, counts))
            self.records[name] = record.update(sums, counts)
            parts = dict(zip(record.names, sums.sum(0).tolist(), strict=True))
            logged |= {f"entropy/delta_{one}": parts[one] for one in self.records[name].present}
        by_kind = accelerator.reduce(sums_by_category(token_entropy, kinds, mask, len(KINDS)), reduction="sum")
        return logged | means_logged("entropy/", KINDS, by_kind)

    def state_dict(self) -> StateDict:
        return {name: {"parts": {**vars(one.parts)}, "counts": one.counts} for name, one in self.records.items()}

    def load_state_dict(self, state: StateDict) -> None:
        for name, given in state.items():
            names = self.records[name].names
            self.records[name] = CategoryRecord(names, PooledParts(**given["parts"]), given["counts"])


def kinds_of_rollouts(rollouts: RolloutBatch, tokenizer: Any) -> Int[Tensor, "B T"]:
    """The index in `KINDS` of each token that the policy drew, found turn by turn in its own text; else 0."""
    texts: dict[int, str] = {}
    mask, completion_ids = rollouts.loss_mask.cpu(), rollouts.completion_ids.cpu()  # looked at token by token
    kinds, calls = torch.zeros_like(mask), calls_of(tokenizer)
    turns = turn_index(mask, mask.shape[1])
    for row, own in enumerate(mask.bool()):
        for turn in turns[row][own].unique():
            at = own & (turns[row] == turn)
            ids = completion_ids[row][at].tolist()
            texts |= {token: tokenizer.decode([token]) for token in ids if token not in texts}
            kinds[row, at] = kinds.new_tensor(kinds_of_tokens([texts[token] for token in ids], calls))
    return kinds.to(rollouts.loss_mask.device)
