"""`EntropyChange`: a callback with which a plain `GRPOTrainer` logs what each of its steps did to the entropy."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer, RLOOTrainer

from trl_entropy.config.sampling import merged, narrowing, narrowing_arguments
from trl_entropy.engine import Engine, build_engine
from trl_entropy.gradients.inputs import base_model
from trl_entropy.probes import model_checks
from trl_entropy.probes.watch_step import WatchedStep, measure_step
from trl_entropy.rollouts.batch import GenerationBatch, join_rows, loss_mask_of
from trl_entropy.rollouts.completions import Completions
from trl_entropy.trainer.probed import ProbedTrainer

_WHAT = "EntropyChange"
_COLUMNS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "sampling_per_token_logps")


class EntropyChange(TrainerCallback):
    """
    Logs the change of the entropy by each step of a trainer of TRL that knows nothing of this package:

        GRPOTrainer(..., callbacks=[EntropyChange()])

    A step is measured (T7), and predicted to first order (T8) and by the trapezoid (T10), on the completions of the
    next one, which the policy after the step draws from other prompts: nothing is generated, and no prompt is counted
    that the step has learned from, unless an epoch ends between the two. The numbers come with the log line of that
    next step, `entropy/of_step` says of which step they are, and the last step of a training has none. They are those
    of `watch_step`, under its names. Errors are by the jackknife over prompts.

    For `GRPOTrainer`, trainers that derive from it (GMPO), and `RLOOTrainer`, whatever loss, adapter or optimizer they
    have, in one process, under DDP, FSDP2 and ZeRO 1 to 3. Training stays as it is bit for bit. Cost: about eight
    forward passes over the completions, with `derivatives=False` two. Memory: two copies of what a process holds of
    the trained parameters, and the float32 model while it scores.

    Args:
        every: steps between two that are measured.
        derivatives: also predict the change.
        batch_size: completions scored at a time, at most; None: as many as memory allows.

    Raises:
        TypeError: for another trainer; AsyncGRPOTrainer mixes the policies of several steps in one batch.
        ValueError, NotImplementedError: when training begins, for completions that are not the policy's own draws, for
            a model that cannot be scored exactly, or a way of training that no engine reads: says what to change.
    """

    def __init__(self, every: int = 1, derivatives: bool = True, batch_size: int | None = None) -> None:
        if every < 1:
            raise ValueError(f"{_WHAT}: every is {every}; use 1 or more steps.")
        self.every, self.derivatives, self.batch_size = every, derivatives, batch_size
        self._trainer: Any = None
        self._engine: Engine | None = None
        self._ends: list[dict[str, Tensor]] = []  # theta before and after the step that is to be measured next

    # ---- the trainer

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._take(trainer_of_event())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is None:  # added after the trainer was built
            self._take(trainer_of_event())
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        model_checks.check_own_completions(model, _WHAT)
        model_checks.check_drawn_without_dropout(model, _WHAT)
        model_checks.check_scoring(model, _WHAT, self.derivatives)
        _check_draws(trainer, model)
        self._engine = build_engine(trainer.accelerator, trainer.model_wrapped, trainer.optimizer, args.max_grad_norm)
        self._ends = []

    def _take(self, trainer: Any) -> None:
        if isinstance(trainer, ProbedTrainer):
            raise TypeError(f"{type(trainer).__name__} has probes of its own: set entropy_probe=True, not {_WHAT}().")
        if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
            raise TypeError(
                f"{_WHAT} measures a step on completions that the policy from after it drew. {type(trainer).__name__} "
                "keeps none (AsyncGRPOTrainer draws while it trains, by policies of several steps). Use GRPOTrainer, "
                "RLOOTrainer or one that derives from them, or trl_entropy.watch_step."
            )
        _check_on_policy(trainer.args)
        self._trainer = trainer

    # ---- steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._measured(state.global_step + 1) and not self._ends:
            self._keep()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._engine is not None
        step = state.global_step
        if len(self._ends) == 2:  # of the step before, whose policy drew the completions of this one
            watched = WatchedStep()
            shares = self._ends[0], self._ends[1]
            completions = completions_of(self._trainer._buffered_inputs)
            temperature = self._trainer.args.temperature
            measure_step(
                watched, self._engine, shares, completions, True, temperature, self.derivatives, self.batch_size
            )
            self._log(watched, step - 1)
            self._ends = self._ends[1:] if self.every == 1 else []
        if self._measured(step):
            self._keep()

    def _measured(self, step: int) -> bool:
        return step % self.every == 0

    def _keep(self) -> None:
        assert self._engine is not None
        self._ends.append({name: share.detach().clone() for name, share in self._engine.theta().items()})

    def _log(self, watched: WatchedStep, step: int) -> None:
        """With the trainer's own metrics of the step that ends, which TRL averages over a log line."""
        for name, value in {**watched.as_dict(), "entropy/of_step": step}.items():
            self._trainer._metrics["train"][name].append(value)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine, self._ends = None, []


