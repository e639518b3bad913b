"""How noisy a step's gradient is: the gradient noise scale, in prompts, from the step's own prompt groups."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine import Engine, UpdateContext, num_trainable, rank_symmetric
from trl_entropy.engine.optimizer_step import has_metric_before, preconditioner_before
from trl_entropy.engine.strict_float32 import fp32_strict
from trl_entropy.estimators.noise.noise_scale import (
    GroupProducts,
    NoiseParts,
    NoiseScaleRecord,
    accepted_products,
    group_products,
    jackknifed_parts,
    micro_batch_parts,
)
from trl_entropy.estimators.optimizer.rules import SGDRule
from trl_entropy.estimators.statistics.pooled import PooledParts, StepParts
from trl_entropy.gradients.group_gradients import flat
from trl_entropy.gradients.group_products import (
    BackwardGroupGradients,
    MicroBatchNorms,
    half_products,
    products_by_extra_pass,
)
from trl_entropy.gradients.memory import GIB, rows_budget_of
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.model_checks import (
    check_no_auxiliary_loss,
    check_no_dropout,
    check_scoring,
    check_sequences,
)
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.batch import RolloutBatch, TrainingBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.state import StateDict

logger = logging.getLogger(__name__)

# In the Euclidean norm (T14), and in the optimizer's metric before the step (T16), called Adam's.
_BLOCK = 2**24  # columns of rows that are compared with the gradient at a time
_METRICS = ("simple", "adam")


class NoiseScaleProbe(Probe):
    """
    Estimates |G|^2 and tr(Sigma) of every step from the gradients Y_n of its P prompt groups, before clipping (T14),
    and the noise scale tr(Sigma)/|G|^2 of the steps so far, in prompts, with Fieller's interval; and the same in
    the optimizer's metric (T16).

    If the language-model head is frozen (LoRA), Y_n are read from training's own backward pass, in its precision: no
    extra pass, and one float32 vector of all D trainable parameters for each group of a process. TRL's loss bypasses
    the hooks of a trained head, so in full fine-tuning, and if these vectors exceed `probe_rows_gib`, an extra forward
    and backward pass of the float32 model is made before the update, with the loss's dependence on the scores as
    training's backward shows it. The log says which of the two is used; `noise_scale/gradient_error` is the length of
    the difference of the mean Y_n from the gradient that the optimizer got, over the length of that. Where the loss is
    divided by the tokens of the batch or micro-batch, that number is taken as given.

    (T16) needs an optimizer with a known metric that differs between numbers (not SGD), and begins with its second
    step, as there is no second moment before the first. Standard errors are the jackknife's over prompts, hence
    conservative; completions of one prompt never count as independent.

    With `resample_uninformative_groups` everything is about the accepted groups (T14a): P counts them, and groups that
    had to be kept with equal rewards are left out. Without it, everything is about all prompts as they are drawn.

    With `source="micro_batches"` the gradient norms of micro-batches of whole groups replace those of single groups
    (T15): no vectors are kept and no pass is added, for any model, head and engine. Standard errors come from the
    scatter over steps, so the estimates begin with the second measured step; (T16) is not available.

    With `halves` tr(Sigma) is split into a part between prompts and a part between completions of one prompt, by
    another pass of the float32 model in which each half of a group has advantages of its own.

    Args:
        every: cadence in steps.
        batch_size: completions of an extra pass at a time, at most; None: as many as memory allows.
        halves: split the noise into parts within and between prompts.
        source: `"groups"` or `"micro_batches"`.
    """

    name = "noise_scale"

    def __init__(
        self, every: int = 1, batch_size: int | None = None, halves: bool = False, source: str = "groups"
    ) -> None:
        super().__init__(every)
        self.batch_size, self.halves, self.source = batch_size, halves, source
        self.records = {name: NoiseScaleRecord.empty(with_halves=halves and name == "simple") for name in _METRICS}
        self._shares: BackwardGroupGradients | MicroBatchNorms | None = None
        self._way_said, self._by_extra_pass = "", False
        self._previous: NoiseParts | None = None  # of the previously measured step, for (T15)

    @classmethod
    def from_config(cls, args: ProbeChecks) -> NoiseScaleProbe:
        return cls(
            args.noise_scale_probe_every, args.probe_batch_size, args.noise_scale_within_prompt, args.noise_scale_from
        )

    # ---- before training

    @property
    def needs_loss_coefficients(self) -> bool:
        return self._by_extra_pass

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        args.check_noise_scale_probe()
        if self.source == "micro_batches":
            return args.check_noise_scale_micro_batches(self.halves)
        if self.halves:
            args.check_noise_scale_within_prompt()
        self._num_groups = args.per_device_train_batch_size * args.gradient_accumulation_steps // args.num_generations
        reason = why_extra_pass(model, self._num_groups, rows_budget_of(args, model))
        self._by_extra_pass = reason is not None
        self._check_layers(args, model)
        way = f"an extra pass before the update, as {reason}" if reason else "training's own backward"
        if args.process_index == 0 and way != self._way_said:
            self._way_said = way
            logger.info("noise scale: gradients of prompt groups come from %s", way)

    def _check_layers(self, args: ProbeChecks, model: nn.Module) -> None:
        """Raises `ValueError` unless the groups' gradients can be had, and are those of training."""
        check_no_auxiliary_loss(args, model, "noise_scale_probe")
        if self._by_extra_pass or self.halves:
            what = "noise_scale_within_prompt" if self.halves else "noise_scale_probe, with a pass of its own,"
            check_scoring(model, what)
            check_no_dropout(model, what)
        check_sequences(model, "noise_scale_probe")

    def reset(self) -> None:
        self._shares = None

    # ---- events

    def around_micro_batch(
        self, args, state, control, *, inputs: TrainingBatch, model: nn.Module, **kwargs: Any
    ) -> AbstractContextManager[None]:
        if self._by_extra_pass:
            return contextlib.nullcontext()
        if self._shares is None:
            by_groups = self.source == "groups"
            self._shares = (
                BackwardGroupGradients(model, self._num_groups)
                if by_groups
                else MicroBatchNorms(model, args.num_generations)
            )
        return self._shares.micro_batch(inputs["prompt_index"])

    def on_before_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, record, files, **kwargs: Any
    ) -> None:
        if isinstance(self._shares, MicroBatchNorms):
            return self._from_micro_batches(self._shares.finish(), update, engine, args, metrics, record, files)
        rollouts = record.rollouts
        metric = metric_of_optimizer(update, engine)
        if metric is not None:
            num_dead = sum((m == 0).sum() for m in metric.values())
            metrics["noise_scale/num_coordinates_without_metric"] = int(num_dead)
        if self._by_extra_pass:
            local, mean = self._from_extra_pass(args, engine, update, record, metric)
            prompts = rollouts.prompt_index.unique()
            compared = [(mean[name][None], gradient) for name, gradient in update.gradient.items()]
        else:
            whole = None if metric is None else flat(metric, update.gradient)
            local, prompts, compared = self._from_training(engine, update, whole)
        products = [_gathered(one, engine.accelerator) for one in local]
        metrics["noise_scale/gradient_error"] = _gradient_error(compared, engine.accelerator)
        prompts = engine.accelerator.gather(prompts)
        halves = self._half_products(args, engine, update, rollouts) if self.halves else None
        if args.resample_uninformative_groups:
            accepted = engine.accelerator.gather(rollouts.accepted)
            products, prompts = [accepted_products(one, accepted) for one in products], prompts[accepted]
            halves = None if halves is None else halves[accepted]
        metrics["noise_scale/num_prompts"] = len(prompts)
        for name, one in zip(_METRICS, products, strict=False):  # the first step has none in the optimizer's metric
            metrics |= self._measured(name, one, halves if name == "simple" else None)
        self._write(files, record, prompts, products)

    # ---- resuming

    def state_dict(self) -> StateDict:
        records = {name: dataclasses.asdict(record.parts) for name, record in self.records.items()}
        return records if self._previous is None else records | {"previous": list(self._previous)}

    def load_state_dict(self, state: StateDict) -> None:
        state = dict(state)
        self._previous = NoiseParts(*state.pop("previous")) if "previous" in state else None
        self.records = {name: NoiseScaleRecord(PooledParts(**parts)) for name, parts in state.items()}

    # ---- measuring

    def _from_training(
        self, engine: Engine, update: UpdateContext, metric: Tensor | None
    ) -> tuple[list[GroupProducts], Tensor, list[tuple[Tensor, Tensor]]]:
        """
        Products from the group gradients of training's backward pass, the groups' numbers, and as of
        [`_gradient_error`] blocks of this process's rows with the gradient. Collective.
        """
        assert isinstance(self._shares, BackwardGroupGradients), "around_micro_batch comes before on_before_update"
        gradient = update.gradient
        with rank_symmetric(engine.accelerator, "adding up the gradients of prompt groups"), fp32_strict():
            rows, prompt_index = self._shares.finish()
            vector = flat(gradient, engine.parameters)
            products = group_products(rows, vector, [None] if metric is None else [None, metric])
        prompts, order = prompt_index.to(rows.device).sort()
        # Training averages over ranks: group n adds row_n / num_ranks to the gradient, Y_n is P times that, and
        # P / num_ranks groups are this process's.
        number = len(rows)
        scaled = [GroupProducts(number**2 * norms[order], number * dots[order]) for norms, dots in products]
        return scaled, prompts, list(zip(rows.split(_BLOCK, dim=1), vector.split(_BLOCK), strict=True))

    def _from_extra_pass(
        self,
        args: ProbeChecks,
        engine: Engine,
        update: UpdateContext,
        record: StepRecord,
        metric: dict[str, Tensor] | None,
    ) -> tuple[list[GroupProducts], Mapping[str, Tensor]]:
        """Products from an extra pass of the float32 model, and this process's mean Y_n. Collective."""
        params, gradient, rollouts = update.params_before, update.gradient, record.rollouts
        num_groups = engine.accelerator.num_processes * len(rollouts.prompt_index.unique())
        assert record.loss_coefficients is not None, "needs_loss_coefficients"
        scaled = record.loss_coefficients.times(num_groups)
        with (
            rank_symmetric(engine.accelerator, "differentiating the step's prompt groups"),
            engine.scoring_model(params) as model,
        ):
            completions = Completions.of(rollouts)
            return products_by_extra_pass(
                model, completions, scaled, args.temperature, gradient, metric, self.batch_size
            )

    def _from_micro_batches(
        self,
        local: Tensor,
        update: UpdateContext,
        engine: Engine,
        args: ProbeChecks,
        metrics: dict[str, float],
        record: StepRecord,
        files: ProbeFiles,
    ) -> None:
        """Log (T15) from the gradient norms of this process's micro-batches, and write them. Collective."""
        sq_norms, batch_sq_norm = engine.accelerator.gather(local), update.grad_norm**2
        num_prompts = len(sq_norms) * args.per_device_train_batch_size // args.num_generations
        parts, pooled = micro_batch_parts(sq_norms, batch_sq_norm, num_prompts, self._previous)
        self._previous = parts
        self.records["simple"] = self.records["simple"].merge(NoiseScaleRecord(pooled))
        metrics |= {
            "noise_scale/num_prompts": num_prompts,
            "noise_scale/grad_sq_norm": parts.grad_sq_norm,
            "noise_scale/grad_variance_trace": parts.variance_trace,
            **_pool_logged("simple", self.records["simple"], num_prompts),
        }
        batch = torch.tensor(batch_sq_norm, dtype=torch.float64)
        tensors = {"micro_batch_sq_norms": sq_norms, "batch_sq_norm": batch, "num_prompts": torch.tensor(num_prompts)}
        files.write_gathered(self.name, record.step, tensors)
        files.write_rollouts(record.step, record.rollouts)

    def _half_products(
        self, args: ProbeChecks, engine: Engine, update: UpdateContext, rollouts: RolloutBatch
    ) -> Tensor:
        """Y_a . Y_b, the product of the gradients of a group's two halves, for all ranks' groups. Collective."""
        params = update.params_before
        with (
            rank_symmetric(engine.accelerator, "differentiating halves of prompt groups"),
            engine.scoring_model(params) as model,
        ):
            completions = Completions.of(rollouts)
            local = half_products(
                model, completions, rollouts.rewards, args.temperature, args.max_completion_length, self.batch_size
            )
        return engine.accelerator.gather(local)

    def _measured(self, name: str, products: GroupProducts, halves: Tensor | None) -> dict[str, float]:
        """Metrics of the step's estimates, and of all steps so far."""
        parts = jackknifed_parts(*products, halves)
        if parts.values.isfinite().all() and parts.covariance.isfinite().all():
            self.records[name] = self.records[name].update(parts)
        return _step_logged(_prefix(name), parts) | _pool_logged(name, self.records[name], parts.num_prompts)

    def _write(self, files: ProbeFiles, record: StepRecord, prompts: Tensor, products: list[GroupProducts]) -> None:
        """Write `probes/noise_scale/step_*.safetensors`, from which every estimate can be computed again."""
        tensors = {"prompt_index": prompts}
        for suffix, one in zip(("", "_adam"), products, strict=False):
            tensors |= {
                f"group_sq_norms{suffix}": one.sq_norms,
                f"group_dot_batch{suffix}": one.dot_batch,
                f"batch_sq_norm{suffix}": one.dot_batch.mean(),
            }
        files.write_gathered(self.name, record.step, tensors)
        files.write_rollouts(record.step, record.rollouts)


