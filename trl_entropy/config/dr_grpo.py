"""`DrGRPOConfig`: TRL's `GRPOConfig` with the Dr-GRPO defaults, the probes' toggles, and one early check."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any

from trl_entropy.config.probe_checks import (
    ENTROPY_ATTRIBUTIONS,
    ENTROPY_CONTROL_COMPLETIONS,
    ENTROPY_CONTROLS,
    ENTROPY_PROBE_COMPLETIONS,
    ENTROPY_PROBE_SAMPLERS,
    NOISE_SCALE_SOURCES,
    TOKEN_CONTROL_SCOPES,
    TOKEN_CONTROLS,
    ProbeRequirements,
)
from trl_entropy.config.prompt_checks import CURRICULA, SelectionRequirements
from trl_entropy.tasks.r1_template import ANSWER_CLOSE

logger = logging.getLogger(__name__)

LENGTH_NORMALIZERS = ("max_completion_length", "group_max")
EVALUATIONS = ("none", "background", "wait")
EVALUATION_PROFILES = ("quick", "full")


def _toggle(help: str, default: Any = False, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DrGRPOConfig(ProbeRequirements, SelectionRequirements):
    """
    Arguments of [`DrGRPOTrainer`]: those of [`~trl.GRPOConfig`], with other defaults and the fields below.

    Defaults that differ from TRL's: `loss_type="dr_grpo"`, `scale_rewards="none"`, `beta=0`, `top_k=0`, `top_p=1`,
    `temperature=1`, `logging_steps=1`, `logging_nan_inf_filter=False` (a NaN loss is logged as NaN).

    Parameters:
        length_normalizer (`str`, *optional*, defaults to `"max_completion_length"`):
            L_i of equation (T2): `"max_completion_length"` (Dr. GRPO) or `"group_max"` (the longest completion of the
            prompt's group, in tokens).
        num_prompts_per_step (`int`, *optional*):
            Prompts of one optimizer step over all processes. Sets `gradient_accumulation_steps` from the number of
            processes and the micro-batch.
        curriculum (`str`, *optional*, defaults to `"none"`):
            `"pass_rate"`: prompts are drawn by how often their completions passed; its settings begin with
            `curriculum_`.
        resample_uninformative_groups (`bool`, *optional*, defaults to `False`):
            Replace prompt groups whose rewards are all equal by groups of other prompts, in at most
            `max_resample_rounds` rounds of generation. Probes on the step's own completions then measure accepted
            groups (T14a).
        stop_at_answer (`bool`, *optional*, defaults to `False`):
            End a completion with its closing answer tag; what the sampler drew after it is dropped.
        evaluate_checkpoints (`str`, *optional*, defaults to `"none"`):
            Evaluate the start policy and each saved checkpoint on held-out problems during training, in the
            `"background"` or with training at a `"wait"`; needs a task of `trl_entropy.train`.
        kl_every (`int`, *optional*, defaults to `0`):
            Steps between measurements of the KL divergence to the start policy when `beta=0`; 0 turns it off.
        entropy_probe, noise_scale_probe, fisher_probe, effective_sample_size_probe, optimizer_state_probe (`bool`):
            Probes, off by default; each has its cadence in steps, `<probe>_every`. The entropy probe's own settings
            begin with `entropy_`; `probe_batch_size` and `probe_files_keep` hold for all probes.

    Raises:
        ValueError: for sizes that do not divide, fewer than 2 generations, sampling or masking that a probe's
            equation excludes, continuous batching in bf16. Raised before any model is loaded.
    """

    loss_type: str = field(default="dr_grpo", metadata={"help": "Loss of the step; see TRL's GRPOConfig."})
    scale_rewards: str = field(
        default="none", metadata={"help": "Divide advantages by a standard deviation: 'none' (T1), 'group', 'batch'."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from the k likeliest tokens only; 0: from all."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two log lines."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and Inf losses from the logs."})

    length_normalizer: str = _toggle(
        "L_i of the Dr-GRPO loss (T2), in tokens: 'max_completion_length' or 'group_max'.",
        default="max_completion_length",
        choices=list(LENGTH_NORMALIZERS),
    )
    num_prompts_per_step: int | None = _toggle(
        "Prompts of one optimizer step over all processes; sets gradient_accumulation_steps.", default=None
    )
    stop_at_answer: bool = _toggle("End completions at the closing answer tag.")
    kl_every: int = _toggle(
        "Steps between measurements of the KL to the start policy when beta=0; 0: never.", default=0
    )

    curriculum: str = _toggle(
        "Which prompts come next: 'none' (TRL's order) or 'pass_rate' (buckets of how often a prompt's completions "
        "passed).",
        default="none",
        choices=list(CURRICULA),
    )
    curriculum_hard_below: float = _toggle("Pass rate below which a prompt is hard.", default=0.2)
    curriculum_easy_above: float = _toggle("Pass rate above which a prompt is easy.", default=0.8)
    curriculum_hard_weight: float = _toggle("Weight of the hard bucket in a draw.", default=1.0)
    curriculum_normal_weight: float = _toggle("Weight of the bucket between the bounds.", default=2.0)
    curriculum_easy_weight: float = _toggle("Weight of the easy bucket.", default=0.5)
    curriculum_ema: float = _toggle("Weight of a prompt's newest group in its pass rate, in (0, 1].", default=0.5)
    curriculum_pass_reward: float = _toggle("A completion passes with this total reward or more.", default=1.0)
    resample_uninformative_groups: bool = _toggle(
        "Replace prompt groups whose rewards are all equal by groups of other prompts, before the step. Probes on the "
        "step's own completions then measure accepted groups, not all prompts."
    )
    max_resample_rounds: int = _toggle(
        "Rounds of generation that replace uninformative groups, at most; a round draws as many prompts as are "
        "expected to do, and what is uninformative after the last one is kept and counted.",
        default=3,
    )
    evaluate_checkpoints: str = _toggle(
        "Evaluate the start policy and each saved checkpoint during training, as trl-entropy evaluate does, in a "
        "process of its own: 'none', in the 'background', or with training at a halt ('wait').",
        default="none",
        choices=list(EVALUATIONS),
    )
    evaluate_profile: str = _toggle(
        "How much that draws; see trl-entropy evaluate.", default="quick", choices=list(EVALUATION_PROFILES)
    )
    additional_steps: int = _toggle(
        "With resume_from_checkpoint: steps to train beyond the checkpoint, in place of max_steps. A decaying "
        "schedule is then that of a run of the new length.",
        default=0,
    )

    entropy_probe: bool = _toggle("Measure and predict the entropy change of a step (T6)-(T11), nats per token.")
    entropy_probe_every: int = _toggle("Steps between two measurements.", default=1)
    entropy_probe_num_completions: int = _toggle(
        "Prompts of the probe batch over all processes, one completion each.", default=64
    )
    entropy_probe_completions: str = _toggle(
        "Where the probe's completions come from: drawn for prompts that are 'held_out' (training prompts not in this "
        "step) or 'eval' (eval_dataset), or the step's own 'rollouts' (no generation; (T17) across prompts).",
        default="held_out",
        choices=list(ENTROPY_PROBE_COMPLETIONS),
    )
    entropy_probe_sampler: str = _toggle(
        "What draws the probe batch: 'model' (its own generate) or 'vllm' (fast; weighted by vLLM's log-"
        "probabilities; vLLM's own random state moves on).",
        default="model",
        choices=list(ENTROPY_PROBE_SAMPLERS),
    )
    entropy_second_order: bool = _toggle("Also predict to second order before the step (T10); AdamW only.")
    entropy_placebo: bool = _toggle("Also predict from an earlier step's update: its slope must be 0.")
    entropy_attribution: str = _toggle(
        "Split the predicted change over momentum, weight decay and the step's completions (T9): 'sequence', or each "
        "'token'; AdamW only.",
        default="none",
        choices=list(ENTROPY_ATTRIBUTIONS),
    )
    probe_batch_size: int = _toggle("Completions that a probe scores at a time; halved on out-of-memory.", default=64)
    probe_files_keep: int | None = _toggle(
        "Newest probe files to keep of each probe; 0: none, unset: all.", default=None
    )

    entropy_control: str = _toggle(
        "Correct each step, after the optimizer, so that the entropy changes by what it is to (T19): 'hold' it, keep "
        "it from falling below ('floor'), only 'report' what would be done, or 'none'; AdamW only.",
        default="none",
        choices=list(ENTROPY_CONTROLS),
    )
    entropy_control_target: float | None = _toggle("Entropy to go to, nats per token.", default=None)
    entropy_control_per_step: float | None = _toggle(
        "Without a target: change of a step, nats per token; 'floor': at least that.", default=None
    )
    entropy_control_gain: float = _toggle("Share of the way to the target that a step goes.", default=0.4)
    entropy_control_integral_gain: float = _toggle(
        "Weight of a step in the running mean of realised less predicted change, which later steps make up for.",
        default=0.1,
    )
    entropy_control_max_change: float = _toggle("Largest change asked of a step, nats per token.", default=0.02)
    entropy_control_cap: float = _toggle(
        "Longest correction, in lengths of the optimizer's step, both in its metric.", default=1.0
    )
    entropy_control_metric_floor: float = _toggle(
        "Least sqrt(v) of a coordinate in the correction's metric, in means over all coordinates.", default=0.1
    )
    entropy_control_completions: str = _toggle(
        "Completions that the entropy's gradient comes from: a 'probe' batch of its own, or the step's 'rollouts'.",
        default="probe",
        choices=list(ENTROPY_CONTROL_COMPLETIONS),
    )
    entropy_control_gradient_ema: float = _toggle(
        "Weight of the past in the running mean of the entropy's gradient from probe batches; 0: this step's alone.",
        default=0.7,
    )
    entropy_control_num_completions: int = _toggle(
        "Prompts of the control's probe batch over all processes, one completion each.", default=128
    )

    token_control: str = _toggle(
        "Entropy control by tokens: leave out the loss of random tokens within covariance bounds ('clip_cov'), hold "
        "those of the largest covariance to the sampling policy ('kl_cov', arXiv:2505.22617), or leave out 'random' "
        "ones, or 'random_positive' ones, of positive advantage.",
        default="none",
        choices=list(TOKEN_CONTROLS),
    )
    token_control_scope: str = _toggle(
        "Tokens chosen together: 'optimizer_batch', or as the authors' code does each process's 'micro_batch'.",
        default="optimizer_batch",
        choices=list(TOKEN_CONTROL_SCOPES),
    )
    token_control_fraction: float = _toggle("Share of those that it acts on; authors' clip_cov: 2e-4.", default=2e-3)
    token_control_bounds: list[float] = field(
        default_factory=lambda: [1.0, 5.0],
        metadata={"help": "clip_cov: lower and upper covariance, nats x advantage; or quantiles of it."},
    )
    token_control_quantiles: bool = _toggle("Whether token_control_bounds are quantiles, in [0, 1].")
    token_control_coefficient: float = _toggle("kl_cov: weight of |log-ratio|, per nat.", default=1.0)

    effective_sample_size_probe: bool = _toggle("Log the effective sample size of the loss weights (T3).")
    effective_sample_size_probe_every: int = _toggle("Steps between two measurements.", default=1)
    noise_scale_probe: bool = _toggle(
        "Measure the gradient noise scale (T14), (T16), in prompts, from each step's own prompt groups; the suggested "
        "range is that of prompts a step."
    )
    noise_scale_probe_every: int = _toggle("Steps between two measurements.", default=1)
    noise_scale_from: str = _toggle(
        "Read it from gradients of prompt 'groups', or from norms of 'micro_batches' (T15): cheap, larger errors.",
        default="groups",
        choices=list(NOISE_SCALE_SOURCES),
    )
    noise_scale_within_prompt: bool = _toggle(
        "Also split the noise into within and between prompts, by an extra pass with each group's halves; 4 "
        "completions a prompt or more."
    )
    fisher_probe: bool = _toggle(
        "Measure how completions act on one another: the Fisher kernel (T12), and each completion's predicted and "
        "measured change of log-probability, nats; AdamW only."
    )
    fisher_probe_every: int = _toggle("Steps between two measurements.", default=1)
    fisher_num_sequences: int = _toggle(
        "Completions of the step in the kernel, over all processes, in whole prompt groups.", default=32
    )
    fisher_sketch_dim: int = _toggle(
        "Numbers that sketch each completion's gradient (T13); 0: exact. K_ii stays exact; K_ij errs by "
        "sqrt((1 + cos^2)/dim) of sqrt(K_ii K_jj): 0.05 at 400 (800 where cosines are near 1); the whole kernel by "
        "0.05 at 400 (1 + fisher/participation_ratio); the spectrum by 0.05 at 20 fisher/effective_rank.",
        default=0,
    )
    optimizer_state_probe: bool = _toggle("Log percentiles and counts of tiny values of the optimizer's moments.")
    optimizer_state_probe_every: int = _toggle("Steps between two measurements.", default=1)

    def __post_init__(self) -> None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._check_group_size()
        self._set_accumulation(world_size)
        self._check_divisibility(world_size)
        if self.stop_at_answer and self.use_vllm:  # without vLLM the trainer stops the model's own generate
            stop = {"stop": [ANSWER_CLOSE], "include_stop_str_in_output": True}
            self.generation_kwargs: dict | None = {**stop, **(self.generation_kwargs or {})}
        super().__post_init__()
        if self.world_size != world_size:
            raise ValueError(
                f"WORLD_SIZE is {world_size} but {self.world_size} processes take part; batch sizes were checked for "
                "the former. Start with `accelerate launch` or `torchrun`."
            )
        if self.additional_steps < 0 or (self.additional_steps and not self.resume_from_checkpoint):
            raise ValueError(
                f"additional_steps is {self.additional_steps}: it counts steps beyond a checkpoint. Set "
                "resume_from_checkpoint='latest' with it, or max_steps instead of it."
            )
        self._check_loss()
        self._check_sampler()
        self._check_curriculum()
        self._check_resampling()
        self._check_evaluation()
        self._check_probes()

    def _check_group_size(self) -> None:
        if self.num_generations is None or self.num_generations < 2:
            raise ValueError(
                f"num_generations is {self.num_generations}; a group of at least 2 completions is needed, since the "
                "advantage is the reward minus its group's mean. Set num_generations to 2 or more (8 is usual)."
            )

    def _set_accumulation(self, world_size: int) -> None:
        """Derive `gradient_accumulation_steps` from `num_prompts_per_step`."""
        if self.num_prompts_per_step is None:
            return
        completions = self.num_prompts_per_step * self.num_generations
        per_micro_step = world_size * self.per_device_train_batch_size
        if completions <= 0 or completions % per_micro_step:
            fitting = _divisors_near(completions // world_size, self.per_device_train_batch_size, self.num_generations)
            multiple = math.lcm(per_micro_step, self.num_generations) // self.num_generations
            raise ValueError(
                f"num_prompts_per_step={self.num_prompts_per_step} x num_generations={self.num_generations} = "
                f"{completions} completions a step do not divide into {world_size} process(es) x "
                f"per_device_train_batch_size={self.per_device_train_batch_size}. "
                + _proposal("per_device_train_batch_size", fitting, f"num_prompts_per_step a multiple of {multiple}")
            )
        steps = completions // per_micro_step
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"num_prompts_per_step={self.num_prompts_per_step} needs gradient_accumulation_steps={steps} "
                f"({completions} completions / {world_size} process(es) / {self.per_device_train_batch_size} a "
                f"micro-batch), got {self.gradient_accumulation_steps}. Remove one of the two settings."
            )
        self.gradient_accumulation_steps: int = steps
        logger.info("num_prompts_per_step=%d: gradient_accumulation_steps set to %d", self.num_prompts_per_step, steps)

    def _check_divisibility(self, world_size: int) -> None:
        """The generation batch holds whole groups (TRL's rule, checked earlier and with a proposal)."""
        if self.generation_batch_size is not None:
            return  # TRL checks it against the rest
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        batch = world_size * self.per_device_train_batch_size * steps
        if batch % self.num_generations:
            above = -(-batch // self.num_generations) * self.num_generations
            fitting = [size for size in range(1, above + 1) if (world_size * steps * size) % self.num_generations == 0]
            nearest = sorted(fitting, key=lambda size: abs(size - self.per_device_train_batch_size))[:2]
            raise ValueError(
                f"{world_size} process(es) x per_device_train_batch_size={self.per_device_train_batch_size} x {steps} "
                f"step(s) = {batch} completions hold no whole number of groups of num_generations="
                f"{self.num_generations}. "
                + _proposal("per_device_train_batch_size", sorted(nearest), f"num_generations a divisor of {batch}")
            )

    def _check_loss(self) -> None:
        if self.length_normalizer not in LENGTH_NORMALIZERS:
            raise ValueError(f"length_normalizer is {self.length_normalizer!r}; use one of {LENGTH_NORMALIZERS}.")
        if self.length_normalizer == "group_max" and self.loss_type != "dr_grpo":
            raise ValueError(
                f"length_normalizer='group_max' rescales the Dr-GRPO loss (T2) and means nothing for loss_type="
                f"{self.loss_type!r}. Set loss_type='dr_grpo' or length_normalizer='max_completion_length'."
            )
        if self.kl_every < 0:
            raise ValueError(f"kl_every is {self.kl_every}; use 0 (off) or a number of steps.")

    def _check_evaluation(self) -> None:
        for name, choices in (("evaluate_checkpoints", EVALUATIONS), ("evaluate_profile", EVALUATION_PROFILES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(choices)}.")
        if self.evaluate_checkpoints != "none" and self.save_strategy == "no":
            raise ValueError(
                f"evaluate_checkpoints={self.evaluate_checkpoints!r} evaluates what is saved, and save_strategy='no' "
                "saves nothing. Set save_strategy='steps' and save_steps, or evaluate_checkpoints='none'."
            )

    def _check_sampler(self) -> None:
        if self.use_transformers_continuous_batching and self.bf16:
            raise ValueError(
                "use_transformers_continuous_batching=True with bf16=True casts the trained float32 weights to "
                "bfloat16 in place at the first rollout; at small learning rates almost none of them moves after "
                "that. Set use_transformers_continuous_batching=False or bf16=False."
            )
        if self.stop_at_answer and self.mask_truncated_completions:
            raise ValueError(
                "stop_at_answer=True ends completions without an end token, and mask_truncated_completions=True would "
                "mask them all as truncated. Turn one of the two off."
            )


def _divisors_near(total: int, wanted: int, group: int, num: int = 2) -> list[int]:
    """Divisors of `total` nearest to `wanted`, those that hold whole groups first."""
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    whole = [size for size in divisors if size % group == 0]
    return sorted(sorted(whole or divisors, key=lambda size: abs(size - wanted))[:num])


def _proposal(field_name: str, values: list[int], otherwise: str) -> str:
    if not values:
        return f"Make {otherwise}."
    return f"Try {field_name}={' or '.join(map(str, values))}, or make {otherwise}."
