"""Short trainings from a checkpoint with several numbers of prompts a step, kept on disk as each of them ends."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.config.setting import default_of, own_settings
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.redraws import ROWS_PER_CHUNK, digest_of
from trl_entropy.experiments.state import KEPT_SETTINGS, Policy, build_trainer
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.durable import replace_text
from trl_entropy.runs.strict_json import Row, from_line, to_line
from trl_entropy.tasks.registry import task_of
from trl_entropy.trainer.dr_grpo import DrGRPOTrainer
from trl_entropy.trainer.fingerprints import data_fingerprint

_BRANCH = 8  # second part of a seed
_NOISE_SEED = 999  # of the training at learning rate 0, beyond those of the branches
_OWN_SEEDS = 10_000  # branches do not draw the prompts in the order in which the run did
# How each rule multiplies the learning rate where the number of prompts is multiplied by k.
RULES: Mapping[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "linear": lambda k: k,
    "constant": lambda k: 1.0,
}
# Settings that a branch has of its own, or that say how a step is divided over passes and processes.
_OF_A_BRANCH = ("num_prompts_per_step", "additional_steps")


class Branch(NamedTuple):
    """One training: prompts of a step, its learning rate, which seed."""

    num_prompts: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Plan:
    """
    Which branches are trained.

    Attributes:
        num_steps: steps of each.
        num_completions: fresh completions of held-out problems, one of each, from which the reward at the checkpoint
            and after a branch is estimated. Both ends, and all branches of a seed, share problems and random numbers.
        noise_steps: steps at learning rate 0, with the run's number of prompts, that measure the noise scale; 0: none.
        seed: of all draws.
    """

    branches: tuple[Branch, ...]
    num_steps: int
    num_completions: int
    noise_steps: int
    seed: int

    @property
    def seeds(self) -> list[int]:
        return sorted({branch.seed for branch in self.branches})


class Branches:
    """
    The trainings of a plan from one checkpoint, each made at most once: what is found on disk is not made again.

    A branch starts with the checkpoint's weights in float32 and its optimizer's moments, as a resumed run does, keeps
    its learning rate, and trains by the run's rewards, sampler and optimizer settings in one process. Its prompts are
    drawn in an order of its seed's own; with more prompts a step the same order is read faster.
    """

    def __init__(self, checkpoint: Checkpoint, output: Path, plan: Plan) -> None:
        self.checkpoint, self.plan, self._scratch = checkpoint, plan, output
        self.moments = moments_of(checkpoint)
        policy = Policy(checkpoint, output, held_out=True)
        fingerprints = [data_fingerprint(policy.trainer.train_dataset), data_fingerprint(policy.trainer.eval_dataset)]
        self.folder = output / f"branches-{digest_of(checkpoint, fingerprints, plan.seed)}"
        self._start = policy

    def rewards_at_start(self, seed: int) -> list[float]:
        """The rewards of the fresh completions at the checkpoint, nan where there is none."""
        name = f"start-seed{seed}-{self.plan.num_completions}"
        return self._kept(name, lambda: {"rewards": self._rewards(self._start, seed)})["rewards"]

    def trained(self, branch: Branch) -> Row:
        """`rewards` of the fresh completions after the branch, and of its `training`, a mean for each step."""
        return self._kept(self.name_of(branch), lambda: self._train(branch))

    def noise(self) -> Row:
        """What the noise scale probe logs of all steps at learning rate 0, as of the last of them."""
        plan = self.plan
        if not plan.noise_steps:
            return {}

        def measure() -> Row:
            branch = Branch(self.checkpoint.num_prompts_per_step, 0.0, _NOISE_SEED)
            with self._trainer(branch, plan.noise_steps, noise_scale_probe=True) as (trainer, folder):
                _train_to_the_end(trainer)
                last = RunDirectory(folder).metrics()[-1]
            return {key: value for key, value in last.items() if key.startswith("noise_scale/")}

        return self._kept(f"noise-{plan.noise_steps}", measure)

    def left(self) -> list[Branch]:
        """The branches that are not on disk yet."""
        return [branch for branch in self.plan.branches if not self._path(self.name_of(branch)).exists()]

    def name_of(self, branch: Branch) -> str:
        prompts, rate, seed = branch
        return f"prompts{prompts}-lr{rate:.9g}-seed{seed}-steps{self.plan.num_steps}-{self.plan.num_completions}"

    # ---- one of them

    def _train(self, branch: Branch) -> Row:
        with self._trainer(branch, self.plan.num_steps) as (trainer, folder):
            _train_to_the_end(trainer)
            training = [row["reward"] for row in RunDirectory(folder).metrics() if "reward" in row]
            after = Policy(self.checkpoint, folder, held_out=True, trainer=trainer)
            return {"training": training, "rewards": self._rewards(after, branch.seed)}

    def _rewards(self, policy: Policy, seed: int) -> list[float]:
        policy.trainer.model.train()
        found: list[float] = []
        for start in range(0, self.plan.num_completions, ROWS_PER_CHUNK):
            seeds, size = (
                (self.plan.seed, _BRANCH, seed, start),
                min(ROWS_PER_CHUNK, self.plan.num_completions - start),
            )
            batch = policy.draw_rollouts(policy.draw_problems(size, seeds), 1, seeds)
            found += batch["rewards"].double().tolist()
        return found

    def _trainer(self, branch: Branch, num_steps: int, **changes: Any) -> _ScratchTrainer:
        return _ScratchTrainer(self, branch, num_steps, changes)

    # ---- on disk

    def _kept(self, name: str, compute: Callable[[], Row]) -> Row:
        path = self._path(name)
        if not path.exists():
            start = time.perf_counter()
            value = compute()
            replace_text(path, to_line(value | {"seconds": time.perf_counter() - start}) + "\n")
        return from_line(path.read_text(encoding="utf-8"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class _ScratchTrainer:
    """A trainer at the checkpoint, and a run directory for it that is deleted at the end of the block."""

    def __init__(self, branches: Branches, branch: Branch, num_steps: int, changes: Mapping[str, Any]) -> None:
        self.branches, self.branch = branches, branch
        self.settings = dict(changes) | {
            "max_steps": num_steps, "learning_rate": branch.learning_rate, "lr_scheduler_type": "constant",
            "save_strategy": "no", "seed": _OWN_SEEDS * (1 + branches.plan.seed) + branch.seed, "entropy_probe": False,
            "kl_every": 0, **division(branches.checkpoint, branch.num_prompts),
        }  # fmt: skip

    def __enter__(self) -> tuple[DrGRPOTrainer, Path]:
        self._folder = tempfile.TemporaryDirectory(prefix="branch-", dir=self.branches._scratch)
        path = Path(self._folder.name)
        trainer = build_trainer(self.branches.checkpoint, path, **self.settings)
        trainer.add_callback(_FromMoments(self.branches.moments, self.branch.learning_rate))
        return trainer, path

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()


def _train_to_the_end(trainer: DrGRPOTrainer) -> None:
    """Train; ends the command if a signal stopped it before the last step, so that no part of a branch is kept."""
    trainer.train()
    if trainer.state.global_step < trainer.args.max_steps:
        sys.exit("Stopped inside a branch. Those that were finished stay on disk, and the same command goes on.")


class _FromMoments(TrainerCallback):
    """Gives the optimizer the checkpoint's moments before the first step, and the branch's learning rate."""

    def __init__(self, moments: dict[str, Any], learning_rate: float) -> None:
        self.moments, self.learning_rate = moments, learning_rate

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        optimizer.load_state_dict(deepcopy(self.moments))  # it takes the tensors as its own, and steps change them
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.learning_rate


def moments_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    The state of the checkpoint's optimizer.

    Raises:
        ValueError: when its learning rate is 0.
    """
    moments = torch.load(checkpoint.path / "optimizer.pt", weights_only=True, map_location="cpu")
    if not any(group["lr"] for group in moments["param_groups"]):
        raise ValueError(
            f"the learning rate after {checkpoint.path} is 0, as at the end of the run's schedule, so that no rule "
            "makes one of it; take an earlier checkpoint, or train with lr_scheduler_type=constant"
        )
    return moments


