"""`ProbedGMPOTrainer`: TRL's experimental `GMPOTrainer` with probes."""

from __future__ import annotations

from trl.experimental.gmpo import GMPOTrainer

from trl_entropy.trainer.probed import ProbedTrainer


class ProbedGMPOTrainer(ProbedTrainer, GMPOTrainer):
    """[`~trl.experimental.gmpo.GMPOTrainer`] with the probes of [`ProbedTrainer`]; takes a [`ProbedGMPOConfig`]."""
