"""
In what TRL's trainers differ for the probes: `GRPOTrainer` with what derives from it, and `RLOOTrainer`.

Written against trl 1.16; `tests/contracts/test_private_names.py` tests what is assumed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from trl_entropy.rollouts.batch import GenerationBatch

# Trainers whose loss is known: it goes by this name, or by `loss_type` where the name is empty.
_LOSSES = {"GRPOTrainer": "", "GMPOTrainer": "GMPOTrainer", "RLOOTrainer": "RLOOTrainer"}


def check_base(kind: type) -> None:
    """Raises `TypeError` unless a trainer's class has the seams that probes need."""
    if not issubclass(kind, GRPOTrainer | RLOOTrainer):
        raise TypeError(
            f"{kind.__name__} derives from neither GRPOTrainer nor RLOOTrainer, whose rollouts, loss and step "
            "ProbedTrainer follows. AsyncGRPOTrainer draws completions while it trains, so that those of a step are "
            "by policies of several steps, and the next ones are not independent of it. For another training loop "
            "there is trl_entropy.watch_step."
        )


def loss_of(kind: type, above: type) -> str:
    """What the loss of a trainer's class is called that it has from the classes after `above`; see `Requirements`."""
    after = kind.__mro__[kind.__mro__.index(above) + 1 :]
    owner = next(one.__name__ for one in after if "_compute_loss" in vars(one))
    return _LOSSES.get(owner, owner)


def own_tokens_of(trainer: Any, generated: tuple) -> list[list[int]] | None:
    """Of what `_generate` returns: 1 for each token that the policy drew, 0 for those of tools; None: it drew all."""
    tokens: list[list[int]] | None = generated[2] if isinstance(trainer, GRPOTrainer) else None
    return tokens


def generate_single_turn(trainer: Any, prompt_ids: Any, images: Any, fields: Any) -> tuple[Any, Any]:
    """One completion of each prompt, and the sampler's log-probabilities if the trainer has them."""
    if isinstance(trainer, GRPOTrainer):
        completion_ids, logps = trainer._generate_single_turn(prompt_ids, images, fields, 1)
        return completion_ids, logps
    return trainer._generate_single_turn(prompt_ids, images, fields), None


def weighted_rewards(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the reward functions, as TRL has it; nan where no function returned a reward."""
    unscored = rewards_per_func.isnan().all(dim=1)
    total: Tensor = (rewards_per_func * weights.to(rewards_per_func.device)).nansum(dim=1)
    return total.masked_fill(unscored, torch.nan)


def with_old_logps(trainer: Any, batch: GenerationBatch, old_logps: Tensor | None) -> GenerationBatch:
    """
    RLOO's batch with the log-probabilities by token under what drew it, of which RLOO keeps only the sum over a
    completion; as in GRPO, where an earlier policy drew the batch, and only there.
    """
    made_of = trainer.args.steps_per_generation * trainer.num_iterations
    if "old_logps" not in batch or trainer.args.gradient_accumulation_steps % made_of == 0:
        return batch
    return cast(GenerationBatch, {**batch, "old_per_token_logps": old_logps})
