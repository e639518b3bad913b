"""Probes: TrainerCallbacks that decide when to measure and which estimator to use; no arithmetic."""

from trl_entropy.probes.effective_sample_size import EffectiveSampleSizeProbe
from trl_entropy.probes.entropy import EntropyProbe
from trl_entropy.probes.fisher import FisherProbe
from trl_entropy.probes.mutual_information import MutualInformationProbe
from trl_entropy.probes.next_rollouts import NextRolloutsProbe
from trl_entropy.probes.noise_scale import NoiseScaleProbe
from trl_entropy.probes.optimizer_state import OptimizerStateProbe
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.rollout_entropy import RolloutEntropyProbe

# From a toggle of DrGRPOConfig to the probe that it turns on.
PROBES: dict[str, type[Probe]] = {
    "entropy_probe": EntropyProbe,
    "effective_sample_size_probe": EffectiveSampleSizeProbe,
    "noise_scale_probe": NoiseScaleProbe,
    "fisher_probe": FisherProbe,
    "mutual_information_probe": MutualInformationProbe,
    "optimizer_state_probe": OptimizerStateProbe,
}

__all__ = [
    "PROBES",
    "EffectiveSampleSizeProbe",
    "EntropyProbe",
    "FisherProbe",
    "MutualInformationProbe",
    "NextRolloutsProbe",
    "NoiseScaleProbe",
    "OptimizerStateProbe",
    "Probe",
    "RolloutEntropyProbe",
]
