"""`DrGRPOTrainer`: TRL's `GRPOTrainer` with the Dr-GRPO loss, whole prompt groups, and events for probes.

Every override calls `super()`, and was written against trl 1.16 and transformers 5.23.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOConfig
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.control import TokenControl, controls
from trl_entropy.engine import snapshot_parameters, swapped_parameters
from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.evaluation.during_training import EvaluateCheckpoints
from trl_entropy.models import warm_start
from trl_entropy.models.loading import EMBEDDED_MODELS
from trl_entropy.probes import PROBES
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.model_checks import dropout_of
from trl_entropy.probes.runner import ProbeRunner, ScoredMicroBatch
from trl_entropy.probes.step_statistics import StepStatistics
from trl_entropy.rollouts.batch import VALUE, GenerationBatch, TrainingBatch, loss_mask_of
from trl_entropy.rollouts.drawing import prompt_key
from trl_entropy.rollouts.generation import answer_end, last_turn, turn_ended_at
from trl_entropy.rollouts.groups import group_max_lengths, group_numbers, whole_group_shuffling
from trl_entropy.rollouts.pixel_inputs import keywords_of_batch
from trl_entropy.runs import tensorboard, trackers
from trl_entropy.runs.console import ConsoleProgress, printing_plain_text, use_progress_bar
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.evaluated import best_step
from trl_entropy.runs.evaluations import evaluation_of
from trl_entropy.runs.state import StateOwner
from trl_entropy.runs.step_files import evaluation_apart, keep_completions
from trl_entropy.tasks.r1_template import ANSWER_CLOSE, THINK_CLOSE
from trl_entropy.tasks.rewards import completion_text
from trl_entropy.trainer import model_card
from trl_entropy.trainer.agent_checks import check_agents
from trl_entropy.trainer.callbacks import RunLogCallback, StopOnSignal
from trl_entropy.trainer.completion_values import CompletionValues, have_ended
from trl_entropy.trainer.dataset_checks import check_datasets
from trl_entropy.trainer.metric_functions import MetricFunction, MetricFunctions, MetricsOfProbe
from trl_entropy.trainer.probe_batches import ProbeBatches
from trl_entropy.trainer.prompt_selection import PromptSelectingTrainer
from trl_entropy.trainer.step_log import StepLog, end_evaluation
from trl_entropy.trainer.step_prompts import StepPrompts, most_generations
from trl_entropy.trainer.training_state import own_logs


class DrGRPOTrainer(PromptSelectingTrainer):
    """
    [`~trl.GRPOTrainer`] with the Dr-GRPO loss (T1), (T2), probes, and a run directory.

    Takes the arguments of `GRPOTrainer`, with a [`DrGRPOConfig`] as `args`; `model="embedded"` is the embedded model
    after its warm start, which is made at the first use; `"embedded-agent"` has learned to call a calculator.
    Probes are turned on by toggles of the config, or passed as instances of [`~trl_entropy.Probe`] in `callbacks`.
    `metric_funcs` are called as reward functions are; what they return is logged, and nothing is trained on it.

    With all toggles off, training differs from TRL's in one point: completions are shuffled by whole prompt groups.
    With that shuffle in TRL too, the two are equal; TRL's own, of single rows, draws other random numbers. Only
    `length_normalizer` and `stop_at_answer` change more.
    """

    _name = "DrGRPO"
    _paper = model_card.PAPER

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None = None,
        metric_funcs: Sequence[MetricFunction] = (),
        **kwargs: Any,
    ) -> None:
        if args is not None and not isinstance(args, DrGRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; DrGRPOTrainer needs a DrGRPOConfig.")
        args = args or DrGRPOConfig(output_dir="DrGRPO")
        data = dict(zip(("train_dataset", "eval_dataset"), positional, strict=False)) | kwargs
        has_episodes = bool(data.get("tools") or data.get("rollout_func"))
        check_datasets(
            args,
            data.get("train_dataset"),
            data.get("eval_dataset"),
            prompts_from_environment=data.get("environment_factory") is not None,
            has_episodes=has_episodes,
            callbacks=callbacks or (),
        )
        environment = kwargs.get("environment_factory")
        check_agents(args, environment_factory=environment, has_episodes=has_episodes, callbacks=callbacks or ())
        self.run_log, self.probe_runner, self._step_log = RunLogCallback(), ProbeRunner(), StepLog()
        self._stop_on_signal = StopOnSignal()
        own = [self.run_log, self._stop_on_signal, self.probe_runner, self._step_log, *_toggled(args)]
        own += [MetricsOfProbe(metric_funcs)] if metric_funcs else []
        if args.evaluate_checkpoints != "none":
            own.append(self._checkpoint_evaluation(args))
        if isinstance(model, str) and model in EMBEDDED_MODELS:
            model = str(warm_start.warm_start(seed=args.seed, name=model))
        super().__init__(model, reward_funcs, args, *positional, callbacks=[*own, *(callbacks or [])], **kwargs)
        use_progress_bar(self, callbacks or ())
        tensorboard.log_into(self.callback_handler.callbacks, RunDirectory(args.output_dir).tensorboard_path)
        self.step_prompts = StepPrompts(
            most_generations(args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations)
        )
        self._metric_functions = MetricFunctions(self, metric_funcs)
        self.metric_funcs = self._metric_functions.functions
        self.probe_batches = ProbeBatches(self, self.step_prompts)
        files = ProbeFiles(args, self.accelerator, self._get_learning_rate, self.processing_class)
        self.probe_runner.attach(self, self.probe_batches, files)
        self.probe_runner.check_model()
        self._step_log.attach(self)
        metric_names = [function.short for function in self._metric_functions.functions]
        self.completion_values = CompletionValues(self.reward_func_names, metric_names)
        self.completion_values.take_from(self.probe_runner.probes())
        self._token_control = None
        if args.token_control != "none":
            self._token_control = TokenControl(args, self.accelerator, self._score_as_trl)
        self._statistics = StepStatistics(self.accelerator.device)
        self._scored: tuple[Tensor, Tensor]
        # The micro-batch whose loss is being computed, if `token_control` chooses its tokens there.
        self._controlled: TrainingBatch | None = None
        self._drawn: TrainingBatch | None = None  # a new generation of which the probes have not been told yet
        self._around_micro_batch: contextlib.ExitStack
        self._has_dropout = bool(dropout_of(self.model))
        # Empty if `kl_every` is 0, or if TRL logs the KL itself.
        self._start_parameters = snapshot_parameters(self.model) if args.kl_every and self.beta == 0 else {}

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
        ends = self.control.should_training_stop and self.probe_runner.epoch_has_ended
        if ends and not self._stop_on_signal.received:
            self.probe_runner.no_more_rollouts()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        training, run, step = self.model.training, Path(self.args.output_dir), self.state.global_step
        name = "" if training else evaluation_of(logs)[1]
        values = self._step_log.end_line() if training else end_evaluation(self, name)
        self.run_log.values = values
        trackers.show_numbers_only(self.callback_handler.callbacks)
        writes = self.log_completions and self.is_world_process_zero()
        with contextlib.ExitStack() as around:
            around.enter_context(printing_plain_text())
            if writes and not training:
                around.enter_context(evaluation_apart(run, step, name))
            super().log(logs, start_time)
        if writes:
            keep_completions(
                run, step, self.args.completions_files_keep, "completions" if training else "evaluation", name
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with own_logs(self):
            return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            model_card.correct(Path(self.args.output_dir) / "README.md", get_config_model_id(self.model.config))

    # ---- training and resuming

    def begin_training(self) -> None:
        super().begin_training()
        self._statistics = StepStatistics(self.accelerator.device)
        self._has_dropout = bool(dropout_of(self.model))
        self._controlled = self._drawn = None
        self.step_prompts.reset()
        self._step_log.reset()
        self.probe_runner.reset()
        self.completion_values.take_from(self.probe_runner.probes())  # one may have been added since

    def end_training(self) -> None:
        super().end_training()
        self._stop_on_signal.give_back()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EvaluateCheckpoints | ConsoleProgress):
                callback.end()

    def checkpoints_in_use(self) -> set[int]:
        waiting = {step for callback in self._checkpoint_evaluations() for step in callback.steps_left()}
        best = best_step(Path(self.args.output_dir), self.args.keep_best) if self.args.keep_best else None
        return waiting | ({best} if best is not None else set())

    def _checkpoint_evaluation(self, args: DrGRPOConfig) -> EvaluateCheckpoints:
        return EvaluateCheckpoints(
            args.evaluate_checkpoints, args.evaluate_profile, lambda: self._stop_on_signal.received
        )

    def _checkpoint_evaluations(self) -> list[EvaluateCheckpoints]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EvaluateCheckpoints)]

    def state_owners(self) -> dict[str, StateOwner]:
        owners = super().state_owners()
        return owners | {
            "step_prompts": self.step_prompts,
            "step_log": self._step_log,
            "probes": self.probe_runner,
        }

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
        batch = self._with_groups(super()._generate_and_score_completions(inputs), self._rewards)
        num_rows, training = len(inputs), self.model.training
        num_generations = self.num_generations if training else self.num_generations_eval
        local = self._local_rows(num_rows)
        if self.args.length_normalizer == "group_max":
            lengths = self.accelerator.gather(loss_mask_of(batch).sum(dim=1))
            batch["length_scale"] = self.max_completion_length / group_max_lengths(lengths, num_generations)[local]
            batch["advantages"] = batch["advantages"] * batch["length_scale"]
        if training:
            if self._token_control is not None and self.args.token_control_scope == "optimizer_batch":
                metrics = self._token_control.change_optimizer_batch(batch, self.current_step)
                self.record_metrics(metrics)
                self._token_control.warn_of_no_token(metrics, self.current_step)
            first = self.first_round
            self._drawn = batch if first is None else self._with_groups(first.batch, first.rewards)
            num_groups = num_rows * self.accelerator.num_processes // num_generations
            self.step_prompts.add(map(prompt_key, self._logs["prompt"]), num_groups)  # all ranks' prompts
        return batch

    def _scored_generation(self, inputs: list[dict[str, Any]]) -> GenerationBatch:
        batch = super()._scored_generation(inputs)
        if not self.model.training:
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
        self._record_think_length(completions)
        rows = [{**row, "prompt": prompt} for row, prompt in zip(inputs, prompts, strict=True)]
        values, local = self.completion_values, self._local_rows(len(prompts))
        measured = self._metric_functions.measure(rows, completions, completion_ids_list, values.metric_names)
        values.note_scores(self._rewards[local], rewards_per_func[local], measured)
        return rewards_per_func

    def _record_think_length(self, completions: list[Any]) -> None:
        """Mean number of tokens before the closing think tag, over the completions that have one."""
        texts = list(map(completion_text, completions))
        thoughts = [text.split(THINK_CLOSE, 1)[0] for text in texts if THINK_CLOSE in text]
        lengths = [len(ids) for ids in self._tokenizer(thoughts)["input_ids"]] if thoughts else []
        sums = torch.tensor([sum(lengths), len(lengths)], dtype=torch.float64, device=self.accelerator.device)
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if count:
            self.record_metrics({"completions/think_length": total / count})

    # ---- completions that stop at the answer

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draw = functools.partial(super()._generate_single_turn, prompt_ids, *args, **kwargs)
        return turn_ended_at(self, ANSWER_CLOSE, draw) if self.args.stop_at_answer else draw()

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        self.completion_values.note_ends(have_ended(self, *output[1:3]))
        if self.args.stop_at_answer:
            self._correct_terminated(*output[1:3])
        return output

    def _correct_terminated(self, completion_ids: list[list[int]], own_tokens: list[list[int]] | None) -> None:
        """
        Correct TRL's metrics, which count completions that stop at their answer as clipped.

        Args:
            own_tokens: 1 for each token that the policy drew, 0 for those of tools and environments; None: it drew
                all.
        """
        own_tokens = own_tokens or [[1] * len(ids) for ids in completion_ids]
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        ended = torch.tensor([ids[-1] in ends for ids in completion_ids], device=self.accelerator.device)
        lengths = torch.tensor([sum(own) for own in own_tokens], device=self.accelerator.device)
        turns = [last_turn(ids, own) for ids, own in zip(completion_ids, own_tokens, strict=True)]
        closed = [answer_end(self._tokenizer, turn, ANSWER_CLOSE) is not None for turn in turns]
        answered = self.accelerator.gather(torch.tensor(closed, device=self.accelerator.device))
        terminated = self.accelerator.gather(ended) | answered
        lengths = self.accelerator.gather(lengths)[terminated].float()
        lengths = lengths if len(lengths) else torch.zeros(1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["completions/clipped_ratio"][-1] = 1 - terminated.float().mean().item()
        metrics["completions/mean_terminated_length"][-1] = lengths.mean().item()
        metrics["completions/min_terminated_length"][-1] = lengths.min().item()
        metrics["completions/max_terminated_length"][-1] = lengths.max().item()
        self.record_metrics({"completions/answered": answered.float().mean().item()})

    # ---- loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if kwargs.get("compute_entropy"):  # only the loss asks for the entropy
            self._scored = output[0], output[1]
            if self._controlled is not None:  # the loss reads the advantages after this
                self._control_micro_batch(self._controlled, output[0].detach())
        return output

    def _control_micro_batch(self, inputs: TrainingBatch, per_token_logps: Float[Tensor, "B T"]) -> None:
        assert self._token_control is not None
        number = self.probe_runner.num_micro_batches
        chosen = self._token_control.change_micro_batch(inputs, per_token_logps, self.current_step, number)
        self._statistics.add_chosen(*chosen)

    def _compute_loss(self, model: nn.Module, inputs: TrainingBatch) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        # Before the loss: scoring swaps the model's parameters, and the loss needs the policy's for its backward pass.
        logps_for_kl = self._score_for_kl(inputs) if self._wants_kl() else None
        if self.args.controls_tokens_of("micro_batch"):
            inputs = self._controlled = inputs.copy()  # a copy, as TRL uses its batch again in the next iteration
        if self.probe_runner.wants_step():
            self._around_micro_batch.enter_context(self.probe_runner.around_micro_batch(inputs))
        loss = super()._compute_loss(model, inputs)
        self._controlled = None
        if self._token_control is not None and self.args.token_control == "kl_cov":
            num_micro_batches = self.current_gradient_accumulation_steps
            loss = loss + self._token_control.penalty(inputs, self._scored[0], num_micro_batches)
        self._observe(inputs, logps_for_kl)
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
            metrics = self._statistics.reduce(self.accelerator)
            self.record_metrics(metrics)
            if self._token_control is not None:
                self._token_control.warn_of_no_token(metrics, self.current_step)
            self._statistics = StepStatistics(self.accelerator.device)
            self.probe_runner.rollouts_complete()

    def _wants_kl(self) -> bool:
        return bool(self._start_parameters) and self.current_step % self.args.kl_every == 0

    def _score_as_trl(self, batch: TrainingBatch) -> Float[Tensor, "B T"]:
        """Log-probabilities of a batch's completions under the policy, as TRL scores them, nats; without dropout."""
        return self._score_without_dropout(self.model, batch, self.args.per_device_train_batch_size)

    def _score_for_kl(self, inputs: TrainingBatch) -> tuple[Float[Tensor, "B T"] | None, Float[Tensor, "B T"]]:
        """
        Log-probabilities under the policy, and under the parameters that training started from, nats. The former are
        None where there is no dropout: they are those of the loss.
        """
        model = self.accelerator.unwrap_model(self.model)
        policy = self._score_without_dropout(model, inputs) if self._has_dropout else None
        with swapped_parameters(model, self._start_parameters):
            return policy, self._score_without_dropout(model, inputs)

    @torch.no_grad()
    def _score_without_dropout(
        self, model: nn.Module, batch: TrainingBatch, batch_size: int | None = None
    ) -> Float[Tensor, "B T"]:
        """Log-probabilities of a batch's completions as TRL scores them, but in evaluation mode, nats."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with (
            evaluation_mode(model),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return self._get_per_token_logps_and_entropies(
                model, ids, mask, batch["completion_ids"].shape[1], batch_size, **keywords_of_batch(batch)
            )[0]


def _toggled(args: DrGRPOConfig) -> list[TrainerCallback]:
    """Controls and probes that the config turns on, in the order in which they get events."""
    found: list[TrainerCallback] = [*controls(args)]
    found += [PROBES[name].from_config(args) for name in args.enabled_probes()]
    return found
