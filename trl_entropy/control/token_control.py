"""
Clip-Cov and KL-Cov (arXiv:2505.22617), and the same with random tokens, or with those that cost the most entropy for
the reward they earn: chosen tokens get no gradient, or for KL-Cov a penalty on the change of their probability.

Tokens are chosen from the whole optimizer's batch when it is generated, or from each micro-batch inside its loss.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.control.token_exchange import TokenParts
from trl_entropy.estimators.control.token_control import (
    centred_covariances,
    clip_cov_tokens,
    exchange_tokens,
    kl_cov_penalty,
    kl_cov_tokens,
    num_chosen,
    random_positive_tokens,
    random_tokens,
    ratio_clipped,
    token_covariances,
)
from trl_entropy.rollouts.batch import TrainingBatch, loss_mask_of

logger = logging.getLogger(__name__)


class TokenControl:
    """
    `token_control` of [`DrGRPOConfig`]: chooses tokens and changes the batch that the loss reads. Advantages become
    one per token, 0 for chosen tokens; with `kl_cov` the batch instead gets the chosen tokens' `token_control_mask`.

    Args:
        args: the settings `token_control*`, and the seed of the random choices.
        accelerator: gathers the tokens of all processes, which are chosen together.
        score: returns log-probabilities (B, T) of a batch's completions under the present policy; one forward pass.
        score_with_entropy: returns these and the entropies (B, T) of the distributions that tokens were drawn from;
            only called with `token_control_centre="distribution"`.
        parts: returns what each token of a batch costs and earns, None where no token is to be left out; only called
            with `token_control="exchange"`.
    """

    def __init__(
        self,
        args: DrGRPOConfig,
        accelerator: Accelerator,
        score: Callable[[TrainingBatch], Float[Tensor, "B T"]],
        score_with_entropy: Callable[[TrainingBatch], tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]] | None = None,
        parts: Callable[[TrainingBatch], TokenParts | None] | None = None,
    ) -> None:
        self.args, self._accelerator, self._parts = args, accelerator, parts
        self._score, self._score_with_entropy = score, score_with_entropy

    def change_optimizer_batch(self, batch: TrainingBatch, step: int) -> dict[str, float]:
        """
        Choose tokens of a newly generated batch, change it in place, and return the metrics of the choice. Collective.

        Covariances are centred over the batch of all processes, which is that of one optimizer step. Ties between
        tokens are broken by their place in the batch. So the choice does not depend on the size of micro-batches or on
        the number of processes.

        Args:
            step: the step that the batch is for; seeds the random choice, with the run's seed.
        """
        mask = loss_mask_of(batch).bool()
        metrics: dict[str, float] = {}
        if self.args.token_control == "exchange":
            chosen = self._dearest_of_all(batch, mask, metrics)
        else:
            chosen, covariances = self._chosen_of_all(batch, mask, step)
            if chosen.any():
                metrics["token_control/mean_covariance"] = covariances[chosen].mean().item()
        rank, num_rows = self._accelerator.process_index, len(mask)
        local = chosen[rank * num_rows : (rank + 1) * num_rows, : mask.shape[1]]
        self._change(batch, local)
        return {"token_control/num_tokens": int(chosen.sum()), **metrics}

    def change_micro_batch(
        self,
        inputs: TrainingBatch,
        per_token_logps: Float[Tensor, "B T"],
        step: int,
        number: int,
        token_entropy: Float[Tensor, "B T"] | None = None,
    ) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
        """
        The same for one micro-batch inside its loss, as in the published code (PRIME-RL/Entropy-Mechanism-of-RL,
        `verl/trainer/ppo/core_algos.py`); theory.md, "Control by tokens", says where that departs from the paper.
        Local.

        Covariances are those of the present policy, centred over this micro-batch of this process, and so depend on
        its size. A token whose ratio is clipped has no gradient anyway; all choices except `kl_cov` skip it.

        Args:
            per_token_logps: log-probabilities that the loss has just computed, nats.
            number: the micro-batch's number in its step; seeds the random choice, with the run's seed, step and rank.
            token_entropy: entropies that the loss has just computed, nats; for `token_control_centre="distribution"`.

        Returns:
            The chosen tokens, and the covariance of each token's log-probability and advantage, nats x advantage.
        """
        args, mask, advantages = self.args, loss_mask_of(inputs).bool(), inputs["advantages"]
        old = inputs.get("old_per_token_logps", per_token_logps)
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        clipped = ratio_clipped(per_token_logps, old, advantages, (args.epsilon, high))
        covariances = self._covariances(per_token_logps, token_entropy, advantages, mask)
        generator = np.random.default_rng((args.seed, step, number, self._accelerator.process_index))
        order = torch.from_numpy(generator.random(mask.shape)).to(mask.device)
        chosen = self._chosen(covariances, advantages, mask, order, clipped)
        self._change(inputs, chosen)
        return chosen, covariances

    def penalty(
        self, inputs: TrainingBatch, loss_logps: Float[Tensor, "B T"], num_micro_batches: int
    ) -> Float[Tensor, ""]:
        """
        KL-Cov's penalty of a micro-batch, its tokens weighted as in the loss: `dr_grpo` (T2) or `bnpo` (their mean).

        Args:
            loss_logps: log-probabilities that the loss has computed, with its autograd graph, nats.
            num_micro_batches: micro-batches of the step, over which the loss is averaged.
        """
        per_loss = len(loss_logps) * self.args.max_completion_length
        if self.args.loss_type == "bnpo":
            per_loss = max(1, int(loss_mask_of(inputs).bool().sum()))
        old = inputs.get("old_per_token_logps")
        old = loss_logps.detach() if old is None else old
        coefficient = self.args.token_control_coefficient
        return kl_cov_penalty(loss_logps, old, inputs["token_control_mask"], coefficient, per_loss * num_micro_batches)

    def warn_of_no_token(self, metrics: Mapping[str, float], step: int) -> None:
        """Warn if no token was chosen in a step, and say why."""
        args = self.args
        is_meant = args.token_control == "exchange"  # above its floor
        if metrics.get("token_control/num_tokens") != 0 or is_meant or not self._accelerator.is_main_process:
            return
        reasons = {
            "clip_cov": "every token's ratio is clipped already"
            if args.token_control_choice == "largest"
            else f"no covariance lies within token_control_bounds={args.token_control_bounds}",
            "random_positive": "no completion has a positive advantage",
        }
        reason = reasons.get(args.token_control, "the step has no token")
        logger.warning("step %d: token_control=%s chose no token; %s.", step, args.token_control, reason)

    # ---- the choice

    def _change(self, batch: TrainingBatch, chosen: Bool[Tensor, "B T"]) -> None:
        if self.args.token_control == "kl_cov":
            batch["token_control_mask"] = chosen  # TRL splits and shuffles it with the rest of the batch
        else:
            advantages = batch["advantages"].reshape(len(chosen), -1).expand(chosen.shape)
            batch["advantages"] = advantages.where(~chosen, 0.0)

    def _chosen_of_all(
        self, batch: TrainingBatch, mask: Bool[Tensor, "B T"], step: int
    ) -> tuple[Bool[Tensor, "N K"], Float[Tensor, "N K"]]:
        """The chosen tokens of all processes and each token's covariance, rows in order of generation. Collective."""
        everywhere = self._gathered(mask.long()).bool()
        logps, entropy = self._scored(batch)
        logps, advantages = self._gathered(logps), self._gathered(batch["advantages"])
        entropy = None if entropy is None else self._gathered(entropy)
        covariances = self._covariances(logps, entropy, advantages, everywhere)
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        order = torch.rand(len(everywhere), self.args.max_completion_length, generator=generator, dtype=torch.float64)
        beyond = max(0, everywhere.shape[1] - order.shape[1])  # pad_to_multiple_of pads further than any completion
        order = torch.nn.functional.pad(order, (0, beyond))[:, : everywhere.shape[1]].to(everywhere.device)
        unclipped = torch.zeros_like(everywhere)  # the ratio is 1 when tokens are chosen
        return self._chosen(covariances, advantages, everywhere, order, unclipped), covariances

    def _dearest_of_all(
        self, batch: TrainingBatch, mask: Bool[Tensor, "B T"], metrics: dict[str, float]
    ) -> Bool[Tensor, "N K"]:
        """
        The tokens of all processes that lose most entropy for what they earn (T24), none above the floor; adds what
        share of the step's changes would have been theirs to `metrics`. Collective.
        """
        assert self._parts is not None
        parts, everywhere = self._parts(batch), self._gathered(mask.long()).bool()
        if parts is None:
            return torch.zeros_like(everywhere)
        entropy, reward = self._gathered(parts.entropy), self._gathered(parts.reward)
        chosen = exchange_tokens(entropy, reward, everywhere, num_chosen(everywhere, self.args.token_control_fraction))
        for name, part in (("entropy", entropy), ("reward", reward)):
            metrics[f"token_control/{name}_share"] = (part[chosen].sum() / part.sum()).item()
        return chosen

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, as wide as the widest. Collective."""
        accelerator = self._accelerator
        return accelerator.gather(accelerator.pad_across_processes(rows, dim=1) if rows.ndim > 1 else rows)

    def _scored(self, batch: TrainingBatch) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
        """Log-probabilities under the policy that the batch is to train, and entropies where they are needed."""
        old, logps, entropy = batch.get("old_per_token_logps"), None, None
        if self.args.token_control_centre == "distribution":
            assert self._score_with_entropy is not None
            logps, entropy = self._score_with_entropy(batch)
        elif old is None:
            logps = self._score(batch)
        return (logps if old is None else old), entropy

    def _covariances(
        self,
        logps: Float[Tensor, "N K"],
        entropy: Float[Tensor, "N K"] | None,
        advantages: Float[Tensor, "N *K"],
        mask: Bool[Tensor, "N K"],
    ) -> Float[Tensor, "N K"]:
        """Each token's covariance by `token_control_centre`, nats x advantage."""
        if self.args.token_control_centre == "distribution":
            assert entropy is not None
            return centred_covariances(logps, entropy, advantages, mask)
        return token_covariances(logps, advantages, mask)

    def _chosen(
        self,
        covariances: Float[Tensor, "N K"],
        advantages: Float[Tensor, "N *K"],
        mask: Bool[Tensor, "N K"],
        order: Float[Tensor, "N K"],
        clipped: Bool[Tensor, "N K"],
    ) -> Bool[Tensor, "N K"]:
        """The tokens that `token_control` chooses, a fraction of those of `mask`; `order` are random numbers."""
        args = self.args
        count, among = num_chosen(mask, args.token_control_fraction), mask & ~clipped
        if args.token_control == "kl_cov":
            return kl_cov_tokens(covariances, count)
        if args.token_control == "random":
            return random_tokens(among, count, order)
        if args.token_control == "random_positive":
            return random_positive_tokens(among, advantages, count, order)
        left = covariances.where(among, math.nan)
        if args.token_control_choice == "largest":
            return kl_cov_tokens(left, count)
        low, high = args.token_control_bounds
        return clip_cov_tokens(left, (low, high), count, order, args.token_control_quantiles)
