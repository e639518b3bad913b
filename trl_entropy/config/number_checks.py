"""Numbers that no run can have: below their least, or above their largest."""

from __future__ import annotations

import math
from collections.abc import Mapping

from transformers import TrainingArguments

from trl_entropy.config.requirements import Requirements
from trl_entropy.config.setting import default_of, own_settings

# TRL's and transformers' fields with the least and the largest value; where the least is not allowed itself, _ABOVE.
_BOUNDS: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "steps_per_generation": (1, math.inf),
    "generation_batch_size": (1, math.inf),
    "num_iterations": (1, math.inf),
    "num_generations_eval": (1, math.inf),
    "max_completion_length": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "temperature": (0, math.inf),
    "learning_rate": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "beta": (0, math.inf),
    "epsilon": (0, math.inf),
}
_ABOVE = ("temperature",)
_ALSO_0 = ("probe_files_keep",)
_NOT_0 = ("probe_batch_size",)  # not set is another thing


class NumberChecks(Requirements):
    """The part of [`~trl_entropy.DrGRPOConfig`] that checks single numbers, before any model is loaded."""

    def _check_numbers(self) -> None:
        """
        This package's whole numbers are 1 or more, or 0 where 0 or nothing is the default or 0 turns it off; TRL's as
        above.
        """
        defaults = {name: default_of(self, name) for name in own_settings(self)}
        whole = {n: d for n, d in defaults.items() if isinstance(getattr(self, n), int) and not isinstance(d, bool)}
        may_be_0 = {n for n, d in whole.items() if (d in (None, 0) or n in _ALSO_0) and n not in _NOT_0}
        check_numbers(self, {name: (0 if name in may_be_0 else 1, math.inf) for name in whole})


def check_numbers(args: TrainingArguments, bounds: Mapping[str, tuple[float, float]] | None = None) -> None:
    """
    Check the numbers of training arguments.

    Args:
        bounds: least and largest value of further fields.

    Raises:
        ValueError: for a number that makes no run. What is not set is left to its owner.
    """
    if args.max_steps == 0:
        raise ValueError("max_steps is 0, with which transformers trains one step; use 1 or more, or -1 for epochs.")
    counted = _counted(args)
    for name, (least, largest) in {**_BOUNDS, **(bounds or {}), **counted}.items():
        value, above = getattr(args, name, None), name in _ABOVE or name in counted
        if value is None or ((value > least or (value == least and not above)) and value <= largest):
            continue
        most = "" if largest == math.inf else f" and at most {largest}"
        raise ValueError(
            f"{name} is {value:.6g}; use " + (f"above {least}" if above else f"{least} or more") + f"{most}."
        )


def _counted(args: TrainingArguments) -> dict[str, tuple[float, float]]:
    """Intervals and lengths that are read with these settings; each must be above 0."""
    read = {
        "save_steps": str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps",
        "logging_steps": str(getattr(args.logging_strategy, "value", args.logging_strategy)) == "steps",
        "num_train_epochs": args.max_steps <= 0,
    }
    return {name: (0, math.inf) for name, is_read in read.items() if is_read}
