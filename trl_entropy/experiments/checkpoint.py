"""A checkpoint of a run and the run's settings, checked before the model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from trl_entropy.models.loading import EMBEDDED_MODEL, EMBEDDED_MODELS
from trl_entropy.runs.checkpoints import SEAL
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.completion_functions import import_functions
from trl_entropy.tasks.named import files_of
from trl_entropy.tasks.registry import task_of
from trl_entropy.tasks.script import settings_of_script

# fmt: off
_REQUIRED = {
    "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "mask_truncated_completions": False,
    "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False,
}
# fmt: on


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint folder and the settings of the run that wrote it; the model is not loaded.

    Attributes:
        path: `RUN/checkpoint-N`.
        config: the contents of `RUN/config.yaml`.
        task: what the run was trained on.
        num_prompts_per_step: prompts in each of its optimizer steps.
        function_files: the user's own files that are imported, with their hashes as they are now.
        warning: what has changed in these files since the run began; None if nothing has.
    """

    path: Path
    config: dict[str, Any]
    task: TaskArguments
    num_prompts_per_step: int
    function_files: Mapping[str, str]
    warning: str | None = None

    @property
    def step(self) -> str:
        return self.path.name.removeprefix("checkpoint-")

    @classmethod
    def read(cls, path: Path, may_import: bool = False, trainer_factory: str | None = None) -> Checkpoint:
        """
        Read the settings, and check that the folder holds everything that an experiment needs.

        Args:
            may_import: whether functions of the user's own, with which the run was trained, may be imported.
            trainer_factory: name of a function that makes the trainer of a run of a script; its datasets and functions
                are the task then.

        Raises:
            ValueError: says what is missing, or what of the run an experiment cannot do again.
        """
        import yaml

        path = path.resolve()
        _check_files(path)
        config = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
        if trainer_factory is not None:
            config = settings_of_script(config, trainer_factory)
        environment_path = path.parent / "environment.json"
        environment = json.loads(environment_path.read_text(encoding="utf-8")) if environment_path.exists() else {}
        task = _task(config, environment, path.parent)
        for name, needed in _REQUIRED.items():
            if config.get(name, needed) != needed:
                raise ValueError(
                    f"{path.parent} ran with {name}={config[name]!r}; the loss (T1), (T2) needs {name}={needed!r}"
                )
        completions = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
        completions *= environment.get("num_processes", 1)
        changed = import_functions(
            path.parent, task, config.get("function_files") or {}, may_import or trainer_factory is not None
        )
        task_of(task).episodes(task)
        files = files_of(task.own_functions())
        return cls(path, config, task, completions // config["num_generations"], files, changed)

    @classmethod
    def last_of(cls, run: Path, may_import: bool = False, trainer_factory: str | None = None) -> Checkpoint:
        """
        The checkpoint of a run's last logged step; the arguments are those of [`Checkpoint.read`].

        Raises:
            ValueError: if there is none.
        """
        last = max((row["step"] for row in RunDirectory(run).metrics()), default=0)
        path = run / f"checkpoint-{last}"
        if not path.is_dir():
            raise ValueError(f"{run} has no checkpoint of its last step, {last}; train with save_strategy=steps")
        return cls.read(path, may_import, trainer_factory)

    def at_start(self) -> Checkpoint:
        """
        The policy that the run began with, under the run's settings; it has no optimizer state.

        Raises:
            ValueError: when it was made in memory by a script.
        """
        from trl_entropy.models.warm_start import warm_start

        name = str(self.config.get("model_name_or_path", EMBEDDED_MODEL))
        if not name:
            raise ValueError(
                f"the policy that {self.path.parent} began with was made in memory, so that it cannot be loaded; give "
                "the trainer a model by name or folder"
            )
        is_embedded = name in EMBEDDED_MODELS
        return replace(self, path=warm_start(seed=self.config["seed"], name=name) if is_embedded else Path(name))

    def data_fingerprint(self) -> str | None:
        """That of the problems that the run was trained on; None if the checkpoint does not say it."""
        seal = self.path / SEAL
        return json.loads(seal.read_text(encoding="utf-8")).get("data") if seal.exists() else None

    def num_parameters(self) -> int:
        """Of the model, from the header of its file."""
        with safe_open(self.path / "model.safetensors", "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _check_files(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder; give a RUN/checkpoint-N (training writes them with save_strategy=steps)"
        )
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path} holds a LoRA adapter; an experiment reads a whole model and its optimizer's moments")
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
            "of trl_entropy.train. Name the function that makes the trainer of a script, --trainer_factory "
            "path/to/script.py:function; or write `task: word_problems` (and num_train_problems, reward_funcs), or "
            "`task: dataset` with dataset_name and reward_funcs, into config.yaml if this is one."
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
