"""Clip-Cov, KL-Cov (arXiv:2505.22617) and random tokens in training: chosen tokens are left out or held back.

They are chosen in the optimizer's batch when it is generated, or in each micro-batch inside its loss.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from trl_entropy.estimators.control.token_control import (
    clip_cov_tokens,
    kl_cov_penalty,
    kl_cov_tokens,
    num_chosen,
    random_positive_tokens,
    random_tokens,
    ratio_clipped,
    token_covariances,
)

if TYPE_CHECKING:
    from trl_entropy.config.dr_grpo import DrGRPOConfig
    from trl_entropy.probes.step_statistics import StepStatistics
    from trl_entropy.trainer.dr_grpo import DrGRPOTrainer

logger = logging.getLogger(__name__)

CHOSEN = "token_control_mask"  # in TRL's batch, which is split and shuffled with it


def control_tokens(trainer: DrGRPOTrainer, batch: dict[str, Any]) -> dict[str, Tensor]:
    """
    What a generation's batch gets in place of its own: advantages by token, 0 where chosen, or the mask of the chosen
    tokens (`kl_cov`). Collective.

    Covariances are centred over the whole batch of all processes, which is one optimizer step's, and ties between
    tokens are broken by their place in it: micro-batches and the number of processes make no difference.
    """
    accelerator, mask = trainer.accelerator, _loss_mask(batch)
    chosen, covariances = _chosen_of_all(trainer, batch, mask)
    rank, num_rows = accelerator.process_index, len(mask)
    local = chosen[rank * num_rows : (rank + 1) * num_rows, : mask.shape[1]]
    found: dict[str, float] = {"token_control/num_tokens": int(chosen.sum())}
    if chosen.any():
        found["token_control/mean_covariance"] = covariances[chosen].mean().item()
    trainer.record(found)
    warn_of_no_token(trainer, found)
    return _controlled(trainer.args, batch, local)


def control_micro_batch(
    trainer: DrGRPOTrainer,
    inputs: dict[str, Any],
    per_token_logps: Float[Tensor, "B T"],
    number: int,
    statistics: StepStatistics,
) -> dict[str, Tensor]:
    """
    The same for one micro-batch inside its loss, as the published code does it (PRIME-RL/Entropy-Mechanism-of-RL,
    `verl/trainer/ppo/core_algos.py`); theory.md, "Control by tokens", says where that departs from the paper. Local.

    Covariances are of the policy as it is, centred over this micro-batch of this process, and so depend on its size.
    Where the ratio is clipped a token has no gradient, and is not left out a second time.

    Args:
        per_token_logps: what the loss has just scored, nats.
        number: the micro-batch's in its step; with seed, step and rank it seeds the random choice.
    """
    args, mask, advantages = trainer.args, _loss_mask(inputs), inputs["advantages"]
    old = inputs.get("old_per_token_logps", per_token_logps)
    clipped = ratio_clipped(per_token_logps, old, advantages, (trainer.epsilon_low, trainer.epsilon_high))
    covariances = token_covariances(per_token_logps, advantages, mask)
    generator = np.random.default_rng((args.seed, trainer.step, number, trainer.accelerator.process_index))
    order = torch.from_numpy(generator.random(mask.shape)).to(mask.device)
    chosen = _chosen(args, covariances, advantages, mask, order, clipped)
    statistics.add_chosen(chosen, covariances)
    return _controlled(args, inputs, chosen)


def penalty(trainer: DrGRPOTrainer, inputs: dict[str, Any], loss_logps: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
    """KL-Cov's term of a micro-batch, weighed as the loss weighs its tokens: `dr_grpo` (T2), or `bnpo`, their mean."""
    old = inputs.get("old_per_token_logps")
    per_loss = len(loss_logps) * trainer.max_completion_length
    if trainer.loss_type == "bnpo":
        per_loss = max(1, int(_loss_mask(inputs).sum()))
    normalizer = per_loss * trainer.current_gradient_accumulation_steps
    old = loss_logps.detach() if old is None else old
    coefficient = trainer.args.token_control_coefficient
    return kl_cov_penalty(loss_logps, old, inputs[CHOSEN], coefficient, normalizer)


