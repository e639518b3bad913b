"""Clip-Cov, KL-Cov (arXiv:2505.22617) and random tokens in training: chosen tokens are left out or held back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from trl_entropy.estimators.token_control import (
    clip_cov_tokens,
    kl_cov_penalty,
    kl_cov_tokens,
    num_chosen,
    random_tokens,
    token_covariances,
)

if TYPE_CHECKING:
    from trl_entropy.trainer import DrGRPOTrainer

logger = logging.getLogger(__name__)

CHOSEN = "token_control_mask"  # in TRL's batch, which is split and shuffled with it


def control_tokens(trainer: DrGRPOTrainer, batch: dict[str, Any]) -> dict[str, Tensor]:
    """
    What a generation's batch gets in place of its own: advantages by token, 0 where chosen (`clip_cov`, `random`), or
    the mask of the chosen tokens (`kl_cov`). Collective.

    Covariances are centred over the whole batch of all processes, which is one optimizer step's, and ties between
    tokens are broken by their place in it: micro-batches and the number of processes make no difference.
    """
    args, accelerator = trainer.args, trainer.accelerator
    mask = batch["completion_mask"].bool() & batch.get("tool_mask", batch["completion_mask"]).bool()
    chosen, covariances = _chosen_of_all(trainer, batch, mask)
    rank, num_rows = accelerator.process_index, len(mask)
    local = chosen[rank * num_rows : (rank + 1) * num_rows, : mask.shape[1]]
    count = int(chosen.sum())
    found = {"token_control/num_tokens": count}
    if count:
        found["token_control/mean_covariance"] = covariances[chosen].mean().item()
    trainer.record(found)
    if not count and accelerator.is_main_process:
        logger.warning(
            "step %d: token_control=%s chose no token; no covariance lies within token_control_bounds=%s.",
            trainer.step, args.token_control, args.token_control_bounds,
        )  # fmt: skip
    if args.token_control == "kl_cov":
        return {CHOSEN: local}
    advantages = batch["advantages"].reshape(num_rows, -1).expand(mask.shape)
    return {"advantages": advantages.where(~local, 0.0)}


def penalty(trainer: DrGRPOTrainer, inputs: dict[str, Any], loss_logps: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
    """KL-Cov's term of a micro-batch, weighed as the Dr-GRPO loss (T2) weighs its tokens."""
    old = inputs.get("old_per_token_logps")
    normalizer = len(loss_logps) * trainer.max_completion_length * trainer.current_gradient_accumulation_steps
    old = loss_logps.detach() if old is None else old
    coefficient = trainer.args.token_control_coefficient
    return kl_cov_penalty(loss_logps, old, inputs[CHOSEN], coefficient, normalizer)


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
    count = num_chosen(everywhere, args.token_control_fraction)
    if args.token_control == "kl_cov":
        return kl_cov_tokens(covariances, count), covariances
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + trainer.step)
    order = torch.rand(len(everywhere), trainer.max_completion_length, generator=generator, dtype=torch.float64)
    order = order[:, : everywhere.shape[1]].to(everywhere.device)
    if args.token_control == "random":
        return random_tokens(everywhere, count, order), covariances
    low, high = args.token_control_bounds
    return clip_cov_tokens(covariances, (low, high), count, order, args.token_control_quantiles), covariances


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
