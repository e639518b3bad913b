"""`ProbedRLOOTrainer`: TRL's `RLOOTrainer` with probes."""

from __future__ import annotations

from trl import RLOOTrainer

from trl_entropy.trainer.probed import ProbedTrainer


class ProbedRLOOTrainer(ProbedTrainer, RLOOTrainer):
    """[`~trl.RLOOTrainer`] with the probes of [`ProbedTrainer`]; takes a [`ProbedRLOOConfig`]."""
