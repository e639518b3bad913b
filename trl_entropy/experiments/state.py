"""A checkpoint as a fixed state: policy, sampler, and the one step that AdamW would make from a fresh batch."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer
from trl.trainer.utils import split_tensor_dict

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.engine import UpdateContext
from trl_entropy.engine.optimizer_step import predicted_update
from trl_entropy.engine.plain import PlainEngine
from trl_entropy.estimators.attribution.shares import on_policy_coefficients
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.gradients.scores import Params, TokenScores, score
from trl_entropy.rollouts.batch import RolloutBatch, TrainingBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.drawing import own_randomness
from trl_entropy.tasks.completion_functions import reward_functions, tried
from trl_entropy.tasks.registry import Wanted, load_task, task_of
from trl_entropy.trainer.dr_grpo import DrGRPOTrainer
from trl_entropy.trainer.fingerprints import data_fingerprint

# Settings of the run that decide how it samples and how it steps. Logging, saving and probes are left out.
# fmt: off
KEPT_SETTINGS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "beta", "chat_template_kwargs", "generation_kwargs", "learning_rate",
    "length_normalizer", "loss_type", "max_completion_length", "max_grad_norm", "max_tool_calling_iterations", "min_p",
    "multi_objective_aggregation", "num_generations", "optim", "optim_args", "repetition_penalty", "reward_weights",
    "scale_rewards", "seed", "stop_at_answer", "temperature", "top_k", "top_p", "use_cpu", "weight_decay",
)
# fmt: on


class Policy:
    """
    The policy of a checkpoint and its sampler, with the run's data, rewards and settings. The model is loaded, and
    never trained.

    Args:
        checkpoint: what to load.
        output_dir: where the trainer may write. Nothing is written into the run's own directory.
        held_out: draw from held-out problems, which no run trains on, in place of the training problems.
        trainer: of [`build_trainer`], whose policy it is then; None: one with the checkpoint's policy is made.
    """

    def __init__(
        self, checkpoint: Checkpoint, output_dir: Path, held_out: bool = False, trainer: DrGRPOTrainer | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.trainer = trainer or build_trainer(checkpoint, output_dir)
        self.args, self.model = self.trainer.args, self.trainer.model
        self.problems = self.trainer.eval_dataset if held_out else self.trainer.train_dataset
        self.num_problems = len(self.problems)

    def on_held_out(self) -> Policy:
        """The same policy, which draws from held-out problems."""
        other = copy(self)
        other.problems = self.trainer.eval_dataset
        other.num_problems = len(other.problems)
        return other

    def draw_problems(self, num: int, seed: tuple[int, ...]) -> np.ndarray:
        """Row numbers of `num` problems, drawn independently with replacement."""
        return np.random.default_rng(seed).integers(self.num_problems, size=num)

    def draw(self, problems: np.ndarray, seed: tuple[int, ...]) -> Completions:
        """One completion of each problem, given by its row number; its reward is not kept."""
        if self.trainer.environment_factories is not None:  # each begins an episode of the problem's row
            return Completions.of(RolloutBatch.from_micro_batches([self.draw_rollouts(problems, 1, seed)]))
        prompts = [self.problems[int(row)]["prompt"] for row in problems]
        return self.trainer.probe_batches.draw_completions(prompts, seed)

    def draw_rollouts(self, problems: np.ndarray, num_generations: int, seed: tuple[int, ...]) -> TrainingBatch:
        """TRL's batch: a group of completions with rewards for each problem, one group after the other."""
        inputs = [self.problems[int(row)] for row in problems.repeat(num_generations)]
        self.trainer.num_generations = num_generations
        with own_randomness(seed, self.trainer.accelerator.device):
            return self.trainer._generate_and_score_completions(inputs)


