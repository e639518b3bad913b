"""Entropy control: opt-in changes of the step itself; all else in the package only measures."""

from typing import Any

from trl_entropy.control.entropy_control import EntropyControl
from trl_entropy.control.token_control import control_micro_batch, control_tokens, penalty, warn_of_no_token
from trl_entropy.probes import Probe


def controls(args: Any) -> list[Probe]:
    """Those that the config turns on. They come before the probes, which then see the corrected step."""
    return [] if args.entropy_control == "none" else [EntropyControl.from_config(args)]


__all__ = ["EntropyControl", "control_micro_batch", "control_tokens", "controls", "penalty", "warn_of_no_token"]
