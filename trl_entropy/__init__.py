"""trl_entropy: measure, predict and explain how one optimizer step changes a policy's entropy in GRPO training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trl_entropy._extras import what_to_install
from trl_entropy._versions import warn_if_untested

if TYPE_CHECKING:
    from trl_entropy.analysis.run import load_run as load_run
    from trl_entropy.analysis.views import view as view
    from trl_entropy.config.dr_grpo import DrGRPOConfig as DrGRPOConfig
    from trl_entropy.config.probed import ProbedConfig as ProbedConfig
    from trl_entropy.config.probed import ProbedRLOOConfig as ProbedRLOOConfig
    from trl_entropy.config.probed_gmpo import ProbedGMPOConfig as ProbedGMPOConfig
    from trl_entropy.engine.step_rules import register_step_rule as register_step_rule
    from trl_entropy.estimators.optimizer.step_rule import StepRule as StepRule
    from trl_entropy.probes import Probe as Probe
    from trl_entropy.probes.watch_step import watch_step as watch_step
    from trl_entropy.trainer.dr_grpo import DrGRPOTrainer as DrGRPOTrainer
    from trl_entropy.trainer.entropy_change import EntropyChange as EntropyChange
    from trl_entropy.trainer.probed import ProbedTrainer as ProbedTrainer
    from trl_entropy.trainer.probed_gmpo import ProbedGMPOTrainer as ProbedGMPOTrainer
    from trl_entropy.trainer.probed_rloo import ProbedRLOOTrainer as ProbedRLOOTrainer

__version__ = "0.1.0"

# Loaded on first use: reading a run directory on a laptop must not import torch or TRL.
_EXPORTS = {
    "DrGRPOConfig": "trl_entropy.config.dr_grpo",
    "DrGRPOTrainer": "trl_entropy.trainer.dr_grpo",
    "EntropyChange": "trl_entropy.trainer.entropy_change",
    "Probe": "trl_entropy.probes",
    "ProbedConfig": "trl_entropy.config.probed",
    "ProbedGMPOConfig": "trl_entropy.config.probed_gmpo",
    "ProbedGMPOTrainer": "trl_entropy.trainer.probed_gmpo",
    "ProbedRLOOConfig": "trl_entropy.config.probed",
    "ProbedRLOOTrainer": "trl_entropy.trainer.probed_rloo",
    "ProbedTrainer": "trl_entropy.trainer.probed",
    "StepRule": "trl_entropy.estimators.optimizer.step_rule",
    "load_run": "trl_entropy.analysis.run",
    "register_step_rule": "trl_entropy.engine.step_rules",
    "view": "trl_entropy.analysis.views",
    "watch_step": "trl_entropy.probes.watch_step",
}
__all__ = [
    "DrGRPOConfig",
    "DrGRPOTrainer",
    "EntropyChange",
    "Probe",
    "ProbedConfig",
    "ProbedGMPOConfig",
    "ProbedGMPOTrainer",
    "ProbedRLOOConfig",
    "ProbedRLOOTrainer",
    "ProbedTrainer",
    "StepRule",
    "__version__",
    "load_run",
    "register_step_rule",
    "view",
    "watch_step",
]

warn_if_untested()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_entropy' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    except ModuleNotFoundError as error:
        if (remedy := what_to_install(error)) is None:
            raise
        raise ModuleNotFoundError(f"trl_entropy.{name}: {remedy}", name=error.name) from error
