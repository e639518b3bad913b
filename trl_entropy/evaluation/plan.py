"""What `trl-entropy evaluate` does: which checkpoints, on how many problems, drawn how. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trl_entropy.models.loading import EMBEDDED_MODEL
from trl_entropy.runs.checkpoints import checkpoints_of
from trl_entropy.runs.directory import RunDirectory

ALL, LATEST = "all", "latest"
TRANSFORMERS, VLLM = "transformers", "vllm"
_TASK_FIELDS = ("task", "dataset_path", "num_train_problems", "num_eval_problems", "max_prompt_length", "reward_funcs")
_WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")


@dataclass(frozen=True)
class Profile:
    """
    How much is drawn.

    Attributes:
        num_problems: of the held-out problems, at most; None for all of them.
        num_samples: samples a problem, beside one greedy completion.
        timeout: seconds for a checkpoint.
    """

    num_problems: int | None
    num_samples: int
    timeout: float


PROFILES = {"quick": Profile(64, 8, 1800.0), "full": Profile(None, 16, 6 * 3600.0)}


@dataclass(frozen=True)
class Settings:
    """
    All that decides the numbers of an evaluation beside the weights.

    Attributes:
        num_problems: held-out problems, at most; None for all.
        subset_frac: their share, in place of `num_problems`; None when that is used.
        num_samples: samples a problem, beside one greedy completion.
        seed: of the choice of problems and of the samples; the same for all checkpoints.
        max_completion_length: tokens.
        sampling: temperature, top_k, top_p and the like, as the run trained with them.
        stop_at_answer: end completions at the closing answer tag, as the run did.
        task: the run's task, data and reward functions.
        model_seed: the seed of the embedded model's warm start.
        dtype: of the weights while they are evaluated.
        sampler: what draws, `"transformers"` or `"vllm"`; the scores are the model's own.
    """

    num_problems: int | None
    subset_frac: float | None
    num_samples: int
    seed: int
    max_completion_length: int
    sampling: dict[str, Any]
    stop_at_answer: bool
    task: dict[str, Any]
    model_seed: int
    dtype: str
    sampler: str = TRANSFORMERS

    def num_of(self, num_held_out: int) -> int:
        """How many of the held-out problems."""
        if self.subset_frac is not None:
            return max(1, round(self.subset_frac * num_held_out))
        return num_held_out if self.num_problems is None else min(self.num_problems, num_held_out)


@dataclass(frozen=True)
class Target:
    """
    One policy to evaluate.

    Attributes:
        step: optimizer steps that it has had.
        model: a checkpoint folder; for step 0 the name or folder that the run started from, or `"embedded"`.
    """

    step: int
    model: str

    def fingerprint(self) -> str:
        """A hash of the weights' files, or the name of a model that is no folder: another policy has another one."""
        folder, digest = Path(self.model), hashlib.sha256()
        if not folder.is_dir():
            return self.model
        for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
            with open(path, "rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """One checkpoint's evaluation, as it is handed to a process of its own."""

    target: Target
    settings: Settings
    output: str
    batch_size: int
    device: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "target": Target(**values["target"]), "settings": Settings(**values["settings"])})


def read_config(run: Path) -> dict[str, Any]:
    """
    The run's `config.yaml`.

    Raises:
        ValueError: when it is missing or does not say what the run was trained on.
    """
    import yaml

    path = run / "config.yaml"
    if not path.exists():
        raise ValueError(f"{run} has no config.yaml; is it a run directory?")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "task" not in config:
        raise ValueError(
            f"{path} does not say what the run was trained on. Write `task: word_problems` or `task: gsm8k` (and "
            "dataset_path, reward_funcs, model_name_or_path) into it if it was one of these."
        )
    return config


def settings_of(config: Mapping[str, Any], profile: Profile, **chosen: Any) -> Settings:
    """The run's own sampler and task; `chosen` replaces fields where it is not None."""
    sampling = {
        "temperature": config.get("temperature", 1.0),
        "top_k": config.get("top_k", 0),
        "top_p": config.get("top_p", 1.0),
        "min_p": config.get("min_p"),
        "repetition_penalty": config.get("repetition_penalty", 1.0),
        **(config.get("generation_kwargs") or {}),
    }
    settings = Settings(
        num_problems=profile.num_problems,
        subset_frac=None,
        num_samples=profile.num_samples,
        seed=0,
        max_completion_length=config["max_completion_length"],
        sampling=sampling,
        stop_at_answer=bool(config.get("stop_at_answer")),
        task={name: config[name] for name in _TASK_FIELDS if name in config},
        model_seed=config["seed"],
        dtype="bfloat16" if config.get("bf16") else "float32",
    )
    chosen = {name: value for name, value in chosen.items() if value is not None}
    settings = replace(settings, **chosen)
    return replace(settings, num_problems=None) if settings.subset_frac is not None else settings


def targets_of(run: Path, config: Mapping[str, Any], which: str) -> list[Target]:
    """
    The policies that `--checkpoints` names, in order of step; `all` begins with the start policy, step 0.

    Raises:
        ValueError: for a step that has no checkpoint, saying which there are.
    """
    start = Target(0, str(config.get("model_name_or_path", EMBEDDED_MODEL)))
    found = {0: start}
    for path in reversed(checkpoints_of(run)):
        step = int(path.name.split("-")[1])
        found[step] = Target(step, str(path))
    if which == ALL:
        return list(found.values())
    if which == LATEST:
        return [found[max(found)]]
    try:
        steps = sorted({int(step) for step in which.split(",")})
    except ValueError:
        raise ValueError(f"--checkpoints is {which!r}; use all, latest, or steps such as 20,40") from None
    if missing := [step for step in steps if step not in found]:
        have = ", ".join(map(str, found))
        raise ValueError(f"{run} has no checkpoint of step {', '.join(map(str, missing))}; it has {have}")
    return [found[step] for step in steps]


def is_done(run: Path, target: Target, settings: Settings) -> bool:
    """Whether these weights were evaluated under these settings."""
    summary = RunDirectory(run).checkpoint_summary(target.step)
    if summary is None or summary["settings"] != json.loads(json.dumps(asdict(settings))):
        return False
    return summary["fingerprint"] == target.fingerprint()
