"""`ProbeRunner`: sends a step's events to the probes, measures the time they take, and holds the engine they read."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine import Engine, UpdateContext, build_engine
from trl_entropy.engine.reader import unwrapped_optimizer
from trl_entropy.engine.step_rules import step_rule
from trl_entropy.gradients.loss_coefficients import LossCoefficientRecorder
from trl_entropy.probes.clock import seconds
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.batch import RolloutBatch, TrainingBatch
from trl_entropy.rollouts.drawing import ProbeBatchSampler
from trl_entropy.runs import tensorboard
from trl_entropy.runs.self_checks import SELF_CHECK_LIMIT, advice, failed_self_checks
from trl_entropy.runs.state import StateDict

logger = logging.getLogger(__name__)


@runtime_checkable
class StepHost(Protocol):
    """What the runner uses of the trainer."""

    args: ProbeChecks
    state: TrainerState
    control: TrainerControl
    accelerator: Accelerator
    model: nn.Module
    model_wrapped: nn.Module
    optimizer: Any  # what `accelerator.prepare` returned
    callback_handler: CallbackHandler

    @property
    def current_step(self) -> int:
        """The present optimizer step, 1, 2, ...: the update from theta_(step - 1) to theta_step."""

    def record_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars with the present step, or with an earlier one."""


@dataclass(frozen=True)
class ScoredMicroBatch:
    """
    What the loss has computed for a micro-batch, so that probes need not compute it again.

    Attributes:
        loss_logps: log pi of the sampled tokens, nats, with the autograd graph of the loss.
        loss_entropy: entropy of the next-token distributions, nats, with the autograd graph of the loss.
        log_ratio: log pi - log pi_old, nats; None on policy, where it is zero by definition.
        mask: 1 for the tokens that the loss counts.
    """

    loss_logps: Float[Tensor, "b T"]
    loss_entropy: Float[Tensor, "b T"]
    log_ratio: Float[Tensor, "b T"] | None
    mask: Int[Tensor, "b T"]