def why_extra_pass(model: nn.Module, num_groups: int, budget: float) -> str | None:
    """
    Why the groups' gradients need an extra pass; None if they can be read from training's backward pass, and `budget`
    bytes are enough to keep them.
    """
    head = model.get_output_embeddings()
    if head is not None and any(param.requires_grad for param in head.parameters()):
        return "the language-model head is trained"
    num_parameters = num_trainable(model)
    if 4 * num_groups * num_parameters > budget:
        return f"{num_groups} gradients of {num_parameters} numbers exceed {budget / GIB:.1f} GiB (probe_rows_gib)"
    return None


def metric_of_optimizer(update: UpdateContext, engine: Engine) -> dict[str, Tensor] | None:
    """
    M of (T16), from the optimizer's state before the step; 0 in coordinates that never had a gradient. None at its
    first step, where no rule of its steps is known, and where M is the same for all numbers. Collective.
    """
    try:
        rule = engine.step_rule()
    except ValueError:
        return None
    if isinstance(rule, SGDRule) or not has_metric_before(update):
        return None
    return preconditioner_before(update)


def _gradient_error(compared: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator) -> float:
    """
    |mean_n Y_n - g| / |g| with the optimizer's unclipped g; 0/0: nan. Collective.

    Args:
        compared: part by part of the parameters, rows whose sum averages over processes to the mean Y_n, and g.
    """
    error_sq = gradient_sq = torch.zeros((), dtype=torch.float64)
    for local, gradient in compared:
        mean = accelerator.reduce(local.sum(0).to(accelerator.device), reduction="mean")
        error_sq = error_sq + (mean - gradient.to(mean)).square().sum(dtype=torch.float64)
        gradient_sq = gradient_sq + gradient.float().square().sum(dtype=torch.float64)
    return float((error_sq / gradient_sq).sqrt())