def learning_rate_of(moments: Mapping[str, Any]) -> float:
    """The learning rate of the optimizer's next step."""
    return max(float(group["lr"]) for group in moments["param_groups"])


def division(checkpoint: Checkpoint, num_prompts: int) -> dict[str, int]:
    """`num_prompts_per_step`, and the largest micro-batch of whole groups that is not larger than the run's."""
    group = checkpoint.config["num_generations"]
    most = max(1, checkpoint.config["per_device_train_batch_size"] // group)
    groups = max(size for size in range(1, num_prompts + 1) if num_prompts % size == 0 and size <= most)
    return {"num_prompts_per_step": num_prompts, "per_device_train_batch_size": groups * group}


def check_run(checkpoint: Checkpoint, num_prompts: Iterable[int]) -> None:
    """
    Check that short trainings can do again what the run did, and that it has enough problems.

    Raises:
        ValueError: says what they would leave out.
    """
    config, own = checkpoint.config, own_settings(DrGRPOConfig)
    for name, setting in own.items():
        left_out = setting.changes_training and name not in (*KEPT_SETTINGS, *_OF_A_BRANCH) and name in config
        values = setting.changes_training
        off = setting.probe and setting.probe != name and config.get(setting.probe) in (None, False, "none", "report")
        if not left_out or off or (isinstance(values, tuple) and config[name] not in values):
            continue
        if config[name] != default_of(DrGRPOConfig, name):
            raise ValueError(
                f"{checkpoint.path.parent} trained with {name}={config[name]!r}, which a branch would not; branches "
                "are made of runs without it"
            )
    _check_one_step_a_generation(checkpoint)
    most, available = max(num_prompts), task_of(checkpoint.task).num_problems(checkpoint.task)
    if 0 < available < most:
        raise ValueError(f"--prompts asks for {most} prompts a step, and the run has {available} problems; lower it")


def _check_one_step_a_generation(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    accumulation = config["gradient_accumulation_steps"]
    several = (config.get("steps_per_generation") or accumulation) != accumulation
    if several or config.get("num_iterations", 1) != 1:
        raise ValueError(
            f"{checkpoint.path.parent} made several steps of each generation (num_iterations, steps_per_generation); "
            "what a batch gains is asked of runs that make one"
        )
