"""The plan of an evaluation: which checkpoints, how many problems, and how to sample."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trl_entropy.models.loading import EMBEDDED_MODEL
from trl_entropy.runs.checkpoints import checkpoints_of
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.strict_json import Json

ALL, LATEST = "all", "latest"
TRANSFORMERS, VLLM = "transformers", "vllm"
_TASK_FIELDS = ("task", "dataset_path", "num_train_problems", "num_eval_problems", "max_prompt_length", "reward_funcs")
_WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")


@dataclass(frozen=True)
class Profile:
    """
    The size of an evaluation.

    Attributes:
        num_problems: held-out problems, at most; None for all of them.
        num_samples: samples per problem, in addition to one greedy completion.
        timeout: seconds per checkpoint.
    """

    num_problems: int | None
    num_samples: int
    timeout: float


PROFILES = {"quick": Profile(64, 8, 1800.0), "full": Profile(None, 16, 6 * 3600.0)}


@dataclass(frozen=True)
class Settings:
    """
    Everything besides the weights that determines the numbers of an evaluation.

    Attributes:
        num_problems: held-out problems, at most; None for all of them.
        subset_frac: fraction of the held-out problems, used instead of `num_problems`; None to use `num_problems`.
        num_samples: samples per problem, in addition to one greedy completion.
        seed: seed of the choice of problems and of the samples, the same for all checkpoints.
        max_completion_length: in tokens.
        sampling: temperature, top_k, top_p and so on, the same as in training.
        stop_at_answer: whether completions end at the closing answer tag, as in training.
        task: the task of the run, its data and its reward functions.
        model_seed: seed of the embedded model's warm start.
        dtype: dtype of the weights during the evaluation.
        sampler: what generates the completions, `"transformers"` or `"vllm"`. Either way the model scores them itself.
    """

    num_problems: int | None
    subset_frac: float | None
    num_samples: int
    seed: int
    max_completion_length: int
    sampling: Json
    stop_at_answer: bool
    task: Json
    model_seed: int
    dtype: str
    sampler: str = TRANSFORMERS

    def num_of(self, num_held_out: int) -> int:
        """The number of problems to take out of `num_held_out`."""
        if self.subset_frac is not None:
            return max(1, round(self.subset_frac * num_held_out))
        return num_held_out if self.num_problems is None else min(self.num_problems, num_held_out)


@dataclass(frozen=True)
class Target:
    """
    One policy to evaluate.

    Attributes:
        step: the number of optimizer steps that it was trained for.
        model: a checkpoint folder; for step 0 the name or folder from which the run started, or `"embedded"`.
    """

    step: int
    model: str

    def fingerprint(self) -> str:
        """A hash of the weights, which tells policies apart; for a model that is not a folder its name."""
        folder, digest = Path(self.model), hashlib.sha256()
        if not folder.is_dir():
            return self.model
        for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
            with open(path, "rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """The evaluation of one checkpoint, as it is passed to the process that does it."""

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


def read_config(run: Path) -> Json:
    """
    The `config.yaml` of the run.

    Raises:
        ValueError: when it is missing, or does not name the task of the run.
    """
    import yaml

    path = run / "config.yaml"
    if not path.exists():
        raise ValueError(f"{run} has no config.yaml; is it a run directory?")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "task" not in config:
        raise ValueError(
            f"{path} does not say on which task the run was trained. If it was one of these, add "
            "`task: word_problems` or `task: gsm8k`, and dataset_path, reward_funcs and model_name_or_path."
        )
    return config


def settings_of(config: Json, profile: Profile, **chosen: object) -> Settings:
    """The settings of the run and the profile; entries of `chosen` that are not None replace fields."""
    settings = Settings(
        num_problems=profile.num_problems,
        subset_frac=None,
        num_samples=profile.num_samples,
        seed=0,
        max_completion_length=config["max_completion_length"],
        sampling=_sampling_of(config),
        stop_at_answer=bool(config.get("stop_at_answer")),
        task={name: config[name] for name in _TASK_FIELDS if name in config},
        model_seed=config["seed"],
        dtype="bfloat16" if config.get("bf16") else "float32",
    )
    given: Json = {name: value for name, value in chosen.items() if value is not None}
    settings = replace(settings, **given)
    return replace(settings, num_problems=None) if settings.subset_frac is not None else settings


def _sampling_of(config: Json) -> Json:
    return {
        "temperature": config.get("temperature", 1.0),
        "top_k": config.get("top_k", 0),
        "top_p": config.get("top_p", 1.0),
        "min_p": config.get("min_p"),
        "repetition_penalty": config.get("repetition_penalty", 1.0),
        **(config.get("generation_kwargs") or {}),
    }


def targets_of(run: Path, config: Json, which: str) -> list[Target]:
    """
    The policies that `--checkpoints` names, in order of step; `all` includes the start policy, step 0.

    Raises:
        ValueError: when a step has no checkpoint; the message lists the steps that have one.
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
        raise ValueError(f"--checkpoints is {which!r}; use all, latest, or steps such as 20,40.") from None
    if missing := [step for step in steps if step not in found]:
        have = ", ".join(map(str, found))
        raise ValueError(f"{run} has no checkpoint of step {', '.join(map(str, missing))}; it has {have}.")
    return [found[step] for step in steps]


def is_done(run: Path, target: Target, settings: Settings) -> bool:
    """Whether the run has an evaluation of these weights with these settings."""
    summary = RunDirectory(run).checkpoint_summary(target.step)
    if summary is None or summary["settings"] != json.loads(json.dumps(asdict(settings))):
        return False
    return summary["fingerprint"] == target.fingerprint()
