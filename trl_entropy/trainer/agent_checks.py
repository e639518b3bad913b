"""What does not go with environments that make the prompts: refused at construction."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.trainer.dataset_checks import draws_of, under_other_prompts

logger = logging.getLogger(__name__)


def check_agents(
    args: DrGRPOConfig, *, environment_factory: object, has_episodes: bool = False, callbacks: Iterable[object] = ()
) -> None:
    """
    Refuse what takes prompts from the dataset where an environment makes them, and say what by-turn numbers need.

    Tools and a `rollout_func` go with everything: a probe draws whole episodes with them, as training does.

    Args:
        environment_factory: as the trainer gets it.
        has_episodes: whether completions are episodes with tools or of a `rollout_func`.
        callbacks: the caller's own, of which some may be probes.

    Raises:
        ValueError: naming what is turned on, and what to do.
    """
    by_completion = args.entropy_probe and args.entropy_attribution == "sequence"
    if by_completion and (has_episodes or environment_factory is not None) and args.process_index == 0:
        logger.warning(
            "entropy_attribution='sequence' tells which episodes moved the entropy, not which turns: those need "
            "entropy_attribution='token'."
        )
    if environment_factory is None:
        return
    callbacks = list(callbacks)
    if scoring := under_other_prompts(args, callbacks):
        raise ValueError(
            f"{' and '.join(scoring)} scores completions under other prompts, where an environment would have "
            "answered otherwise. Turn it off, or train without environment_factory."
        )
    if names := [*(draw.name for draw in draws_of(args, callbacks)), *_selecting_prompts(args)]:
        raise ValueError(
            f"{' and '.join(names)} takes prompts from the dataset, but with environment_factory the policy sees what "
            "reset() of an environment makes of a prompt. Measure on the completions of the steps themselves "
            "(entropy_probe_completions, entropy_control_completions), turn it off, or train without "
            "environment_factory."
        )


def _selecting_prompts(args: DrGRPOConfig) -> list[str]:
    selecting = {
        f"curriculum={args.curriculum!r}": args.curriculum != "none",
        "resample_uninformative_groups=True": args.resample_uninformative_groups,
    }
    return [name for name, is_on in selecting.items() if is_on]
