"""Changes of entropy and reward along steps from a fixed state, on blocks of one large set of rewarded completions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.control.entropy_control import Vector
from trl_entropy.estimators.control.exchange import leave_one_out_advantages, reward_change_terms
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, delta_measured, entropy_terms
from trl_entropy.estimators.statistics.estimate import Linearization, delta_method
from trl_entropy.estimators.statistics.importance import importance_weights
from trl_entropy.experiments.redraws import ROWS_PER_CHUNK
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.group_gradients import flat
from trl_entropy.gradients.scores import TokenScores, score
from trl_entropy.gradients.sequence_products import entropy_shares, gradients_of, weighted_logps
from trl_entropy.rollouts.batch import RolloutBatch, TrainingBatch
from trl_entropy.rollouts.completions import Completions

NUM_BLOCKS = 32
GROUP_SIZE = 4  # completions of each problem; the baseline of each is the mean reward of the others
_LARGE_SET = 5  # second part of a seed


class LargeSet:
    """
    Completions of held-out problems with their rewards, drawn once from the state's policy, in [`NUM_BLOCKS`] blocks.

    They are drawn when they are first needed.

    Args:
        state: its policy draws them.
        num_completions: a multiple of `NUM_BLOCKS` times `GROUP_SIZE`.
        seed: of the draw.
        batch_size: completions scored or differentiated at a time.
    """

    def __init__(self, state: FixedState, num_completions: int, seed: int, batch_size: int) -> None:
        self.state, self.num_completions, self.seed, self.batch_size = state, num_completions, seed, batch_size
        self.blocks = torch.arange(num_completions).view(NUM_BLOCKS, -1)

    @cached_property
    def rollouts(self) -> RolloutBatch:
        policy = self.state.on_held_out()
        batches: list[TrainingBatch] = []
        for start in range(0, self.num_completions, ROWS_PER_CHUNK):
            seeds, size = (self.seed, _LARGE_SET, start), min(ROWS_PER_CHUNK, self.num_completions - start)
            problems = policy.draw_problems(size // GROUP_SIZE, seeds)
            batches.append(policy.draw_rollouts(problems, GROUP_SIZE, seeds))
        return RolloutBatch.from_micro_batches(batches)

    @cached_property
    def advantages(self) -> Float[Tensor, " B"]:
        return leave_one_out_advantages(self.rollouts.rewards.view(-1, GROUP_SIZE)).flatten()

    @cached_property
    def scores(self) -> TokenScores:
        return self._score(self.state.before)

    @cached_property
    def summary(self) -> Float[Tensor, "3 K"]:
        """For each block the sum of token entropies in nats, the number of tokens, and the sum of rewards."""
        terms = entropy_terms(self.scores.entropy[0], self.rollouts.loss_mask.double(), self._mask)
        return torch.stack([self._summed(column) for column in (*terms, self.rollouts.rewards)])

    @cached_property
    def gradients(self) -> Float[Tensor, "2 K D"]:
        """Gradients of each block's sums of entropy terms (T8) and of A_i log pi(o_i), shares of grad h and grad J."""
        state, completions, names = self.state, Completions.of(self.rollouts), list(self.state.engine.parameters)
        entropy, tokens, _ = self.summary.sum(1).tolist()
        weights = self.advantages[:, None].expand(self._mask.shape)
        rows = []
        with state.engine.scoring_model(state.before) as model:
            for block in self.blocks:
                values = [entropy_shares(entropy / tokens, 1.0), weighted_logps(weights[block])]
                found = gradients_of(model, completions.rows(block), values, state.args.temperature, self.batch_size)
                rows.append(torch.stack([flat(gradient, names) for gradient in found]))
        return torch.stack(rows, dim=1).double()

    def products(self, updates: Iterable[Vector]) -> Float[Tensor, "M 2 K"]:
        """Dot products of each block's `gradients` with each step, for [`ratio_over_blocks`]."""
        names = list(self.state.engine.parameters)
        columns = torch.stack([flat(update, names).double() for update in updates], dim=1)
        return (self.gradients @ columns).permute(2, 0, 1)

    def moved(self, update: Vector) -> Float[Tensor, "3 K"]:
        """For each block after the step: numerator and denominator of (T6), and the sum of (w_i - 1) A_i (T20)."""
        there = self._score({name: value + update[name] for name, value in self.state.before.items()})
        weights = importance_weights(there.logps[0], self.scores.logps[0], self._mask)
        terms = entropy_terms(there.entropy[0], weights, self._mask)
        rewards = reward_change_terms(there.logps[0], self.scores.logps[0], self.advantages, self._mask)
        return torch.stack([self._summed(column) for column in (*terms, rewards)])

    @property
    def _mask(self) -> Tensor:
        return self.rollouts.loss_mask

    def _score(self, params: Vector) -> TokenScores:
        # Not `state.score`: at its first use the set is drawn inside this block, with `params` in the model. In
        # `moved` it is then drawn by the policy after a step; `state.before` would change published numbers.
        with self.state.engine.scoring_model(params) as model:
            completions, temperature = Completions.of(self.rollouts), self.state.args.temperature
            return score(model, completions, temperature, self.batch_size, params)

    def _summed(self, values: Float[Tensor, " B"]) -> Float[Tensor, " K"]:
        return values.double()[self.blocks].sum(1)


def true_changes(
    summary: Float[Tensor, "3 K"], moved: Float[Tensor, "3 K"], num_completions: int
) -> tuple[Linearization, Linearization]:
    """(T7), (T20): the true changes of entropy and reward, with blocks in the place of completions."""
    entropy = delta_measured(RatioTerms(*summary[:2]), RatioTerms(*moved[:2]))
    per_completion = moved[2] * (moved.shape[1] / num_completions)
    return entropy, delta_method(lambda m: m[0], per_completion[:, None])
