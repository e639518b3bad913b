"""Numbers that no run can have: below their least, or above their largest."""

from __future__ import annotations

import math

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


class NumberChecks(Requirements):
    """The part of [`~trl_entropy.DrGRPOConfig`] that checks single numbers, before any model is loaded."""

    def _check_numbers(self) -> None:
        """Raises `ValueError` for a number that makes no run; of what none may be missing, None is named too."""
        bounds = _BOUNDS | {name: (least, math.inf) for name, least in self._least_of_own().items()}
        bounds |= dict.fromkeys(self._counted_steps(), (0, math.inf))
        for name, (least, largest) in bounds.items():
            value, above = getattr(self, name), name in (*_ABOVE, *self._counted_steps())
            if value is None or ((least < value if above else least <= value) and value <= largest):
                continue
            most = "" if largest == math.inf else f" and at most {largest}"
            needed = f"above {least}{most}" if above else f"{least} or more{most}"
            raise ValueError(f"{name} is {value}; use {needed}.")

    def _counted_steps(self) -> list[str]:
        """Intervals and lengths that are read with these settings; each must be above 0."""
        read = {
            "save_steps": str(getattr(self.save_strategy, "value", self.save_strategy)) == "steps",
            "logging_steps": str(getattr(self.logging_strategy, "value", self.logging_strategy)) == "steps",
            "num_train_epochs": self.max_steps <= 0,
        }
        return [name for name, is_read in read.items() if is_read]

    def _least_of_own(self) -> dict[str, int]:
        """This package's whole numbers: 1, and 0 where 0 or nothing is the default."""
        defaults = {name: default_of(self, name) for name in own_settings(self)}
        whole = {n: d for n, d in defaults.items() if isinstance(getattr(self, n), int) and not isinstance(d, bool)}
        return {name: 0 if default in (None, 0) else 1 for name, default in whole.items()}
