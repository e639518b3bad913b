"""`DrGRPOTrainer`: TRL's `GRPOTrainer` with the Dr-GRPO loss, whole prompt groups, and events for probes.

Every override calls `super()`, and was written against trl 1.16 and transformers 5.23.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig
from trl.trainer.utils import get_config_model_id

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.control import TokenControl, TokenExchange
from trl_entropy.control.token_exchange import TokenParts
from trl_entropy.evaluation.during_training import EvaluateCheckpoints
from trl_entropy.models import warm_start
from trl_entropy.models.loading import EMBEDDED_MODELS
from trl_entropy.rollouts.batch import GenerationBatch, TrainingBatch, loss_mask_of
from trl_entropy.rollouts.generation import answer_end, last_turn, turn_ended_at
from trl_entropy.rollouts.groups import group_max_lengths
from trl_entropy.runs.console import ConsoleProgress, printing_plain_text, use_progress_bar
from trl_entropy.runs.evaluated import best_step
from trl_entropy.runs.evaluations import evaluation_of
from trl_entropy.runs.state import StateOwner
from trl_entropy.runs.step_files import evaluation_apart, keep_completions
from trl_entropy.tasks.r1_template import ANSWER_CLOSE, THINK_CLOSE
from trl_entropy.tasks.rewards import completion_text
from trl_entropy.trainer import model_card
from trl_entropy.trainer.agent_checks import check_agents
from trl_entropy.trainer.callbacks import StopOnSignal
from trl_entropy.trainer.completion_values import CompletionValues
from trl_entropy.trainer.metric_functions import MetricFunction, MetricFunctions, MetricsOfProbe
from trl_entropy.trainer.probed import ProbedTrainer
from trl_entropy.trainer.prompt_selection import PromptSelectingTrainer
from trl_entropy.trainer.training_state import own_logs


class DrGRPOTrainer(ProbedTrainer, PromptSelectingTrainer):
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
    _data_is_checked = False

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
        self._check_data(args, positional, callbacks or (), kwargs)
        self._stop_on_signal, self._given_metrics = StopOnSignal(), metric_funcs
        own: list[Any] = [MetricsOfProbe(metric_funcs)] if metric_funcs else []
        if args.evaluate_checkpoints != "none":
            own.append(self._checkpoint_evaluation(args))
        if isinstance(model, str) and model in EMBEDDED_MODELS:
            model = str(warm_start.warm_start(seed=args.seed, name=model))
        super().__init__(model, reward_funcs, args, *positional, callbacks=[*own, *(callbacks or [])], **kwargs)
        use_progress_bar(self, callbacks or ())
        self._token_control = None
        if args.token_control != "none":
            self._token_control = TokenControl(
                args, self.accelerator, self._score_as_trl, self._score_with_entropy_as_trl, self._token_parts
            )
        # The micro-batch whose loss is being computed, if `token_control` chooses its tokens there.
        self._controlled: TrainingBatch | None = None

    def _check_data(self, args: Any, positional: Sequence[Any], callbacks: Iterable[object], given: Mapping) -> None:
        if self._data_is_checked:  # before the warm start of an embedded model
            return
        super()._check_data(args, positional, callbacks, given)
        environment = given.get("environment_factory")
        has_episodes = bool(given.get("tools") or given.get("rollout_func"))
        check_agents(args, environment_factory=environment, has_episodes=has_episodes, callbacks=callbacks)
        self._data_is_checked = True

    def _first_callbacks(self) -> list[TrainerCallback]:
        return [*super()._first_callbacks(), self._stop_on_signal]

    def _new_completion_values(self) -> CompletionValues:
        self._metric_functions = MetricFunctions(self, self._given_metrics)
        self.metric_funcs = self._metric_functions.functions
        return CompletionValues(self.reward_func_names, [function.short for function in self.metric_funcs])

    # ---- what a step logs

    def _goes_on_later(self) -> bool:
        return self._stop_on_signal.received

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        training, run, step = self.model.training, Path(self.args.output_dir), self.state.global_step
        name = "" if training else evaluation_of(logs)[1]
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        return PromptSelectingTrainer.train(self, *args, **kwargs)  # it calls `begin_training` itself, in its time

    train.__doc__ = PromptSelectingTrainer.train.__doc__

    def begin_training(self) -> None:
        PromptSelectingTrainer.begin_training(self)
        ProbedTrainer.begin_training(self)
        self._controlled = None

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

    # ---- rollouts

    def _change_batch(self, batch: TrainingBatch) -> None:
        num_rows, training = len(batch["advantages"]), self.model.training
        if self.args.length_normalizer == "group_max":
            num_generations = self.num_generations if training else self.num_generations_eval
            lengths = self.accelerator.gather(loss_mask_of(batch).sum(dim=1))
            longest = group_max_lengths(lengths, num_generations)[self._local_rows(num_rows)]
            batch["length_scale"] = self.max_completion_length / longest
            batch["advantages"] = batch["advantages"] * batch["length_scale"]
        if training and self._token_control is not None and self.args.token_control_scope == "optimizer_batch":
            metrics = self._token_control.change_optimizer_batch(batch, self.current_step)
            self.record_metrics(metrics)
            self._token_control.warn_of_no_token(metrics, self.current_step)

    def _as_drawn(self, batch: TrainingBatch) -> TrainingBatch:
        first = self.first_round
        return batch if first is None else self._with_groups(first.batch, first.rewards)

    def _scored_generation(self, inputs: list[dict[str, Any]]) -> GenerationBatch:
        return self._with_values(super()._scored_generation(inputs))

    def _measure(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> dict[str, list[float]]:
        self._record_think_length(completions)
        rows = [{**row, "prompt": prompt} for row, prompt in zip(inputs, prompts, strict=True)]
        return self._metric_functions.measure(rows, completions, ids, self.completion_values.metric_names)

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
        if kwargs.get("compute_entropy") and self._controlled is not None:  # the loss reads the advantages after this
            self._control_micro_batch(self._controlled, output[0].detach(), output[1].detach())
        return output

    def _control_micro_batch(
        self, inputs: TrainingBatch, per_token_logps: Float[Tensor, "B T"], token_entropy: Float[Tensor, "B T"]
    ) -> None:
        assert self._token_control is not None
        step, number = self.current_step, self.probe_runner.num_micro_batches
        chosen = self._token_control.change_micro_batch(inputs, per_token_logps, step, number, token_entropy)
        self._statistics.add_chosen(*chosen)

    def _inputs_of_loss(self, inputs: TrainingBatch) -> TrainingBatch:
        if self.args.controls_tokens_of("micro_batch"):
            inputs = self._controlled = inputs.copy()  # a copy, as TRL uses its batch again in the next iteration
        return inputs

    def _with_penalty(self, loss: Tensor, inputs: TrainingBatch) -> Tensor:
        self._controlled = None
        if self._token_control is not None and self.args.token_control == "kl_cov":
            num_micro_batches = self.current_gradient_accumulation_steps
            loss = loss + self._token_control.penalty(inputs, self._scored[0], num_micro_batches)
        return loss

    def _log_statistics(self, metrics: dict[str, float]) -> None:
        super()._log_statistics(metrics)
        if self._token_control is not None:
            self._token_control.warn_of_no_token(metrics, self.current_step)

    def _score_as_trl(self, batch: TrainingBatch) -> Float[Tensor, "B T"]:
        """Log-probabilities of a batch's completions under the policy, as TRL scores them, nats; without dropout."""
        return self._score_without_dropout(self.model, batch, self.args.per_device_train_batch_size)

    def _token_parts(self, batch: TrainingBatch) -> TokenParts | None:
        """What each token of a new generation costs and earns, by `token_control: exchange`. Collective."""
        exchange, engine = self.probe_runner.named_probes()[TokenExchange.state_name], self.probe_runner.engine
        assert isinstance(exchange, TokenExchange) and engine is not None
        with self.probe_runner.timed(exchange.name):
            return exchange.parts(batch, self.args, engine)

    def _score_with_entropy_as_trl(self, batch: TrainingBatch) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """The same with the entropies of the distributions that the tokens were drawn from, nats."""
        rows = self.args.per_device_train_batch_size
        logps, entropy = self._scores_without_dropout(self.model, batch, rows, compute_entropy=True)
        assert entropy is not None
        return logps, entropy
