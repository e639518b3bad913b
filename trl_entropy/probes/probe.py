"""`Probe`: a TrainerCallback with the extra events that `DrGRPOTrainer` sends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.runs.state import StateDict


class Probe(TrainerCallback):
    """
    Decides *when* to measure; the arithmetic lives in `estimators/`.

    A subclass is turned on by a toggle of [`DrGRPOConfig`] or passed in `callbacks=[MyProbe(every=5)]`, and overrides
    any of the events below (all of `TrainerCallback`'s work too). Every event gets `args`, `state`, `control` and, as
    keywords, what is named here and in its docstring; take `**kwargs` for the rest. Events run on all ranks, in the
    same order. What an event puts into `metrics` is logged with the step; values of the same name and step are
    averaged.

    Keywords of every event but `around_micro_batch`: `metrics`; `accelerator`; `model`, unwrapped; `sampler`
    ([`ProbeBatchSampler`], draws probe batches); `files` ([`ProbeFiles`], writes `probes/<name>/step_*.safetensors`).

    Attributes:
        name: of the probe's files and of its key `time/<name>`.
        state_name: under which checkpoints keep the probe's state; empty: the class's name. Two probes of a run that
            have a state must differ in it.
        needs_loss_coefficients: whether to record how the loss depends on each token's score, by hooks on training's
            own backward pass; the events of the update then find it in `record.loss_coefficients`.

    Args:
        every: cadence in optimizer steps.

    When training begins: `reset`, `load_state_dict` (when it is resumed), `check_model`, then the events of the steps.
    Step s is the update from theta_(s-1) to theta_s, so during a step `state.global_step` is still s - 1.
    """

    name = "probe"
    state_name = ""

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every is {every}; use 1 or more steps.")
        self.every = every

    @classmethod
    def from_config(cls, args: DrGRPOConfig) -> Probe:
        """The probe that the toggle `<name>_probe` turns on."""
        return cls(every=getattr(args, f"{cls.name}_probe_every"))

    @property
    def needs_loss_coefficients(self) -> bool:
        """False, unless a subclass says otherwise."""
        return False

    def wants(self, step: int) -> bool:
        """Whether step `step` (1, 2, ...) is measured; the events below are sent on these steps only."""
        return step % self.every == 0

    # ---- before training

    def check_model(self, args: DrGRPOConfig, model: nn.Module) -> None:
        """
        Called when the model is prepared and a checkpoint loaded, with the unwrapped model: refuse what the probe's
        equation does not cover.

        Raises:
            ValueError: saying what was found and what to change.
        """

    def reset(self) -> None:
        """
        Called when `train()` begins, before anything is loaded: forget what a training that ended inside a step, with
        an exception, has left half done.
        """

    # ---- events of a step, in their order

    def on_rollouts_drawn(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        Each time completions were generated and rewarded, whatever the cadence, by the parameters after the last step
        and before they are shuffled and split: `drawn` (`RolloutBatch`), `record` (`StepRecord` of the step before;
        None at the first step and after a resume).
        """

    def around_micro_batch(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> AbstractContextManager[Any]:
        """
        Entered before a micro-batch's forward and left after its backward: `inputs` (TRL's batch), `model`, unwrapped.
        Under DeepSpeed the update comes inside the last micro-batch's backward.
        """
        return nullcontext()

    def on_micro_batch(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        After the loss of a micro-batch, before its backward: `inputs` (TRL's batch), `mask` (of the tokens that the
        loss counts), `per_token_logps`, `token_entropy`, `log_ratio` (B, T), nats; `loss_logps`, `loss_entropy`: the
        first two with the loss's graph, for hooks on their gradients.
        """

    def on_rollouts(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        Once a step, when its completions are all in and before the update: `rollouts` (`RolloutBatch`), `record`
        (`StepRecord`).
        """

    def on_before_update(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """Once a step, gradient complete, nothing clipped or moved: `update`, `engine`, `rollouts`, `record`."""

    def on_after_update(
        self, args: DrGRPOConfig, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        Once a step, after the optimizer stepped: the same `update` (`UpdateContext`), `engine`, `rollouts`, `record`.
        """

    # ---- resuming

    def state_dict(self) -> StateDict:
        """What the probe must remember when the run is resumed: tensors, numbers, strings, containers of them."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Put back what `state_dict` gave."""

    def watches_updates(self) -> bool:
        """Whether one of the two events of the update is overridden; without any, no engine is built."""
        kind = type(self)
        return (kind.on_before_update, kind.on_after_update) != (Probe.on_before_update, Probe.on_after_update)
