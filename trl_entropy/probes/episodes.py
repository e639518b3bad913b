"""Which turns of the episodes moved the entropy and the reward: prose, calls of tools, or their arguments (T9)."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.attribution.shares import CategoryRecord, category_sums
from trl_entropy.estimators.attribution.turns import sums_by_category, turn_index
from trl_entropy.estimators.statistics.pooled import PooledParts
from trl_entropy.probes.prices import PriceRecord
from trl_entropy.probes.step_statistics import means_logged
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.runs.change_metrics import KINDS, TURNS
from trl_entropy.runs.state import StateDict
from trl_entropy.tasks.tool_calls import calls_of, kinds_of_tokens


class EpisodeRecords:
    """
    The contributions of a step's tokens by turn and by kind, of this step and summed over the run. Both partition the
    tokens that the policy drew, whatever their advantage, so that the parts of a step sum to `entropy/delta_gradient`.
    With the contributions to the expected reward the same of these, and prices (T22).
    """

    def __init__(self) -> None:
        self.records = {"turn": CategoryRecord.empty(TURNS), "kind": CategoryRecord.empty(KINDS)}
        self.prices = {"turn": PriceRecord(TURNS, with_all=False), "kind": PriceRecord(KINDS, with_all=False)}

    def add(
        self,
        contributions: Float[Tensor, "B T"],
        token_entropy: Float[Tensor, "B T"],
        rollouts: RolloutBatch,
        kinds: Int[Tensor, "B T"],
        accelerator: Accelerator,
        earned: Float[Tensor, "B T"] | None = None,
    ) -> dict[str, float]:
        """
        Add a step and return what it logs. Collective.

        Args:
            contributions: delta_ik of this rank's tokens, nats per token.
            token_entropy: their entropies before the step, nats.
            kinds: from [`kinds_of_rollouts`].
            earned: the tokens' contributions to the change of the expected reward, where it is attributed.
        """
        mask, logged = rollouts.loss_mask, dict[str, float]()
        prompts = accelerator.gather(rollouts.prompt_index).unique()
        position = torch.searchsorted(prompts, rollouts.prompt_index)
        for name, categories in (("turn", turn_index(mask, len(TURNS) - 1)), ("kind", kinds)):
            names = self.records[name].names
            given = [contributions] if earned is None else [contributions, earned]
            found = [category_sums(one, categories, mask, position, len(prompts), len(names)) for one in given]
            sums = [accelerator.reduce(one, reduction="sum") for one, _ in found]
            counts = accelerator.reduce(found[0][1], reduction="sum")
            self.records[name] = self.records[name].update(sums[0], counts)
            for quantity, of_prompts in zip(("entropy", "reward"), sums, strict=False):
                parts = dict(zip(names, of_prompts.sum(0).tolist(), strict=True))
                logged |= {f"{quantity}/delta_{one}": parts[one] for one in self.records[name].present}
            if earned is not None:
                logged |= self.prices[name].add(sums[0], sums[1], counts)
        by_kind = accelerator.reduce(sums_by_category(token_entropy, kinds, mask, len(KINDS)), reduction="sum")
        return logged | means_logged("entropy/", KINDS, by_kind)

    def state_dict(self) -> StateDict:
        own = {name: {"parts": {**vars(one.parts)}, "counts": one.counts} for name, one in self.records.items()}
        return own | {"prices": {name: one.state_dict() for name, one in self.prices.items()}}

    def load_state_dict(self, state: StateDict) -> None:
        for name, record in self.records.items():
            if given := state.get(name):
                self.records[name] = CategoryRecord(record.names, PooledParts(**given["parts"]), given["counts"])
        for name, price in self.prices.items():
            price.load_state_dict(state.get("prices", {}).get(name))  # a checkpoint of an earlier version has none


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