class ProbeRunner(TrainerCallback):
    """
    Calls the probes that measure the present step, in the order of the trainer's callbacks, and logs what they put
    into `metrics` and how long they took.

    It is a callback itself, registered before the probes, for the events that transformers sends. The trainer reports
    the other ones by calling [`rollouts_drawn`], [`around_micro_batch`], [`micro_batch_done`], [`rollouts_complete`],
    [`gradients_ready`] and [`no_more_rollouts`].
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.last_step: StepRecord | None = None
        self._micro_batches: list[TrainingBatch] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._coefficients = LossCoefficientRecorder()
        self.epoch_has_ended = False
        self._warned: set[str] = set()  # self-checks of which the console has been told

    def attach(self, host: StepHost, sampler: ProbeBatchSampler, files: ProbeFiles) -> None:
        """Set the trainer, the sampler and the files; must be called before the first event."""
        self._host, self._sampler, self._files = host, sampler, files

    # ---- the probes

    def probes(self) -> list[Probe]:
        """All probes of the run, in the order in which events reach them."""
        return [callback for callback in self._host.callback_handler.callbacks if isinstance(callback, Probe)]

    def named_probes(self) -> dict[str, Probe]:
        """
        The probes that have a state, by the name under which a checkpoint has it.

        Raises:
            ValueError: when two of them share a name.
        """
        named: dict[str, Probe] = {}
        for probe in self.probes():
            if type(probe).state_dict is Probe.state_dict:
                continue
            name = probe.state_name or type(probe).__name__
            if name in named:
                raise ValueError(
                    f"two probes have the state_name {name!r}, by which a checkpoint knows their state. Set another "
                    "state_name on one of them: probe.state_name = '...'."
                )
            named[name] = probe
        return named

    def _wanting(self) -> list[Probe]:
        return [probe for probe in self.probes() if probe.wants(self._host.current_step)]

    def wants_step(self) -> bool:
        """Whether any probe measures the present step."""
        return bool(self._wanting())

    def _records_coefficients(self) -> bool:
        return any(probe.needs_loss_coefficients for probe in self._wanting())

    def _send(self, event: str, probes: list[Probe] | None = None, step: int | None = None, **kwargs: Any) -> None:
        """Call `event` of the probes that want this step, or of `probes`; log their `metrics` with it, or `step`."""
        host = self._host
        step = host.current_step if step is None else step
        model = host.accelerator.unwrap_model(host.model)
        device = host.accelerator.device
        for probe in self._wanting() if probes is None else probes:
            self._seconds[probe.name] += 0.0  # logged for every probe of the step
            if not _listens(probe, event):  # nor does the host wait for the device then
                continue
            metrics: dict[str, float] = {}
            start = seconds(device)
            getattr(probe, event)(
                host.args,
                host.state,
                host.control,
                metrics=metrics,
                accelerator=host.accelerator,
                model=model,
                sampler=self._sampler,
                files=self._files,
                **kwargs,
            )
            self._seconds[probe.name] += seconds(device) - start
            self._warn_of_self_checks(metrics, step)
            if metrics:
                host.record_metrics(metrics, step)

    def _warn_of_self_checks(self, metrics: Mapping[str, float], step: int) -> None:
        """Say once for each key that a probe computed the same number in two ways, and that they differ."""
        host = self._host
        failed = {key: value for key, value in failed_self_checks(metrics).items() if key not in self._warned}
        self._warned |= failed.keys()
        if failed and host.accelerator.is_main_process:
            named = ", ".join(f"{key} is {value:.2g}" for key, value in failed.items())
            logger.warning("step %d: %s, and may be at most %g. %s", step, named, SELF_CHECK_LIMIT, advice())

    # ---- training begins and ends

    def check_model(self) -> None:
        """Let each probe check the model: to call when the trainer is built, and when training begins."""
        host = self._host
        model = host.accelerator.unwrap_model(host.model)
        self.named_probes()  # raises if two share a name
        for probe in self.probes():
            probe.check_model(host.args, model)
        optimizer = unwrapped_optimizer(host.optimizer)
        if isinstance(optimizer, torch.optim.Optimizer):  # there may be none yet; DeepSpeed's is asked by the engine
            self._check_optimizer(functools.partial(step_rule, optimizer))

    def _check_optimizer(self, rule: Callable[[], object]) -> None:
        """Raises `ValueError` if a probe needs the rule of the optimizer's steps and `rule` raises one."""
        if splitting := [probe.name for probe in self.probes() if probe.splits_steps]:
            try:
                rule()
            except ValueError as error:
                raise ValueError(f"{', '.join(splitting)}: {error}, or turn it off") from error

    def reset(self) -> None:
        """Drop what an earlier training has left that ended with an exception inside a step."""
        self._micro_batches.clear()
        self._seconds.clear()
        self._coefficients.forget()
        self._files.reset()
        self._warned.clear()
        self.last_step = None
        if self.engine is not None:
            self._close_engine()
        for probe in self.probes():
            probe.reset()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let each probe check the model, and start the engine if any probe listens to the update."""
        host, probes = self._host, self.probes()
        self.check_model()
        if any(map(_follows_updates, probes)):  # only then must the engine be one that we can read
            self._start_engine()
        tensorboard.lay_out(host.callback_handler.callbacks, {probe.name for probe in probes})

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch_has_ended = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch_has_ended = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last_step = None
        if self.engine is not None:
            self._close_engine()

    def _start_engine(self) -> None:
        host = self._host
        self.engine = build_engine(host.accelerator, host.model_wrapped, host.optimizer, host.args.max_grad_norm)
        self.engine.register(
            wants=lambda: any(map(_follows_updates, self._wanting())),
            before_update=self._before_update,
            after_update=self._after_update,
        )
        self._check_optimizer(self.engine.step_rule)

    def _close_engine(self) -> None:
        assert self.engine is not None
        self.engine.close()
        self.engine = None

    # ---- rollouts and micro-batches

    def rollouts_drawn(self, batches: Sequence[TrainingBatch], by_present_policy: bool) -> None:
        """
        To call when a step begins. Whatever their cadence, probes that listen are told: one that measures every fifth
        step finishes it when the next completions come.

        Args:
            batches: the completions of the step that are known, or all of a new generation.
            by_present_policy: whether they were drawn after the last step, rather than before it.
        """
        listening, record = self._overriding("on_rollouts_drawn"), self.last_step
        if listening:
            drawn = RolloutBatch.from_micro_batches(batches, by_present_policy)
            step = None if record is None else record.step
            self._send("on_rollouts_drawn", listening, step, drawn=drawn, record=record, engine=self.engine)
        if record is not None:
            record.forget_update()  # not to be held while the next step is made

    def no_more_rollouts(self) -> None:
        """To call when training ends, after the last checkpoint, unless it is to go on later."""
        if (record := self.last_step) is not None:
            listening = self._overriding("on_no_more_rollouts")
            self._send("on_no_more_rollouts", listening, record.step, record=record, engine=self.engine)
            record.forget_update()

    def _overriding(self, event: str) -> list[Probe]:
        """The probes that listen to an event, whatever their cadence."""
        return [probe for probe in self.probes() if _listens(probe, event)]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the present step whose loss has been computed."""
        return len(self._micro_batches)

    @contextlib.contextmanager
    def around_micro_batch(self, inputs: TrainingBatch) -> Iterator[None]:
        """To enter around a micro-batch's forward and backward pass."""
        host = self._host
        model = host.accelerator.unwrap_model(host.model)
        with contextlib.ExitStack() as around:
            wanting = self._wanting()
            if self._records_coefficients():
                around.enter_context(self._coefficients.around(inputs))
            for probe in wanting:
                around.enter_context(
                    probe.around_micro_batch(host.args, host.state, host.control, inputs=inputs, model=model)
                )
            yield

    def micro_batch_done(self, inputs: TrainingBatch, scored: ScoredMicroBatch) -> None:
        """After the loss of a micro-batch, before its backward."""
        if self._records_coefficients():
            self._coefficients.watch(inputs, scored.loss_logps, scored.loss_entropy)
        self._send(
            "on_micro_batch",
            inputs=inputs,
            mask=scored.mask,
            loss_logps=scored.loss_logps,
            loss_entropy=scored.loss_entropy,
            per_token_logps=scored.loss_logps.detach(),
            token_entropy=scored.loss_entropy.detach(),
            log_ratio=scored.log_ratio,
        )
        self._micro_batches.append(inputs)

    def rollouts_complete(self) -> None:
        """To call after `micro_batch_done` of the step's last micro-batch."""
        rollouts = RolloutBatch.from_micro_batches(self._micro_batches)
        self._micro_batches = []
        self.last_step = StepRecord(self._host.current_step, rollouts)
        self._send("on_rollouts", rollouts=rollouts, record=self.last_step)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count what is done within as time of this probe in the present step."""
        device = self._host.accelerator.device
        start = seconds(device)
        yield
        self._seconds[name] += seconds(device) - start

    # ---- the update

    def gradients_ready(self) -> None:
        """To call after the backward pass of the step's last micro-batch."""
        if self.engine is not None:
            self.engine.gradients_ready()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is not None:
            self.engine.update_done()

    def _before_update(self, update: UpdateContext) -> None:
        record = self.last_step
        assert record is not None and self.engine is not None, "rollouts_complete comes before the update"
        record.learning_rate = float(self.engine.optimizer.param_groups[0]["lr"])
        if self._records_coefficients():
            host, mask = self._host, record.rollouts.loss_mask
            record.loss_coefficients = self._coefficients.of_step(mask, host.args, host.accelerator.num_processes)
        self._send_update("on_before_update", update)

    def _after_update(self, update: UpdateContext) -> None:
        self._send_update("on_after_update", update)
        assert self.last_step is not None
        self.last_step.take(update)  # after all of them: one may have corrected the step

    def _send_update(self, event: str, update: UpdateContext) -> None:
        record = self.last_step
        assert record is not None
        self._send(event, update=update, engine=self.engine, rollouts=record.rollouts, record=record)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log how long each probe took in the events of this step, seconds."""
        self._coefficients.forget()
        self._host.record_metrics({f"time/{name}": seconds for name, seconds in self._seconds.items()})
        self._seconds.clear()

    # ---- resuming

    def state_dict(self) -> StateDict:
        """The state of every probe that has one, by its `state_name`, and the last step if it is not measured yet."""
        record = self.last_step
        return {
            "probes": {name: probe.state_dict() for name, probe in self.named_probes().items()},
            "last_step": None if record is None or record.kept is None else record.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Give each probe its state back; one that is turned on later has none, and one that is off is named."""
        named, of_probes = self.named_probes(), state["probes"]
        for name in (name for name in named if name in of_probes):
            named[name].load_state_dict(of_probes[name])
        if state["last_step"] is not None:
            self.last_step = StepRecord.from_state(state["last_step"], self._host.accelerator.device)
        if gone := sorted(of_probes.keys() - named.keys()):
            logger.warning("the checkpoint has the state of probes that this run does not have: %s", ", ".join(gone))


def _listens(probe: Probe, event: str) -> bool:
    """Whether the probe overrides the event."""
    return getattr(type(probe), event) is not getattr(Probe, event)


def _follows_updates(probe: Probe) -> bool:
    """Whether the probe needs to know when the optimizer steps."""
    return probe.watches_updates() or probe.needs_loss_coefficients
