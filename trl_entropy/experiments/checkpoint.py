"""A checkpoint of a run and the run's settings, checked before the model is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trl_entropy.models.embedded import VOCAB_SIZE
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks.arguments import TaskArguments

_REQUIRED = {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "mask_truncated_completions": False}


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint folder and the settings of the run that wrote it; the model is not loaded.

    Attributes:
        path: `RUN/checkpoint-N`.
        config: the contents of `RUN/config.yaml`.
        task: what the run was trained on.
        num_prompts_per_step: prompts in each of its optimizer steps.
    """

    path: Path
    config: dict[str, Any]
    task: TaskArguments
    num_prompts_per_step: int

    @property
    def step(self) -> str:
        return self.path.name.removeprefix("checkpoint-")

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """
        Read the settings, and check that the folder holds everything that an experiment needs.

        Raises:
            ValueError: says what is missing, or in what the run differs from one on the embedded task.
        """
        import yaml

        path = path.resolve()
        _check_files(path)
        config = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
        environment_path = path.parent / "environment.json"
        environment = json.loads(environment_path.read_text(encoding="utf-8")) if environment_path.exists() else {}
        task = _task(config, environment, path.parent)
        if task.task != "word_problems":
            raise ValueError(
                f"{path.parent} was trained on {task.task}; experiments know only the embedded task, word_problems"
            )
        if own := task.own_functions():
            raise ValueError(
                f"{path.parent} was trained with functions of one's own, {', '.join(own)}, which an experiment does "
                "not import from a run directory; experiments know the rewards of this package and of TRL alone"
            )
        if (vocab_size := config.get("model_config", {}).get("vocab_size")) != VOCAB_SIZE:
            raise ValueError(
                f"{path.parent} trained a model of {vocab_size} token embeddings; experiments know only the embedded "
                f"model, which has {VOCAB_SIZE}"
            )
        for name, needed in _REQUIRED.items():
            if config.get(name, needed) != needed:
                raise ValueError(
                    f"{path.parent} ran with {name}={config[name]!r}; the loss (T1), (T2) needs {name}={needed!r}"
                )
        completions = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
        completions *= environment.get("num_processes", 1)
        return cls(path, config, task, completions // config["num_generations"])

    @classmethod
    def last_of(cls, run: Path) -> Checkpoint:
        """
        The checkpoint of a run's last logged step.

        Raises:
            ValueError: if there is none.
        """
        last = max((row["step"] for row in RunDirectory(run).metrics()), default=0)
        path = run / f"checkpoint-{last}"
        if not path.is_dir():
            raise ValueError(f"{run} has no checkpoint of its last step, {last}; train with save_strategy=steps")
        return cls.read(path)

    def at_start(self) -> Checkpoint:
        """The policy that the run began with, under the run's settings; it has no optimizer state."""
        from trl_entropy.models.warm_start import warm_start

        return replace(self, path=warm_start(seed=self.config["seed"]))


def _check_files(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder; give a RUN/checkpoint-N (training writes them with save_strategy=steps)"
        )
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path} holds a LoRA adapter; only checkpoints of the full embedded model are supported")
    for name, advice in {
        "model.safetensors": "is it a checkpoint of the trainer?",
        "optimizer.pt": "train with save_only_model=False, and without DeepSpeed, which stores its state elsewhere",
    }.items():
        if not (path / name).exists():
            raise ValueError(f"{path} has no {name}; {advice}")
    if not (path.parent / "config.yaml").exists():
        raise ValueError(f"{path.parent} has no config.yaml; the checkpoint must be in the directory of its run")


def _task(config: dict[str, Any], environment: dict[str, Any], run: Path) -> TaskArguments:
    """What the run was trained on: from `config.yaml`, else from the command in `environment.json` that started it."""
    names = [field.name for field in fields(TaskArguments)]
    if "task" in config:
        return TaskArguments(**{name: config[name] for name in names if name in config})
    command = environment.get("command", [])
    if not command or not any(word in ("train", "train.py") for word in command[:2]):
        raise ValueError(
            f"{run} does not say what it was trained on: config.yaml has no `task`, and environment.json no command "
            "of trl_entropy.train. Only runs on the embedded task are supported; write `task: word_problems` (and "
            "num_train_problems, reward_funcs) into config.yaml if this is one."
        )
    from trl import TrlParser

    arguments = command[2:] if command[1:2] == ["train"] else command[1:]
    try:
        return TrlParser([TaskArguments]).parse_args_and_config(arguments, return_remaining_strings=True)[0]
    except OSError as error:
        raise ValueError(
            f"the config file of {run} is gone ({error}), and with it what the run was trained on; start from the "
            "directory that the run was started from, or write `task: word_problems` into its config.yaml."
        ) from error
