"""
How the completions of a step influence one another: their Fisher kernel, and the predicted and measured change of each
completion's log-probability.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine import Engine, UpdateContext, num_trainable, rank_symmetric
from trl_entropy.engine.optimizer_step import (
    coefficient_of_step,
    preconditioner_of_step,
    read_before_step,
    update_parts,
)
from trl_entropy.engine.strict_float32 import fp32_strict
from trl_entropy.estimators.kernel.fisher_kernel import (
    cosine_kernel,
    kernel_means,
    length_correlation,
    permuted_prompts,
    spectrum,
)
from trl_entropy.estimators.kernel.row_kernels import Gram, ParameterNorms, SketchedRows, blockwise_gram
from trl_entropy.estimators.kernel.score_change import (
    ScoreChangeParts,
    change_agreement,
    score_change_parts,
    score_change_shares,
    score_change_sums,
)
from trl_entropy.estimators.kernel.sketch import CountSketch
from trl_entropy.estimators.rows.row_sums import Consumer, DotProducts, Rows, Several
from trl_entropy.gradients.group_gradients import gram_of_all_rows
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.gradients.memory import GIB, rows_budget_of
from trl_entropy.gradients.scores import Params, score
from trl_entropy.gradients.sequence_products import consumed, scores_and_losses, weighted_logps
from trl_entropy.probes import model_checks
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.logged import with_stderr
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.groups import first_groups

_NUM_PERMUTATIONS = 200
_NUM_EIGENVALUES = 3


class FisherProbe(Probe):
    """
    The Fisher kernel (T12) K_ij = grad S_i' M grad S_j of `num_sequences` of the step's own completions, S_i the
    log-probability of completion i, in nats; and the change of each S_i that the step is predicted to cause, split
    into its parts, with the measured change.

    The completions are whole prompt groups. M is the optimizer's metric in this step, with its gradient included;
    coordinates that never had a gradient are left out and counted. Gradients are those of the float32 model; dropout
    is refused. How the loss depends on the scores is read off the backward pass of training, so that it may be any.
    The prediction is exact to first order; the measured change differs by curvature, and by rounding if changes are
    tiny.

    Cost: a forward and a backward pass of these completions before the step, a forward pass after it. Where the loss
    weighs tokens of a completion differently (KL term, entropy bonus, token control, vLLM's factor by token), twice as
    many completions and rows before the step.
    Memory: if one process has all completions in one batch, the rows of the largest parameter; otherwise one float32
    row of all trainable parameters for each of a process's completions, and twice that with more than one process.

    Args:
        every: cadence in steps.
        num_sequences: completions in the kernel over all processes; each process gives its first groups.
        sketch_dim: length of the sketch (T13) that stands for each row; the diagonal stays exact, other entries have
            an error of sqrt((1 + cos^2)/dim), relative to sqrt(K_ii K_jj). 0: exact rows.
        batch_size: completions differentiated at a time, at most; None: as many as memory allows.
        seed: seeds the sketch and the permutations of the prompt labels.
    """

    name = "fisher"
    needs_loss_coefficients = True
    splits_steps = True

    def __init__(
        self,
        every: int = 1,
        num_sequences: int = 32,
        sketch_dim: int = 0,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(every)
        self.num_sequences, self.sketch_dim, self.batch_size, self.seed = num_sequences, sketch_dim, batch_size, seed

    @classmethod
    def from_config(cls, args: ProbeChecks) -> FisherProbe:
        return cls(
            every=args.fisher_probe_every,
            num_sequences=args.fisher_num_sequences,
            sketch_dim=args.fisher_sketch_dim,
            batch_size=args.probe_batch_size,
            seed=args.seed,
        )

    # ---- before training

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        args.check_fisher_probe(self.num_sequences)
        model_checks.check_full_distribution(args, model, "fisher_probe")
        model_checks.check_scoring(model, "fisher_probe")
        model_checks.check_no_dropout(model, "fisher_probe")
        model_checks.check_no_auxiliary_loss(args, model, "fisher_probe")
        model_checks.check_sequences(model, "fisher_probe")
        if not self.sketch_dim:
            check_memory(num_rows(self.num_sequences, args), model, rows_budget_of(args, model))

    # ---- events

    def on_before_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, rollouts: RolloutBatch, record, **kwargs
    ) -> None:
        read_before_step(update)
        accelerator = engine.accelerator
        self._index = first_groups(rollouts.prompt_index, self.num_sequences // args.world_size)
        self._completions = Completions.of(rollouts).rows(self._index)
        self._gather_what_is_known(rollouts, accelerator)
        metric, coefficients = preconditioner_of_step(update), record.loss_coefficients.rows(self._index)
        alike = args.weighs_tokens_alike() and rollouts.advantages.ndim == 1
        consumer, norms, dots = self._differentiate(args, engine, update, metric, None if alike else coefficients)
        self._norms = accelerator.gather(norms.mT.contiguous()).mT
        self._gram, products = self._grams_of(consumer, accelerator)
        self._kernel = self._gram.diagonal_scatter(self._norms.sum(0)) if self.sketch_dim else self._gram
        if products is None:
            products = self._kernel * accelerator.gather(coefficients.mean(self._completions.loss_mask))
        self._parts = self._predict(update, products, accelerator.gather(dots.mT.contiguous()))
        metrics["fisher/num_coordinates_without_metric"] = int(sum((m == 0).sum() for m in metric.values()))
        metrics |= self._kernel_logged() | _shares_logged(self._parts, self._prompts)
        self._names = list(engine.parameters)
        metrics |= _adapter_shares(self._norms.sum(1), self._names)

    def on_after_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, record, files, **kwargs: Any
    ) -> None:
        before, after = (self._score(engine, args, params) for params in (update.params_before, update.params_after))
        measured = engine.accelerator.gather(after - before)
        predicted = torch.stack(self._parts).sum(0)
        slope, correlation = change_agreement(predicted, measured, self._prompts)
        metrics |= {"fisher/num_prompts": slope.dof + 1} | with_stderr("fisher/change_slope", slope)
        metrics["fisher/change_correlation"] = correlation
        metrics["fisher/change_measured_rms"] = measured.square().mean().sqrt().item()
        self._write(files, record, predicted, measured)

    # ---- measuring

    def _gather_what_is_known(self, rollouts: RolloutBatch, accelerator: Accelerator) -> None:
        """Gather rows, prompts, lengths, rewards and advantages of the completions, in rank order. Collective."""
        index, first = self._index, accelerator.process_index * len(rollouts.prompt_index)
        self._rows, self._prompts, self._lengths = (
            accelerator.gather(x) for x in (first + index, rollouts.prompt_index[index], rollouts.lengths[index])
        )
        advantages = _by_completion(rollouts.advantages, rollouts.loss_mask)
        self._rewards, self._advantages = (accelerator.gather(x[index]) for x in (rollouts.rewards, advantages))

    def _differentiate(
        self,
        args: ProbeChecks,
        engine: Engine,
        update: UpdateContext,
        metric: dict[str, Tensor],
        coefficients: LossCoefficients | None,
    ) -> tuple[Consumer, Float[Tensor, "K N"], Float[Tensor, "3 N"]]:
        """
        Differentiate this rank's S_i, and with `coefficients` also what each completion adds to the loss, as N further
        rows. Collective.

        Returns:
            What the kernel is computed from; each parameter's part of K_ii; grad S_i . v for v = M g and for the parts
            of the update that momentum and weight decay make.
        """
        params, vectors, number = update.params_before, _directions(update, metric), len(self._completions)
        completions, value = self._completions, weighted_logps(self._completions.loss_mask.double())
        if coefficients is not None:
            completions = completions.rows(torch.arange(number).repeat(2))
            value = scores_and_losses(coefficients)
        num_rows = len(completions)

        def consumers() -> Several:
            kernel = self._kernel_consumer(num_rows, metric, engine.accelerator.num_processes)
            return Several(kernel, ParameterNorms(num_rows, metric), DotProducts(num_rows, vectors))

        with (
            rank_symmetric(engine.accelerator, "differentiating completions for the Fisher kernel"),
            engine.scoring_model(params) as model,
        ):
            made = consumed(model, completions, value, consumers, args.temperature, self.batch_size)
        kernel, norms, dots = made.consumers
        return kernel, norms.values[:, :number], dots.values[:, :number]

    def _kernel_consumer(self, number: int, metric: dict[str, Tensor], num_processes: int) -> Consumer:
        if self.sketch_dim:
            return SketchedRows(number, CountSketch(self.sketch_dim, self.seed), metric)
        if num_processes == 1:
            return Gram(number, metric)
        return Rows(number, scale={name: m.sqrt() for name, m in metric.items()})  # sent to the other processes

    def _grams_of(
        self, consumer: Any, accelerator: Accelerator
    ) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N N"] | None]:
        """
        The kernel of all ranks' completions and, where there are rows g_j of the loss, -grad S_i' M g_j. Collective.
        """
        number, values = len(self._completions), consumer.values
        with fp32_strict():
            if isinstance(consumer, Gram):
                kernel, others = values[:number, :number], values[:number, number:]
                return kernel, -others if others.numel() else None
            scores, losses = values[:number], values[number:]
            kernel = gram_of_all_rows(scores, scores, accelerator, blockwise_gram)
            if not len(losses):
                return kernel, None
            return kernel, -gram_of_all_rows(scores, losses, accelerator, blockwise_gram)

    def _predict(
        self, update: UpdateContext, products: Float[Tensor, "N N"], dots: Float[Tensor, "N 3"]
    ) -> ScoreChangeParts:
        """The parts of each completion's change (T12), from K_ij alpha_j or -grad S_i' M g_j."""
        with_gradient, with_momentum, with_decay = dots.unbind(1)
        return score_change_parts(
            products, self._prompts, coefficient_of_step(update), with_gradient, with_momentum, with_decay
        )

    def _score(self, engine: Engine, args: ProbeChecks, params: Params) -> Float[Tensor, " N"]:
        """S_i of this rank's completions in float32, with `params` in the model; if one rank fails, all do."""
        with (
            rank_symmetric(engine.accelerator, "scoring completions for the Fisher probe"),
            engine.scoring_model(params, differentiated=False) as model,
        ):
            scores = score(model, self._completions, args.temperature, self.batch_size, params)
        return scores.logps[0].double().sum(1)

    def _kernel_logged(self) -> dict[str, float]:
        cosine, prompts = cosine_kernel(self._kernel), self._prompts
        logged: dict[str, float] = {"fisher/num_completions": len(prompts)}
        for name, estimate in kernel_means(self._kernel, prompts).items():
            logged |= with_stderr(f"fisher/{name}", estimate)
        cosines = kernel_means(cosine, prompts, self._rewards)
        for name in (name for name in cosines if name != "diagonal"):
            logged |= with_stderr(f"fisher/cosine_{name}", cosines[name])
        eigenvalues, participation_ratio, effective_rank = spectrum(self._gram)
        logged |= {"fisher/participation_ratio": participation_ratio, "fisher/effective_rank": effective_rank}
        logged |= {f"fisher/eigenvalue_{i + 1}": eigenvalues[i].item() for i in range(_NUM_EIGENVALUES)}
        logged |= with_stderr("fisher/length_correlation", length_correlation(cosine, self._lengths, prompts))
        return logged | self._null_logged(cosine)

    def _null_logged(self, cosine: Float[Tensor, "N N"]) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed)
        null = permuted_prompts(cosine, self._prompts, _NUM_PERMUTATIONS, generator)
        return {
            "fisher/cosine_prompt_difference": null.difference,
            "fisher/cosine_prompt_difference_null_stddev": null.null_stddev,
            "fisher/cosine_prompt_difference_p_value": null.p_value,
        }

    def _write(self, files: ProbeFiles, record: StepRecord, predicted: Tensor, measured: Tensor) -> None:
        """
        Write `probes/fisher/step_*.safetensors`: `rows` are indices into the step's file of rollouts, and
        `parameter_norms` (K, N) is what each of the K `parameters` named in the metadata adds to K_ii.
        """
        tensors = {"kernel": self._kernel, "rows": self._rows, "prompt_index": self._prompts}
        tensors |= {"rewards": self._rewards, "advantages": self._advantages, "lengths": self._lengths}
        tensors |= {"logps_change_predicted": predicted, "logps_change_measured": measured}
        tensors |= {f"logps_change_{name}": part for name, part in self._parts._asdict().items()}
        tensors["parameter_norms"] = self._norms
        files.write_gathered(self.name, record.step, tensors, parameters=json.dumps(self._names))
        files.write_rollouts(record.step, record.rollouts)


