"""Entropy control: optional changes of the training step; everything else in the package only measures."""

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.control.entropy_control import EntropyControl
from trl_entropy.control.token_control import TokenControl
from trl_entropy.probes import Probe


def controls(args: ProbeChecks) -> list[Probe]:
    """The controls that the config turns on. They run before the probes, which then see the corrected step."""
    return [] if args.entropy_control == "none" else [EntropyControl.from_config(args)]


__all__ = ["EntropyControl", "TokenControl", "controls"]
