"""The entropy of a run's first policy and of its last checkpoint, from fresh completions."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, entropy_terms, policy_entropy
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.redraws import ROWS_PER_CHUNK
from trl_entropy.experiments.state import Policy
from trl_entropy.gradients.scores import score

_START, _END = 3, 4  # second part of a seed, so that the draws are independent of all others


def entropy_fall(
    run: Path, num_completions: int, seed: int = 0, may_import: bool = False, trainer_factory: str | None = None
) -> tuple[Estimate, Estimate]:
    """
    Policy entropy (T6) before the first and after the last step, nats per token, each on completions of its own.

    Prompts are held-out problems, drawn with replacement. They are held out because the steps' changes, whose sum is
    compared with this fall, are measured on prompts other than the step's own; on prompts that a run has trained on
    the entropy falls somewhat further.

    Args:
        may_import, trainer_factory: as for [`Checkpoint.read`].

    Raises:
        ValueError: if the run has no checkpoint of its last step.
    """
    last = Checkpoint.last_of(run, may_import, trainer_factory)
    if last.warning:
        print(f"Warning: {last.warning}.", flush=True)
    return (
        fresh_entropy(last.at_start(), num_completions, (seed, _START)),
        fresh_entropy(last, num_completions, (seed, _END)),
    )


def fresh_entropy(checkpoint: Checkpoint, num_completions: int, seed: tuple[int, ...]) -> Estimate:
    """Policy entropy (T6) of a checkpoint from `num_completions` completions, clustered by problem."""
    parts, prompts = [], []
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(checkpoint, Path(folder), held_out=True)
        for start in range(0, num_completions, ROWS_PER_CHUNK):
            seeds, size = (*seed, start), min(ROWS_PER_CHUNK, num_completions - start)
            problems = policy.draw_problems(size, seeds)
            completions = policy.draw(problems, seeds)
            prompts.append(torch.from_numpy(problems))
            scores = score(policy.model, completions, policy.args.temperature, batch_size=128)
            mask = completions.loss_mask
            parts.append(entropy_terms(scores.entropy[0], mask.double(), mask))
    terms = RatioTerms(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return policy_entropy(terms).estimate(torch.cat(prompts))
