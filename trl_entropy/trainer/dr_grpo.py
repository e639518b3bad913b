"""`DrGRPOTrainer`: TRL's `GRPOTrainer` with the Dr-GRPO loss, whole prompt groups, and events for probes.

Overrides only: every one calls `super()`, and was written against trl 1.16 and transformers 5.23.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig
from trl.models.utils import disable_gradient_checkpointing

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.control import control_micro_batch, control_tokens, controls, penalty, warn_of_no_token
from trl_entropy.engine import Engine, UpdateContext, build_engine, snapshot_parameters, swapped_parameters
from trl_entropy.evaluation.during_training import EvaluateCheckpoints
from trl_entropy.probes import PROBES, Probe
from trl_entropy.probes.step_statistics import StepStatistics
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.drawing import draw_prompts, own_randomness, pack_completions, prompt_key
from trl_entropy.rollouts.generation import answer_end, generating_with_the_model, stopping_at
from trl_entropy.rollouts.groups import group_max_lengths, group_numbers, whole_group_shuffling
from trl_entropy.runs.console import printing_plain_text
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks.r1_template import ANSWER_CLOSE, THINK_CLOSE
from trl_entropy.trainer.callbacks import RunLogCallback, StopOnSignal, UpdateEvents
from trl_entropy.trainer.prompt_selection import PromptSelectingTrainer, check_selection


class DrGRPOTrainer(PromptSelectingTrainer):
    """
    [`~trl.GRPOTrainer`] with the Dr-GRPO loss (T1), (T2), probes, and a run directory.

    Takes what `GRPOTrainer` takes, with [`DrGRPOConfig`] as `args`. Probes come from the toggles of the config, or as
    instances of [`~trl_entropy.Probe`] in `callbacks`.

    Differences in training, toggles off: advantages carry `length_normalizer`; completions are shuffled by whole
    prompt groups; completions may stop at the answer tag. Everything else is TRL's.
    """

    _name = "DrGRPO"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is not None and not isinstance(args, DrGRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; DrGRPOTrainer needs a DrGRPOConfig.")
        args = args or DrGRPOConfig(output_dir="DrGRPO")
        check_selection(args, kwargs.get("train_dataset"))
        toggled: list[TrainerCallback] = [
            *controls(args),
            *(PROBES[name].from_config(args) for name in args.enabled_probes()),
        ]
        if args.evaluate_checkpoints != "none":
            toggled.append(EvaluateCheckpoints(args.evaluate_checkpoints, args.evaluate_profile))
        super().__init__(
            model,
            reward_funcs,
            args,
            *positional,
            callbacks=[RunLogCallback(), StopOnSignal(), UpdateEvents(self), *toggled, *(callbacks or [])],
            **kwargs,
        )
        self.engine: Engine | None = None
        self._probe_seconds: dict[str, float] = defaultdict(float)
        self._rollouts_written = 0
        self._num_groups = 0
        # Prompts of the generations that a step can consist of.
        num_generations_of_step = -(-args.gradient_accumulation_steps // args.steps_per_generation)
        self._step_prompts: deque[set[str]] = deque(maxlen=num_generations_of_step)
        self._micro_batches: list[dict[str, Any]] = []
        self._scored: tuple[Tensor, Tensor]
        # The micro-batch in the loss, where its tokens are chosen there.
        self._controlled: dict[str, Any] | None = None
        self._around_micro_batch: contextlib.ExitStack
        self._statistics = StepStatistics(self.accelerator.device)
        # Empty when the KL is not asked for, or TRL logs it itself.
        self._start_parameters = snapshot_parameters(self.model) if args.kl_every and self.beta == 0 else {}

    # ---- what a step logs

    @property
    def step(self) -> int:
        """The step being made: from theta_(step - 1) to theta_step."""
        return self.state.global_step + 1

    def record(self, metrics: dict[str, Any]) -> None:
        """Log scalars with the current step, through every logger. Call with equal values on all ranks."""
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _probes(self) -> list[Probe]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Probe)]

    def _send(self, event: str, **kwargs: Any) -> None:
        """Call `event` of every probe that wants this step, and log what it puts into `metrics`."""
        for probe in self._probes():
            if probe.wants(self.step):
                metrics: dict[str, Any] = {}
                start = time.perf_counter()
                getattr(probe, event)(
                    self.args,
                    self.state,
                    self.control,
                    metrics=metrics,
                    trainer=self,
                    accelerator=self.accelerator,
                    **kwargs,
                )
                self._probe_seconds[probe.name] += time.perf_counter() - start
                self.record(metrics)

    def named_probes(self) -> dict[str, Probe]:
        """The probes by a name that is the same when the run is resumed."""
        return {f"{number}-{probe.name}": probe for number, probe in enumerate(self._probes())}

    # ---- the update

    def start_engine(self) -> None:
        """Have the update's events sent, if a probe listens to them: only then must the engine be one we can read."""
        if not any(probe.watches_updates() for probe in self._probes()):
            return
        self.engine = build_engine(self.accelerator, self.model_wrapped, self.optimizer, self.args.max_grad_norm)
        self.engine.register(
            wants=lambda: any(probe.watches_updates() and probe.wants(self.step) for probe in self._probes()),
            before_update=lambda update: self._send_update("on_before_update", update),
            after_update=lambda update: self._send_update("on_after_update", update),
        )

    def _send_update(self, event: str, update: UpdateContext) -> None:
        self._send(event, update=update, engine=self.engine, rollouts=self._rollouts)

    def end_step(self) -> None:
        """Log how long each probe took in this step, seconds."""
        self.record({f"time/{name}": seconds for name, seconds in self._probe_seconds.items()})
        self._probe_seconds.clear()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with contextlib.ExitStack() as self._around_micro_batch:
            loss = super().training_step(*args, **kwargs)
        if self.engine is not None and self.accelerator.sync_gradients:
            self.engine.gradients_ready()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        with printing_plain_text():
            super().log(logs, start_time)

    # ---- rollouts

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with whole_group_shuffling():
            return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        num_rows, rank = len(inputs), self.accelerator.process_index
        training = self.model.training
        num_generations = self.num_generations if training else self.num_generations_eval
        local = slice(rank * num_rows, (rank + 1) * num_rows)
        batch["prompt_index"] = self._num_groups + group_numbers(
            num_rows, num_generations, rank, self.accelerator.device
        )
        batch["rewards"] = self._rewards[local]
        batch["raw_advantages"] = batch["advantages"]
        batch["length_scale"] = torch.ones_like(batch["advantages"])
        if self.args.length_normalizer == "group_max":
            lengths = self.accelerator.gather(batch["completion_mask"].sum(dim=1))
            batch["length_scale"] = self.max_completion_length / group_max_lengths(lengths, num_generations)[local]
            batch["advantages"] = batch["advantages"] * batch["length_scale"]
        if training:
            if self.args.controls_tokens_of("optimizer_batch"):
                batch |= control_tokens(self, batch)
            self._step_prompts.append({prompt_key(prompt) for prompt in self._logs["prompt"]})  # those of all ranks
            self._num_groups += num_rows * self.accelerator.num_processes // num_generations
        return batch

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._record_think_length(completions)
        return rewards_per_func

    def _record_think_length(self, completions: list[Any]) -> None:
        """Mean number of tokens before the closing think tag, over the completions that have one."""
        texts = [text if isinstance(text, str) else str(text[-1]["content"]) for text in completions]
        thoughts = [text.split(THINK_CLOSE, 1)[0] for text in texts if THINK_CLOSE in text]
        lengths = [len(ids) for ids in self._tokenizer(thoughts)["input_ids"]] if thoughts else []
        sums = torch.tensor([sum(lengths), len(lengths)], dtype=torch.float64, device=self.accelerator.device)
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if count:
            self.record({"completions/think_length": total / count})

    # ---- what probes need

    def draw_probe_batch(self, num_prompts: int, source: str, step: int, sampler: str = "model") -> Completions:
        """
        This process's share of a probe batch drawn from the policy as it is, one completion a prompt.

        Training is left as it was: random state, order of its prompts, metrics.

        Args:
            num_prompts: over all processes.
            source: `"held_out"`: training prompts that are not among this step's; `"eval"`: `eval_dataset`.
            step: seeds the draw, with the run's seed.
            sampler: `"model"`: the model's own `generate`; `"vllm"`: what generates the rollouts, whose
                log-probabilities then come along. vLLM's random state is its own: it does move on.
        """
        dataset = self.train_dataset if source == "held_out" else self.eval_dataset
        exclude: set[str] = set().union(*self._step_prompts) if source == "held_out" else set()
        rank, share = self.accelerator.process_index, num_prompts // self.accelerator.num_processes
        prompts = draw_prompts(dataset, num_prompts, exclude, (self.args.seed, step))[
            rank * share : (rank + 1) * share
        ]
        own_sampler = generating_with_the_model(self) if sampler == "model" else contextlib.nullcontext()
        with own_sampler:
            return self.draw_completions(prompts, (self.args.seed, step, rank), rank * share)

    def draw_completions(self, prompts: list[Any], seed: tuple[int, ...], first_prompt: int = 0) -> Completions:
        """One completion of each prompt, numbered from `first_prompt`, by whatever generates now; local."""
        with own_randomness(seed, self.accelerator.device):
            prompt_ids, images, fields = self._tokenize_prompts(prompts)
            completion_ids, logps = self._generate_single_turn(prompt_ids, images, fields, 1)
        pad_token_id, device = self._tokenizer.pad_token_id, self.accelerator.device
        return pack_completions(prompt_ids, completion_ids, first_prompt, pad_token_id, device, logps)

    def write_probe_file(
        self, probe: str, step: int, tensors: dict[str, Tensor], distribution: str | None = None
    ) -> None:
        """
        Gather rows over the processes and write `probes/<probe>/step_*.safetensors` on the main one. Collective.

        Args:
            distribution: what prompts and groups the numbers are about, where it is not the step's own.
        """
        width = torch.tensor([tensors["completion_mask"].shape[1]], device=self.accelerator.device)
        missing = int(self.accelerator.gather(width).max() - width)  # columns of completion that other ranks have more
        gathered = {}
        for name, rows in tensors.items():
            if rows.ndim > 1:  # completions are padded on the right, then prompts on the left
                rows = torch.nn.functional.pad(rows, (0, missing))
                rows = self.accelerator.pad_across_processes(rows, dim=1, pad_first=True)
            gathered[name] = self.accelerator.gather(rows)
        self.write_gathered_probe_file(probe, step, gathered, distribution)

    def write_gathered_probe_file(
        self, probe: str, step: int, tensors: dict[str, Tensor], distribution: str | None = None, **more: str
    ) -> None:
        """Write `probes/<probe>/step_*.safetensors` on the main process, from tensors of all processes. Local."""
        if self.is_world_process_zero() and self.args.probe_files_keep != 0:
            metadata = {
                "temperature": self.temperature,
                "learning_rate": self._get_learning_rate(),
                "sampler": "vllm" if "sampling_logps" in tensors else "policy",
                "distribution": distribution or self.args.distribution_of_rollouts(),
                **more,
            }
            run = RunDirectory(self.args.output_dir)
            run.write_probe_file(probe, step, tensors, metadata, self.args.probe_files_keep)

    def write_rollouts(self, step: int) -> None:
        """Write the step's own completions, once however many probes ask for them. Collective."""
        if self._rollouts_written == step:
            return
        self._rollouts_written = step
        names = ("input_ids", "attention_mask", "completion_mask", "prompt_index", "rewards", "advantages")
        self.write_probe_file("rollouts", step, {name: getattr(self._rollouts, name) for name in names})

    # ---- completions that stop at the answer

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.args.stop_at_answer:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with stopping_at(self.accelerator.unwrap_model(self.model), self._tokenizer, ANSWER_CLOSE):
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        ends = [answer_end(self._tokenizer, ids, ANSWER_CLOSE) for ids in completion_ids]
        self._answered = torch.tensor([end is not None for end in ends], device=self.accelerator.device)
        completion_ids = [ids[:end] for ids, end in zip(completion_ids, ends, strict=True)]
        if logprobs is not None:
            logprobs = [values[:end] for values, end in zip(logprobs, ends, strict=True)]
        return completion_ids, logprobs

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        if self.args.stop_at_answer:
            self._correct_terminated(output[1])
        return output

    def _correct_terminated(self, completion_ids: list[list[int]]) -> None:
        """TRL counts a completion as clipped unless it ends with an end token; ending with its answer will do too."""
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        ended = torch.tensor([ids[-1] in ends for ids in completion_ids], device=self.accelerator.device)
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=self.accelerator.device)
        answered = self.accelerator.gather(self._answered)
        terminated = self.accelerator.gather(ended) | answered
        lengths = self.accelerator.gather(lengths)[terminated].float()
        lengths = lengths if len(lengths) else torch.zeros(1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["completions/clipped_ratio"][-1] = 1 - terminated.float().mean().item()
        metrics["completions/mean_terminated_length"][-1] = lengths.mean().item()
        metrics["completions/min_terminated_length"][-1] = lengths.min().item()
        metrics["completions/max_terminated_length"][-1] = lengths.max().item()
        self.record({"completions/answered": answered.float().mean().item()})

    # ---- loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if kwargs.get("compute_entropy"):  # only the loss asks for the entropy
            self._scored = output[0], output[1]
            if self._controlled is not None:  # the loss reads the advantages after this
                number, logps = len(self._micro_batches), output[0].detach()
                self._controlled |= control_micro_batch(self, self._controlled, logps, number, self._statistics)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        # Scored before the policy: its parameters are swapped, and the loss keeps the policy's for backward.
        start_logps = self._score_start_policy(inputs) if self._wants_kl() else None
        if self.args.controls_tokens_of("micro_batch"):
            inputs = self._controlled = dict(inputs)  # TRL keeps its own for the next iteration
        self._enter_probes(inputs)
        loss = super()._compute_loss(model, inputs)
        self._controlled = None
        if self.args.token_control == "kl_cov":
            loss = loss + penalty(self, inputs, self._scored[0])
        self._observe(inputs, start_logps)
        return loss

    def _enter_probes(self, inputs: dict[str, Any]) -> None:
        """Put this micro-batch's forward and backward inside what probes that want this step have around them."""
        for probe in self._probes():
            if probe.wants(self.step):
                around = probe.around_micro_batch(self.args, self.state, self.control, inputs=inputs, trainer=self)
                self._around_micro_batch.enter_context(around)

    def _observe(self, inputs: dict[str, Any], start_logps: Float[Tensor, "B T"] | None) -> None:
        """Sum what the loss computed; after the step's last micro-batch, log the sums and hand out the rollouts."""
        loss_logps, loss_entropy = self._scored
        per_token_logps, token_entropy = loss_logps.detach(), loss_entropy.detach()
        del self._scored  # the graph is the loss's
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        old_logps = inputs.get("old_per_token_logps")
        log_ratio = None if old_logps is None else per_token_logps - old_logps
        self._statistics.add_tokens(per_token_logps, token_entropy, log_ratio, mask)
        if start_logps is not None:
            self._statistics.add_kl(per_token_logps, start_logps, mask)
        scored = {"per_token_logps": per_token_logps, "token_entropy": token_entropy, "log_ratio": log_ratio}
        graphs = {"loss_logps": loss_logps, "loss_entropy": loss_entropy}
        self._send("on_micro_batch", inputs=inputs, mask=mask, **graphs, **scored)
        self._micro_batches.append(inputs)
        if self.accelerator.sync_gradients:
            metrics = self._statistics.reduce(self.accelerator)
            self.record(metrics)
            warn_of_no_token(self, metrics)
            self._rollouts = RolloutBatch.from_micro_batches(self._micro_batches)
            self._send("on_rollouts", rollouts=self._rollouts)
            self._statistics = StepStatistics(self.accelerator.device)
            self._micro_batches = []

    def _wants_kl(self) -> bool:
        return bool(self._start_parameters) and self.step % self.args.kl_every == 0

    @torch.no_grad()
    def _score_start_policy(self, inputs: dict[str, Any]) -> Float[Tensor, "B T"]:
        """Log-probabilities under the parameters that training started from, nats."""
        model = self.accelerator.unwrap_model(self.model)
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with (
            swapped_parameters(model, self._start_parameters),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return self._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, inputs["completion_ids"].size(1)
            )[0]
