"""Entropy control: optional changes of the training step; everything else in the package only measures."""

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.control.entropy_control import EntropyControl
from trl_entropy.control.token_control import TokenControl
from trl_entropy.control.token_exchange import TokenExchange
from trl_entropy.probes import Probe


def controls(args: ProbeChecks) -> list[Probe]:
    """The controls that the config turns on. They run before the probes, which then see the corrected step."""
    found: list[Probe] = [] if args.entropy_control == "none" else [EntropyControl.from_config(args)]
    return [*found, TokenExchange.from_config(args)] if args.token_control == "exchange" else found


__all__ = ["EntropyControl", "TokenControl", "TokenExchange", "controls"]