def num_rows(num_sequences: int, args: ProbeChecks, world_size: int | None = None) -> int:
    """Gradients that one process holds, including those it receives from other processes."""
    world = args.world_size if world_size is None else world_size
    return num_sequences // world * (2 if world > 1 else 1) * (1 if args.weighs_tokens_alike() else 2)


def check_memory(num_rows: int, model: nn.Module, budget: float) -> None:
    """Raises `ValueError` if `num_rows` gradients of all trainable parameters exceed `budget` bytes."""
    num_parameters = num_trainable(model)
    num_bytes = 4 * num_rows * num_parameters
    if num_bytes > budget:
        raise ValueError(
            f"fisher_probe keeps {num_rows} float32 gradients of {num_parameters} trainable parameters: "
            f"{num_bytes / GIB:.1f} GiB, the limit is {budget / GIB:.1f} GiB. Set fisher_sketch_dim=4096, a "
            "smaller fisher_num_sequences, a larger probe_rows_gib, or use LoRA."
        )


def _by_completion(values: Float[Tensor, "B *T"], mask: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """The mean over each completion's tokens, if there is one value for each of them."""
    return values if values.ndim == 1 else (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _directions(update: UpdateContext, metric: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """By parameter: M g, and what momentum and weight decay add to the parameters (T5). Collective."""
    parts, gradient = dict(update_parts(update)), update.gradient
    directions: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, m in metric.items():
        nothing = torch.zeros_like(m)
        momentum, decay = parts[name][:2] if name in parts else (nothing, nothing)
        for direction, value in zip(directions, (m * gradient[name], momentum, decay), strict=True):
            direction[name] = value
    return directions


def _shares_logged(parts: ScoreChangeParts, prompts: Int[Tensor, " N"]) -> dict[str, float]:
    logged = {"fisher/change_predicted_rms": torch.stack(parts).sum(0).square().mean().sqrt().item()}
    for name, estimate in score_change_shares(score_change_sums(parts, prompts)).items():
        logged |= with_stderr(f"fisher/change_share_{name}", estimate)
    return logged


def _adapter_shares(traces: Float[Tensor, " K"], names: list[str]) -> dict[str, float]:
    """Shares of LoRA's A and B matrices in the trace of the kernel; empty without an adapter."""
    shares = {}
    for letter in "AB":
        chosen = torch.tensor([f".lora_{letter}." in name for name in names], device=traces.device)
        if chosen.any():
            shares[f"fisher/trace_share_lora_{letter}"] = (traces[chosen].sum() / traces.sum()).item()
    return shares
