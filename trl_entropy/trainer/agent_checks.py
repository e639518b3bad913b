"""What probes and controls do not measure yet where completions hold results of tools: refused at construction."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.control import EntropyControl
from trl_entropy.probes import FisherProbe, RolloutEntropyProbe
from trl_entropy.trainer.dataset_checks import draws_of

logger = logging.getLogger(__name__)


def check_agents(
    args: DrGRPOConfig,
    *,
    tools: object,
    environment_factory: object,
    rollout_func: object = None,
    callbacks: Iterable[object] = (),
) -> None:
    """
    Refuse what would measure something else with tools or with environments.

    Args:
        tools, environment_factory, rollout_func: as the trainer gets them.
        callbacks: the caller's own, of which some may be probes.

    Raises:
        ValueError: naming what is turned on, and what to do.
    """
    callbacks = list(callbacks)
    drawing = [draw.name for draw in draws_of(args, callbacks)]
    if rollout_func is not None and drawing:
        logger.warning(
            "%s draws by the model's own generate, not by rollout_func: it measures the policy's entropy on other "
            "completions than those of the steps.",
            " and ".join(drawing),
        )
    agents = [name for name, given in (("tools", tools), ("environment_factory", environment_factory)) if given]
    if not agents:
        return
    with_what = " and ".join(agents)
    if names := [*_scoring_own_completions(args), *_callbacks_scoring_own_completions(callbacks)]:
        raise ValueError(
            f"{' and '.join(names)} scores every token of the step's completions, but with {with_what} some are "
            "results of tools, which the policy did not write. Turn it off, or train without tools."
        )
    if environment_factory is not None:
        _check_prompts_of_environments([*drawing, *_selecting_prompts(args)])
    elif drawing:
        logger.warning(
            "%s draws first turns alone: what the policy writes after a tool has answered is in no completion that it "
            "measures on.",
            " and ".join(drawing),
        )


def _check_prompts_of_environments(names: list[str]) -> None:
    if names:
        raise ValueError(
            f"{' and '.join(names)} takes prompts from the dataset, but with environment_factory the policy sees what "
            "reset() of an environment makes of a prompt. Turn it off, or train without environment_factory."
        )


def _scoring_own_completions(args: DrGRPOConfig) -> list[str]:
    scoring = {
        "entropy_probe_completions='rollouts'": args.entropy_probe and args.entropy_probe_completions == "rollouts",
        "fisher_probe": args.fisher_probe,
        "entropy_control_completions='rollouts'": (
            args.entropy_control != "none" and args.entropy_control_completions == "rollouts"
        ),
    }
    return [name for name, is_on in scoring.items() if is_on]


def _callbacks_scoring_own_completions(callbacks: list[object]) -> list[str]:
    return [
        type(callback).__name__
        for callback in callbacks
        if isinstance(callback, (RolloutEntropyProbe, FisherProbe))
        or (isinstance(callback, EntropyControl) and callback.source == "rollouts")
    ]


def _selecting_prompts(args: DrGRPOConfig) -> list[str]:
    selecting = {
        f"curriculum={args.curriculum!r}": args.curriculum != "none",
        "resample_uninformative_groups=True": args.resample_uninformative_groups,
    }
    return [name for name, is_on in selecting.items() if is_on]