def warn_of_no_token(trainer: DrGRPOTrainer, metrics: Mapping[str, float]) -> None:
    """Say that a step's control did nothing."""
    args = trainer.args
    if metrics.get("token_control/num_tokens") != 0 or not trainer.accelerator.is_main_process:
        return
    reasons = {
        "clip_cov": f"no covariance lies within token_control_bounds={args.token_control_bounds}",
        "random_positive": "no completion has a positive advantage",
    }
    reason = reasons.get(args.token_control, "the step has no token")
    logger.warning("step %d: token_control=%s chose no token; %s.", trainer.step, args.token_control, reason)


def _loss_mask(batch: dict[str, Any]) -> Bool[Tensor, "B T"]:
    return batch["completion_mask"].bool() & batch.get("tool_mask", batch["completion_mask"]).bool()


def _controlled(args: DrGRPOConfig, batch: dict[str, Any], chosen: Bool[Tensor, "B T"]) -> dict[str, Tensor]:
    if args.token_control == "kl_cov":
        return {CHOSEN: chosen}
    advantages = batch["advantages"].reshape(len(chosen), -1).expand(chosen.shape)
    return {"advantages": advantages.where(~chosen, 0.0)}


def _chosen_of_all(
    trainer: DrGRPOTrainer, batch: dict[str, Any], mask: Bool[Tensor, "B T"]
) -> tuple[Bool[Tensor, "N K"], Float[Tensor, "N K"]]:
    """The chosen tokens of all processes and every token's covariance, rows in the order of generation. Collective."""
    args, accelerator = trainer.args, trainer.accelerator

    def gathered(rows: Tensor) -> Tensor:
        return accelerator.gather(accelerator.pad_across_processes(rows, dim=1) if rows.ndim > 1 else rows)

    everywhere = gathered(mask.long()).bool()
    logps, advantages = gathered(_logps(trainer, batch)), gathered(batch["advantages"])
    covariances = token_covariances(logps, advantages, everywhere)
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + trainer.step)
    order = torch.rand(len(everywhere), trainer.max_completion_length, generator=generator, dtype=torch.float64)
    order = order[:, : everywhere.shape[1]].to(everywhere.device)
    unclipped = torch.zeros_like(everywhere)  # the ratio is 1 when tokens are chosen
    return _chosen(args, covariances, advantages, everywhere, order, unclipped), covariances


def _chosen(
    args: DrGRPOConfig,
    covariances: Float[Tensor, "N K"],
    advantages: Float[Tensor, "N *K"],
    mask: Bool[Tensor, "N K"],
    order: Float[Tensor, "N K"],
    clipped: Bool[Tensor, "N K"],
) -> Bool[Tensor, "N K"]:
    """The tokens that `token_control` takes, a fraction of all of `mask`; `order`: random numbers."""
    count, among = num_chosen(mask, args.token_control_fraction), mask & ~clipped
    if args.token_control == "kl_cov":
        return kl_cov_tokens(covariances, count)
    if args.token_control == "random":
        return random_tokens(among, count, order)
    if args.token_control == "random_positive":
        return random_positive_tokens(among, advantages, count, order)
    low, high = args.token_control_bounds
    left = covariances.where(among, math.nan)
    return clip_cov_tokens(left, (low, high), count, order, args.token_control_quantiles)


@torch.no_grad()
def _logps(trainer: DrGRPOTrainer, batch: dict[str, Any]) -> Float[Tensor, "B T"]:
    """Log-probabilities of this process's tokens under the policy, as TRL scores them; one more forward pass."""
    if "old_per_token_logps" in batch:
        return batch["old_per_token_logps"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], trainer.args.per_device_train_batch_size
        )[0]