def _gathered(products: GroupProducts, accelerator: Accelerator) -> GroupProducts:
    """The products of all ranks' groups, in rank order. Collective."""
    return GroupProducts(*accelerator.gather(torch.stack(products, dim=1)).unbind(1))


def _prefix(name: str) -> str:
    return "noise_scale/" if name == "simple" else f"noise_scale/{name}_"


def _step_logged(prefix: str, parts: StepParts) -> dict[str, float]:
    signal, noise = parts.values.tolist()[:2]
    stderrs = parts.covariance.diagonal().sqrt().tolist()
    return {
        f"{prefix}grad_sq_norm": signal,
        f"{prefix}grad_sq_norm_stderr": stderrs[0],
        f"{prefix}grad_variance_trace": noise,
        f"{prefix}grad_variance_trace_stderr": stderrs[1],
    }


def _pool_logged(name: str, record: NoiseScaleRecord, num_prompts: int) -> dict[str, float]:
    """Metrics of all steps so far; empty before the first."""
    if not record.parts.num_steps:
        return {}
    ratio, (lower, upper) = record.signal_to_noise(num_prompts), record.interval()
    suggested = record.suggested_num_prompts()
    halves: dict[str, float] = {}
    if len(record.parts.values) == 3:
        for key in ("between_prompt_trace", "within_prompt_trace", "between_prompt_share"):
            estimate = getattr(record, key)()
            halves |= {f"noise_scale/{key}": estimate.value, f"noise_scale/{key}_stderr": estimate.stderr}
    return halves | {
        f"noise_scale/{name}": record.noise_scale().value,
        f"noise_scale/{name}_lower": lower,
        f"noise_scale/{name}_upper": upper,
        f"{_prefix(name)}signal_to_noise": ratio.value,
        f"{_prefix(name)}signal_to_noise_stderr": ratio.stderr,
        f"{_prefix(name)}suggested_prompts_lower": suggested[0],
        f"{_prefix(name)}suggested_prompts_upper": suggested[1],
    }