def trainer_of_event() -> Trainer:
    """
    The trainer that calls the callback whose event calls this. transformers hands a callback the model and the
    optimizer, but not the trainer, whose completions, engine and metrics are needed; so it is taken from the stack.

    Raises:
        RuntimeError: if no trainer is there.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    raise RuntimeError(f"{_WHAT} is a callback of a Trainer: pass it in callbacks=[...].")


def completions_of(batches: Sequence[Mapping[str, Any]]) -> Completions:
    """
    The completions of TRL's latest generation on this process. A prompt is known by its tokens, as TRL shuffles the
    rows of a group: two groups of equal prompts count as one, which makes errors larger, never smaller.
    """
    names = [name for name in _COLUMNS if name in batches[0]]
    joined = {name: join_rows([batch[name] for batch in batches], name) for name in names}
    return Completions(
        torch.cat([joined["prompt_ids"], joined["completion_ids"]], dim=1),
        torch.cat([joined["prompt_mask"], joined["completion_mask"]], dim=1),
        joined["completion_mask"],
        prompt_numbers(joined["prompt_ids"], joined["prompt_mask"]),
        joined.get("sampling_per_token_logps"),
        loss_mask=join_rows([loss_mask_of(cast(GenerationBatch, batch)) for batch in batches], "loss_mask"),
    )


def prompt_numbers(ids: Int[Tensor, "B S"], mask: Int[Tensor, "B S"]) -> Int[Tensor, " B"]:
    """A number of each row's prompt, the same on all processes: 62 bits of a hash of its tokens."""
    tokens = [row[own.bool()].tolist() for row, own in zip(ids.cpu(), mask.cpu(), strict=True)]
    hashes = [hashlib.sha256(repr(one).encode()).digest()[:8] for one in tokens]
    numbers = [int.from_bytes(one, "big") >> 2 for one in hashes]
    return torch.tensor(numbers, dtype=torch.long, device=ids.device)


def _check_on_policy(args: Any) -> None:
    """Raises `ValueError` unless a step's completions are drawn by the policy that it starts from."""
    accumulation, generation = args.gradient_accumulation_steps, args.steps_per_generation
    if args.num_iterations != 1 or accumulation % generation:
        raise ValueError(
            f"{_WHAT} measures a step on the completions of the next one, which must not be the step's own, but "
            f"num_iterations={args.num_iterations} and steps_per_generation={generation} let steps share them. Set "
            f"num_iterations=1 and steps_per_generation={accumulation}."
        )
    if args.use_vllm and not getattr(args, "vllm_importance_sampling_correction", False):
        raise ValueError(
            f"{_WHAT} weighs completions by what drew them, and TRL keeps no log-probabilities of vLLM. Set "
            "vllm_importance_sampling_correction=True (GRPO), or use_vllm=False."
        )
    if args.mask_truncated_completions:
        raise ValueError(
            f"{_WHAT}: mask_truncated_completions=True drops completions by their outcome, which biases every "
            "estimator. Set mask_truncated_completions=False."
        )


def _check_draws(trainer: Any, model: Any) -> None:
    """Raises `ValueError` if settings of the run, or the model's own, keep tokens from being drawn, or add images."""
    args, own = trainer.args, getattr(base_model(model), "generation_config", None)
    settings = {name: getattr(args, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    extra = args.generation_kwargs or {}
    of_model = {} if args.use_vllm or own is None else own.to_dict()
    if found := narrowing(merged(of_model, settings, extra)) | narrowing_arguments(extra):
        named = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"{_WHAT}: the estimators hold for completions drawn from the policy's full distribution, but {named} "
            "changes it. Set top_k=0, top_p=1, min_p=None, repetition_penalty=1."
        )
    if {"image", "images"} & {*(getattr(trainer.train_dataset, "column_names", None) or ())}:
        raise ValueError(f"{_WHAT} does not score images. Use DrGRPOTrainer with entropy_probe=True.")
