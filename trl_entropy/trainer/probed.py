"""
`ProbedTrainer`: the events of the probes, and a run directory, for any trainer that derives from TRL's `GRPOTrainer`
or `RLOOTrainer`.

Every override calls `super()`, and was written against trl 1.16 and transformers 5.23.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.control import controls
from trl_entropy.engine import rank_symmetric, snapshot_parameters, swapped_parameters
from trl_entropy.engine.fsdp2_on_cpu import shard_on_cpu_if_asked
from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.probes import PROBES
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.model_checks import dropout_of
from trl_entropy.probes.runner import ProbeRunner, ScoredMicroBatch
from trl_entropy.probes.step_statistics import StepStatistics
from trl_entropy.rollouts.batch import VALUE, GenerationBatch, TrainingBatch, loss_mask_of
from trl_entropy.rollouts.drawing import prompt_key
from trl_entropy.rollouts.groups import group_numbers, whole_group_shuffling
from trl_entropy.rollouts.pixel_inputs import keywords_of_batch
from trl_entropy.runs import tensorboard, trackers
from trl_entropy.runs.checkpoints import step_of
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.evaluations import evaluation_of
from trl_entropy.runs.set_aside import set_aside_after
from trl_entropy.trainer.bases import check_base, loss_of, own_tokens_of, weighted_rewards, with_old_logps
from trl_entropy.trainer.callbacks import RunLogCallback
from trl_entropy.trainer.colocated_vllm import built_for_training
from trl_entropy.trainer.completion_values import CompletionValues, have_ended
from trl_entropy.trainer.dataset_checks import check_given
from trl_entropy.trainer.probe_batches import ProbeBatches
from trl_entropy.trainer.step_log import StepLog, end_evaluation
from trl_entropy.trainer.step_prompts import StepPrompts, most_generations

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object


class ProbedTrainer(_Trainer):
    """
    Probes for another trainer of TRL, before which it is put:

        class ProbedRLOOTrainer(ProbedTrainer, RLOOTrainer): ...

    Its `args` are a `ProbedConfig` before the trainer's own. Probes are turned on by toggles of
    it, or passed as instances in `callbacks`. Steps are logged as `DrGRPOTrainer` logs them, in `metrics.jsonl` too.

    With all toggles off, training differs from TRL's in one point: completions are shuffled by whole prompt groups.
    With that shuffle in TRL too, the two are equal bit for bit. Checkpoints are TRL's: what probes add up over a run
    begins anew when it is resumed, as a warning says. Only `DrGRPOTrainer` resumes exactly, and can control a step.

    A trainer with a loss that is not known here keeps the probes that hold for any loss; the others refuse it.
    """

    tools: Any = ()
    rollout_func: Any = None
    environments: Any = None

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *positional: Any,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        **kwargs: Any,
    ) -> None:
        check_base(type(self))
        if not isinstance(args, ProbeChecks):
            raise TypeError(
                f"args is a {type(args).__name__}; a ProbedTrainer needs one that has the probes' settings: "
                "ProbedRLOOConfig, ProbedGMPOConfig, or a dataclass of ProbedConfig and the trainer's own."
            )
        self._check_data(args, positional, callbacks or (), kwargs)
        shard_on_cpu_if_asked()
        args.trainer_loss = loss_of(type(self), ProbedTrainer)
        self.run_log, self.probe_runner, self._step_log = RunLogCallback(), ProbeRunner(), StepLog()
        probes = [PROBES[name].from_config(args) for name in args.enabled_probes()]
        own = [*self._first_callbacks(), self.probe_runner, self._step_log, *controls(args), *probes]
        with built_for_training(args):
            super().__init__(model, reward_funcs, args, *positional, callbacks=[*own, *(callbacks or [])], **kwargs)
        tensorboard.log_into(self.callback_handler.callbacks, RunDirectory(args.output_dir).tensorboard_path)
        self.step_prompts = StepPrompts(
            most_generations(args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations)
        )
        self.probe_batches = ProbeBatches(self, self.step_prompts)
        files = ProbeFiles(args, self.accelerator, self._get_learning_rate, self.processing_class)
        self.probe_runner.attach(self, self.probe_batches, files)
        self.probe_runner.check_model()
        self._step_log.attach(self)
        self.completion_values = self._new_completion_values()
        self.completion_values.take_from(self.probe_runner.probes())
        self._statistics = StepStatistics(self.accelerator.device)
        self._rewards: Tensor
        self._scored: tuple[Tensor, Tensor]
        self._old_logps: Tensor | None = None
        self._drawn: TrainingBatch | None = None  # a new generation of which the probes have not been told yet
        self._around_micro_batch: contextlib.ExitStack
        self._has_dropout = bool(dropout_of(self.model))
        # Empty if `kl_every` is 0, or if TRL logs the KL itself.
        self._start_parameters = snapshot_parameters(self.model) if args.kl_every and self.beta == 0 else {}

    def _check_data(self, args: Any, positional: Sequence[Any], callbacks: Iterable[object], given: Mapping) -> None:
        """Refuse datasets that the settings cannot train on, or draw from, before a model is loaded."""
        check_given(args, positional, callbacks, given)

    def _first_callbacks(self) -> list[TrainerCallback]:
        """Those that get events before the probes do."""
        return [self.run_log]

    def _new_completion_values(self) -> CompletionValues:
        return CompletionValues(self.reward_func_names, [])

    # ---- what a step logs

    @property
    def current_step(self) -> int:
        """The present optimizer step, 1, 2, ...: the update from theta_(step - 1) to theta_step."""
        return self.state.global_step + 1

    def record_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """
        Log scalars with all of the trainer's loggers. Call with equal values on all ranks.

        Args:
            step: the step that they describe, if not the present one: of an earlier step they are added to its line in
                `metrics.jsonl` and to the trackers.
        """
        if step is not None and step < self.current_step:
            if self.is_world_process_zero():
                self.run_log.add_later(step, metrics)
                tensorboard.add_later(self.callback_handler.callbacks, step, metrics)
                trackers.add_later(self.callback_handler.callbacks, self, step, metrics)
            return
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        row = self._step_log.end_step(grad_norm, kwargs.get("learning_rate"))
        if row is not None:
            self.run_log.step_done(self.state, row, is_logged=self.control.should_log)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        # transformers calls this once more at the end of an epoch; after the last one nothing is saved any more.
        if self.control.should_training_stop and self.probe_runner.epoch_has_ended and not self._goes_on_later():
            self.probe_runner.no_more_rollouts()

    def _goes_on_later(self) -> bool:
        """Whether training ends now only to be resumed."""
        return False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        training = self.model.training
        self.run_log.values = self._step_log.end_line() if training else end_evaluation(self, evaluation_of(logs)[1])
        trackers.show_numbers_only(self.callback_handler.callbacks)
        super().log(logs, start_time)

    # ---- training

    def begin_training(self) -> None:
        """Called when `train()` begins: forget what an exception has left half done."""
        self._statistics = StepStatistics(self.accelerator.device)
        self._has_dropout = bool(dropout_of(self.model))
        self._drawn = None
        self.step_prompts.reset()
        self._step_log.reset()
        self.probe_runner.reset()
        self.completion_values.take_from(self.probe_runner.probes())  # one may have been added since

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As the trainer's own.

        Args:
            resume_from_checkpoint: path of a checkpoint, or `"latest"` or True for the newest one of `output_dir`.

        Raises:
            ValueError: if `output_dir` holds a run already, which is not resumed.
        """
        named = [type(probe).__name__ for probe in self.probe_runner.named_probes().values()]
        if resume_from_checkpoint and named and self.is_world_process_zero():
            logger.warning(
                "resume_from_checkpoint=%s: checkpoints of a ProbedTrainer have nothing of probes, so that what %s "
                "add up over the run begins anew",
                resume_from_checkpoint,
                ", ".join(named),
            )
        if resume_from_checkpoint in ("latest", True):
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        self._prepare_directory(resume_from_checkpoint)
        self.begin_training()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_directory(self, resume_from: str | bool | None) -> None:
        """Refuse a directory that has a run which is not resumed; set aside what it has after the checkpoint."""
        run = RunDirectory(self.args.output_dir)
        with rank_symmetric(self.accelerator, "reading the run directory"):
            if self.is_world_process_zero():
                if not resume_from:
                    run.check_unused()
                elif isinstance(resume_from, str):
                    set_aside_after(run, step_of(Path(resume_from)))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with contextlib.ExitStack() as self._around_micro_batch:
            loss = super().training_step(*args, **kwargs)
        self._step_log.add_loss(loss)
        if self.accelerator.sync_gradients:
            self.probe_runner.gradients_ready()
        return loss

    # ---- rollouts

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with whole_group_shuffling():
            inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self.probe_runner.num_micro_batches == 0:
            self._tell_of_rollouts()
        return inputs

    def _tell_of_rollouts(self) -> None:
        """Tell the probes which completions are known at the beginning of a step."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            self.probe_runner.rollouts_drawn([drawn], by_present_policy=True)
        else:  # the step uses a part of an earlier generation
            first = self._step % self.args.steps_per_generation
            batches = self._buffered_inputs[first : first + self.current_gradient_accumulation_steps]
            self.probe_runner.rollouts_drawn(batches, by_present_policy=False)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> TrainingBatch:
        self._old_logps = None
        generated = with_old_logps(self, super()._generate_and_score_completions(inputs), self._old_logps)
        batch = self._with_groups(self._with_values(generated), self._rewards)
        self._change_batch(batch)
        if self.model.training:
            self._drawn = self._as_drawn(batch)
            num_groups = len(inputs) * self.accelerator.num_processes // self.num_generations
            self.step_prompts.add(map(prompt_key, self._logs["prompt"]), num_groups)  # all ranks' prompts
        return batch

    def _change_batch(self, batch: TrainingBatch) -> None:
        """Called with a new generation, whose advantages a subclass may change."""

    def _as_drawn(self, batch: TrainingBatch) -> TrainingBatch:
        """What the policy has drawn, of which a subclass may have replaced a part in `batch`."""
        return batch

    def _with_values(self, batch: GenerationBatch) -> GenerationBatch:
        """The batch with what probes measure the change of, unless it has that by now."""
        keys = self.completion_values.keys
        if not self.model.training or not keys or VALUE + keys[0] in batch:
            return batch
        values = self.completion_values.columns(loss_mask_of(batch).sum(dim=1))
        return cast(GenerationBatch, batch | {VALUE + key: column for key, column in values.items()})

    def _with_groups(self, batch: GenerationBatch, rewards: Tensor) -> TrainingBatch:
        """TRL's batch with the prompt groups, rewards and advantages of its rows; `rewards` are those of all ranks."""
        num_rows, rank = len(batch["advantages"]), self.accelerator.process_index
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        numbers = group_numbers(num_rows, num_generations, rank, self.accelerator.device)
        added = {
            "prompt_index": self.step_prompts.num_groups + numbers,
            "rewards": rewards[self._local_rows(num_rows)],
            "raw_advantages": batch["advantages"],
            "length_scale": torch.ones_like(batch["advantages"]),
        }
        return cast(TrainingBatch, batch | added)

    def _local_rows(self, num_rows: int) -> slice:
        """This process's rows of a tensor with those of all."""
        rank = self.accelerator.process_index
        return slice(rank * num_rows, (rank + 1) * num_rows)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = weighted_rewards(rewards_per_func, self.reward_weights)
        measured = self._measure(inputs, prompts, completions, completion_ids_list)
        local = self._local_rows(len(prompts))
        self.completion_values.note_scores(self._rewards[local], rewards_per_func[local], measured)
        return rewards_per_func

    def _measure(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> dict[str, list[float]]:
        """Further numbers of this process's completions, by name."""
        return {}

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        self.completion_values.note_ends(have_ended(self, output[1], own_tokens_of(self, output)))
        return output

    # ---- loss

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if kwargs.get("compute_entropy"):  # only the loss asks for the entropy
            self._scored = output[0], output[1]
        elif self._old_logps is None and not isinstance(self, GRPOTrainer):
            self._old_logps = output[0]  # RLOO's first pass over a generation is that of the policy that drew it
        return output

    def _compute_loss(self, model: nn.Module, inputs: TrainingBatch) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        # Before the loss: scoring swaps the model's parameters, and the loss needs the policy's for its backward pass.
        logps_for_kl = self._score_for_kl(inputs) if self._wants_kl() else None
        inputs = self._inputs_of_loss(inputs)
        if self.probe_runner.wants_step():
            self._around_micro_batch.enter_context(self.probe_runner.around_micro_batch(inputs))
        loss = self._with_penalty(super()._compute_loss(model, inputs), inputs)
        self._observe(inputs, logps_for_kl)
        return loss

    def _inputs_of_loss(self, inputs: TrainingBatch) -> TrainingBatch:
        """A micro-batch as the loss is to get it; a subclass may change a copy."""
        return inputs

    def _with_penalty(self, loss: Tensor, inputs: TrainingBatch) -> Tensor:
        """The loss of a micro-batch; a subclass may add to it."""
        return loss

    def _observe(self, inputs: TrainingBatch, logps_for_kl: tuple[Tensor | None, Tensor] | None) -> None:
        """Add what the loss has computed to the step's sums and tell the probes; log after the last micro-batch."""
        loss_logps, loss_entropy = self._scored
        del self._scored  # so that the autograd graph lives no longer than the loss
        per_token_logps, mask = loss_logps.detach(), loss_mask_of(inputs)
        old_logps = inputs.get("old_per_token_logps")
        log_ratio = None if old_logps is None else per_token_logps - old_logps
        self._statistics.add_tokens(per_token_logps, loss_entropy.detach(), log_ratio, mask)
        if "tool_mask" in inputs:
            self._statistics.add_turns(loss_entropy.detach(), mask)
        if logps_for_kl is not None:
            policy_logps, start_logps = logps_for_kl
            self._statistics.add_kl(per_token_logps if policy_logps is None else policy_logps, start_logps, mask)
        self.probe_runner.micro_batch_done(inputs, ScoredMicroBatch(loss_logps, loss_entropy, log_ratio, mask))
        if self.accelerator.sync_gradients:
            self._log_statistics(self._statistics.reduce(self.accelerator))
            self._statistics = StepStatistics(self.accelerator.device)
            self.probe_runner.rollouts_complete()

    def _log_statistics(self, metrics: dict[str, float]) -> None:
        self.record_metrics(metrics)

    def _wants_kl(self) -> bool:
        return bool(self._start_parameters) and self.current_step % self.args.kl_every == 0

    def _score_for_kl(self, inputs: TrainingBatch) -> tuple[Float[Tensor, "B T"] | None, Float[Tensor, "B T"]]:
        """
        Log-probabilities under the policy, and under the parameters that training started from, nats. The former are
        None where there is no dropout: they are those of the loss.
        """
        model = self.accelerator.unwrap_model(self.model)
        policy = self._score_without_dropout(model, inputs) if self._has_dropout else None
        with swapped_parameters(model, self._start_parameters):
            return policy, self._score_without_dropout(model, inputs)

    def _score_without_dropout(
        self, model: nn.Module, batch: TrainingBatch, batch_size: int | None = None
    ) -> Float[Tensor, "B T"]:
        """Log-probabilities of a batch's completions as TRL scores them, but in evaluation mode, nats."""
        return self._scores_without_dropout(model, batch, batch_size)[0]

    @torch.no_grad()
    def _scores_without_dropout(
        self, model: nn.Module, batch: TrainingBatch, batch_size: int | None = None, compute_entropy: bool = False
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
        """The same and, if they are asked for, the entropies of the tokens' distributions, nats."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with (
            evaluation_mode(model),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            more = keywords_of_batch(batch) | ({"compute_entropy": True} if compute_entropy else {})
            logps, entropy, *_ = self._get_per_token_logps_and_entropies(
                model, ids, mask, batch["completion_ids"].shape[1], batch_size, **more
            )
        if compute_entropy:
            del self._scored  # this was no loss
        return logps, entropy
