"""`Probe`: a TrainerCallback with the extra events that `DrGRPOTrainer` sends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.runs.state import StateDict


class Probe(TrainerCallback):
    """
    Decides *when* to measure; the arithmetic lives in `estimators/`.

    A subclass is turned on by a toggle of [`DrGRPOConfig`] or passed in `callbacks=[MyProbe(every=5)]`. It overrides
    any of the events below (those of `TrainerCallback` work too). Every event is called with `args`, `state`,
    `control` and the keywords that are named here and in its docstring; accept `**kwargs` for those it does not use.
    Events run on all ranks, in the same order. What an event puts into `metrics` is logged with the step; values of
    the same name and step are averaged.

    Keywords of every event except `around_micro_batch`: `metrics`; `accelerator`; `model`, unwrapped; `sampler`
    ([`ProbeBatchSampler`], draws probe batches); `files` ([`ProbeFiles`], writes `probes/<name>/step_*.safetensors`).

    Attributes:
        name: name of the probe's folder of files and of its metric `time/<name>`.
        state_name: name of the probe's state in checkpoints; if it is empty, the class's name is taken. Two probes of
            a run that have a state must differ in it.
        needs_loss_coefficients: whether hooks on training's own backward pass record how the loss depends on each
            token's score; `on_before_update` and `on_after_update` then find this in `record.loss_coefficients`.
        splits_steps: whether it needs the parts of the optimizer's step (T5), and so an optimizer with a known rule.
        measures_quantities: whether it measures the change of numbers of completions, those of `Completions.values`.
        change_of: names of these, as of the setting `change_of`; None: its default.

    Args:
        every: cadence in optimizer steps.

    When the trainer is built: `check_model`. When training begins: `reset`, `load_state_dict` (when it is resumed),
    `check_model` again, then the events of the steps. Step s is the update from theta_(s-1) to theta_s, so during a
    step `state.global_step` is still s - 1.
    """

    name = "probe"
    state_name = ""
    measures_quantities: bool = False
    change_of: Sequence[str] | None = None

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every is {every}; use 1 or more steps.")
        self.every = every

    @classmethod
    def from_config(cls, args: ProbeChecks) -> Probe:
        """The probe that the toggle `<name>_probe` turns on."""
        return cls(every=getattr(args, f"{cls.name}_probe_every"))

    @property
    def needs_loss_coefficients(self) -> bool:
        """False, unless a subclass overrides it."""
        return False

    @property
    def splits_steps(self) -> bool:
        """False, unless a subclass overrides it."""
        return False

    def wants(self, step: int) -> bool:
        """Whether step `step` (1, 2, ...) is measured; the events below are sent in these steps only."""
        return step % self.every == 0

    # ---- before training

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        """
        Called when the trainer is built, and again when the model is prepared and a checkpoint loaded, each time with
        the unwrapped model: refuse what the probe's equation does not cover.

        Raises:
            ValueError: with a message that says what was found and what to change.
        """

    def reset(self) -> None:
        """
        Called when `train()` begins, before anything is loaded: forget what a training that ended inside a step, with
        an exception, has left half done.
        """

    # ---- events of a step, in their order

    def on_rollouts_drawn(
        self, args: ProbeChecks, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        When a step begins, whatever the cadence: `drawn` (`RolloutBatch`), the completions that are known by then, all
        of a new generation, before uninformative groups are replaced, or the step's own of an earlier one; `engine`;
        `record` (`StepRecord` of the step before; None at the first step, and after a resume unless its update was
        kept). What is put into `metrics` is logged with the step of `record`. The entropy probe measures that step on
        `drawn`, if it takes the next rollouts, and probes after it find the result in `record.probe_batch`.
        """

    def on_no_more_rollouts(
        self, args: ProbeChecks, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        When training ends, after the last checkpoint: no completions will follow the last step. `engine`, `record`
        (`StepRecord` of that step). What is put into `metrics` is logged with it. Not sent after SIGTERM.
        """

    def around_micro_batch(
        self, args: ProbeChecks, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> AbstractContextManager[Any]:
        """
        A context around the forward and backward pass of a micro-batch: `inputs` (TRL's batch), `model`, unwrapped.
        Under DeepSpeed the optimizer's step is made inside the last micro-batch's backward pass.
        """
        return nullcontext()

    def on_micro_batch(
        self, args: ProbeChecks, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        After the loss of a micro-batch, before its backward pass: `inputs` (TRL's batch), `mask` (1 for the tokens
        that the loss counts), `per_token_logps`, `token_entropy`, `log_ratio` (None on policy), each (B, T), nats;
        `loss_logps`, `loss_entropy`: the first two with the autograd graph of the loss, for hooks on their gradients.
        """

    def on_rollouts(
        self, args: ProbeChecks, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        Once a step, after the loss of its last micro-batch: `rollouts` (`RolloutBatch`, all of this process's
        completions of the step), `record` (`StepRecord`).
        """

    def on_before_update(
        self, args: ProbeChecks, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        Once a step, when the gradient is complete, before it is clipped and any parameter changes: `update`
        (`UpdateContext`), `engine`, `rollouts`, `record`.
        """

    def on_after_update(
        self, args: ProbeChecks, state: TrainerState, control: TrainerControl, *, metrics: dict, **kwargs: Any
    ) -> None:
        """
        Once a step, after the optimizer's step: the same `update`, `engine`, `rollouts`, `record`, which has a
        `probe_batch` if the entropy probe has drawn one.
        """

    # ---- resuming

    def state_dict(self) -> StateDict:
        """What a resumed run needs of the probe: tensors, numbers, strings, and containers of them."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what `state_dict` returned."""

    def watches_updates(self) -> bool:
        """Whether `on_before_update` or `on_after_update` is overridden; if no probe does, no engine is built."""
        kind = type(self)
        return (kind.on_before_update, kind.on_after_update) != (Probe.on_before_update, Probe.on_after_update)
