"""TRL's trainer, in which a function of the user's that fails is named: reward functions, tools, environments."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl import GRPOTrainer

from trl_entropy.tasks.completion_functions import CompletionFunction
from trl_entropy.tasks.user_code import naming_what_fails, parts_of_episodes


class UserFunctionsTrainer(GRPOTrainer):
    """
    TRL's `GRPOTrainer`, in which what a function of the user's raises is a `ValueError` of one line.

    It names the function, its file and line, and the completion or the arguments. What a tool raises TRL tells the
    policy, and goes on.

    Every override calls `super()`, and was written against trl 1.16.
    """

    reward_funcs: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        made = kwargs.get("environment_factory")
        factories = list(made.values()) if isinstance(made, dict) else [made] if made is not None else []
        with naming_what_fails(lambda: parts_of_episodes([], factories)):
            super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with naming_what_fails(self._parts):
            return super()._generate_and_score_completions(inputs)

    def _parts(self) -> dict[str, Any]:
        """What TRL calls to draw: tools, environments, and what is called in place of the model."""
        pools = getattr(self, "_environment_pool", {}).values()
        kinds = {type(one) for pool in pools for one in pool}
        found = parts_of_episodes(self._standalone_tools, (self.environment_factories or {}).values(), kinds)
        return found | ({"rollout_func": self.rollout_func} if self.rollout_func is not None else {})

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        kept = self.reward_funcs
        named = zip(self.reward_func_names, kept, strict=True)
        self.reward_funcs = [
            one if isinstance(one, nn.Module) else CompletionFunction(name, name, one, None).checked()
            for name, one in named
        ]
        try:
            return super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = kept