class FixedState(Policy):
    """
    A policy, and the one step that the run's AdamW would make from it on a fresh batch. The optimizer is loaded too.

    Args:
        checkpoint, output_dir: as for [`Policy`].
        seed: of the update batch.

    Attributes:
        context: the `UpdateContext` before that step.
        rollouts: U, the completions that make the step, drawn on-policy for the loss (T2).
        before, after, update: theta before and after the step, and their difference in float32, by parameter name.
        data_fingerprints: of the training problems and of the held-out ones.
        warning: that the problems are not those that the run was trained on; None if they are, as far as is known.
    """

    def __init__(self, checkpoint: Checkpoint, output_dir: Path, seed: int) -> None:
        moments = torch.load(checkpoint.path / "optimizer.pt", weights_only=True, map_location="cpu")
        if not any(group["lr"] for group in moments["param_groups"]):
            raise ValueError(
                f"the learning rate after {checkpoint.path} is 0, as at the end of the run's schedule, so that the "
                "next step changes nothing; take an earlier checkpoint, or train with lr_scheduler_type=constant"
            )
        super().__init__(checkpoint, output_dir)
        self.data_fingerprints = tuple(map(data_fingerprint, (self.trainer.train_dataset, self.trainer.eval_dataset)))
        trained_on = checkpoint.data_fingerprint()
        self.warning = None
        if trained_on not in (None, self.data_fingerprints[0]):
            self.warning = f"the problems are not those that {checkpoint.path.parent} was trained on"
        optimizer = self.trainer.create_optimizer()
        optimizer.load_state_dict(moments)
        self._take_gradient(checkpoint.num_prompts_per_step, (seed, 0))
        self.engine = PlainEngine(self.trainer.accelerator, self.model, optimizer, self.args.max_grad_norm)
        self.context = UpdateContext(self.engine)
        planned = predicted_update(self.context)
        self.before = self.context.params_before
        self.after = {name: value + planned[name] for name, value in self.before.items()}
        # The difference after rounding to float32, so that the direction leads exactly from `before` to `after`.
        self.update = {name: self.after[name] - value for name, value in self.before.items()}

    @property
    def loss_coefficients(self) -> Float[Tensor, "B T"]:
        """alpha_ik of (T9) for the completions of U."""
        batch = self.rollouts
        return on_policy_coefficients(
            batch.advantages, batch.loss_mask, len(batch.rewards), self.args.max_completion_length
        )

    def score(
        self,
        completions: Completions,
        batch_size: int,
        params: Params | None = None,
        direction: Params | None = None,
        order: int = 0,
    ) -> TokenScores:
        """Scores in float32 with the parameters `params`, by default those before the step; see [`scores.score`]."""
        params = self.before if params is None else params
        with self.engine.scoring_model(params) as model:
            return score(model, completions, self.args.temperature, batch_size, params, direction, order)

    def _take_gradient(self, num_prompts: int, seed: tuple[int, ...]) -> None:
        """Draw U, its problems without replacement, and leave the gradient of TRL's own loss in `.grad`."""
        problems = np.random.default_rng(seed).permutation(self.num_problems)[:num_prompts]
        batch = self.draw_rollouts(problems, self.args.num_generations, seed)
        self.trainer.current_gradient_accumulation_steps = num_prompts
        groups = split_tensor_dict(batch, num_prompts)
        self.rollouts = RolloutBatch.from_micro_batches(groups)
        for group in groups:
            self.trainer.compute_loss(self.model, group).backward()


def build_trainer(checkpoint: Checkpoint, output_dir: Path, **changes: Any) -> DrGRPOTrainer:
    """
    A trainer with the checkpoint's weights in float32 and the run's data, rewards and sampler; nothing is trained yet.

    Args:
        changes: settings other than the run's. A seed does not change which problems there are.
    """
    settings = {name: checkpoint.config[name] for name in KEPT_SETTINGS if name in checkpoint.config}
    fixed = {
        "per_device_train_batch_size": settings["num_generations"], "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "disable_dropout": True, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    args = DrGRPOConfig(output_dir=str(output_dir), **fixed | settings | changes)
    of_run: dict[str, Any] = {"seed": args.seed} | settings
    if narrowed := args.truncated_sampling():
        raise ValueError(
            f"{checkpoint.path.parent} sampled with {narrowed}, but the estimators need the full distribution"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, padding_side="left", truncation_side="left")
    train_dataset, _ = load_task(checkpoint.task, tokenizer, of_run["seed"])
    eval_dataset = task_of(checkpoint.task).load(checkpoint.task, Wanted("test", None, tokenizer))
    functions, episodes = reward_functions(checkpoint.task), task_of(checkpoint.task).episodes(checkpoint.task)
    tried(functions, list(train_dataset.select(range(min(3, len(train_dataset))))))
    trainer = DrGRPOTrainer(
        model=str(checkpoint.path),
        reward_funcs=[one.function for one in functions],
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        tools=episodes.tools or None,
        environment_factory=episodes.environment_factory,
    )
    trainer.model.train()  # in training mode TRL uses the group size and the loss of training
    return trainer
