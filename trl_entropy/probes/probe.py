"""`Probe`: a TrainerCallback with the extra events that `DrGRPOTrainer` sends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

if TYPE_CHECKING:
    from trl_entropy.config.dr_grpo import DrGRPOConfig


class Probe(TrainerCallback):
    """
    Decides *when* to measure; the arithmetic lives in `estimators/`.

    A subclass is turned on by a toggle of [`DrGRPOConfig`] or passed in `callbacks=[MyProbe(every=5)]`, and overrides
    any of the events below (all of `TrainerCallback`'s work too). Every event gets `args`, `state`, `control` and, as
    keywords, what is named here; take `**kwargs` for the rest. Events run on all ranks, in the same order. What an
    event puts into `metrics` is logged with the step (average over events of the same name and step).

    Args:
        every: cadence in optimizer steps.

    Step s is the update from theta_(s-1) to theta_s, so during a step `state.global_step` is still s - 1.
    """

    name = "probe"

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every is {every}; use 1 or more steps.")
        self.every = every

    @classmethod
    def from_config(cls, args: DrGRPOConfig) -> Probe:
        """The probe that the toggle `<name>_probe` turns on."""
        return cls(every=getattr(args, f"{cls.name}_probe_every"))

    def wants(self, step: int) -> bool:
        """Whether step `step` (1, 2, ...) is measured; the trainer sends the events below on these steps only."""
        return step % self.every == 0

    def around_micro_batch(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> AbstractContextManager[Any]:
        """
        Entered before a micro-batch's forward and left after its backward: `inputs` (TRL's dict), `trainer`. Under
        DeepSpeed the update comes inside the last micro-batch's backward.
        """
        return nullcontext()

    def on_micro_batch(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        After the loss of a micro-batch, before its backward: `inputs` (TRL's dict), `per_token_logps`, `token_entropy`
        (B, T); `loss_logps`, `loss_entropy`: the same with the loss's graph, for hooks on their gradients.
        """

    def on_rollouts(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """Once a step, when its completions are all in and before the update: `rollouts` (`RolloutBatch`)."""

    def on_before_update(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """Once a step, gradient complete, nothing clipped or moved yet: `update`, `engine`, `rollouts`."""

    def on_after_update(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """Once a step, after the optimizer stepped: the same `update` (`UpdateContext`), `engine`, `rollouts`."""

    def state_dict(self) -> dict[str, Any]:
        """What the probe must remember when the run is resumed: tensors, numbers, strings, containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""

    def watches_updates(self) -> bool:
        """Whether one of the two events of the update is overridden; without any, no engine is built."""
        kind = type(self)
        return (kind.on_before_update, kind.on_after_update) != (Probe.on_before_update, Probe.on_after_update)
