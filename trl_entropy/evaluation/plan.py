"""The plan of an evaluation: which checkpoints, how many problems, and how to sample."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from trl_entropy.models.loading import EMBEDDED_MODEL
from trl_entropy.runs.checkpoints import checkpoints_of
from trl_entropy.runs.directory import CheckpointSummary, RunDirectory
from trl_entropy.runs.strict_json import Json
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.completion_functions import by_file_name, evaluated_functions, import_functions, passing
from trl_entropy.tasks.named import files_of
from trl_entropy.tasks.registry import TASKS, task_of
from trl_entropy.tasks.script import settings_of_script

ALL, LATEST = "all", "latest"
NOT_EVALUATED = "not evaluated yet"
TRANSFORMERS, VLLM = "transformers", "vllm"
BATCH_SIZE = 256  # completions; halved on out-of-memory
_TASK_FIELDS = tuple(one.name for one in fields(TaskArguments))
_WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")
_LOADED = ("*model*.safetensors", "*model*.bin")
# Arguments of `from_pretrained` that say which model it is; the names of `model_init_kwargs`.
_MODEL_SETTINGS = ("revision", "subfolder", "variant", "trust_remote_code", "code_revision")


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
        task: what the [`TaskArguments`] of the run have beside their defaults.
        model_seed: seed of the embedded model's warm start.
        dtype: dtype of the weights during the evaluation.
        sampler: what generates the completions, `"transformers"` or `"vllm"`. Either way the model scores them itself.
        model: which model training started from, beside its name: `revision`, `subfolder`, `trust_remote_code` and so
            on, as in `from_pretrained`; what is as by default is left out.
        chat_template_kwargs: for the template of prompts that are conversations, as in training.
        function_files: the user's own files that the task imports, with their hashes.
        max_tool_calling_iterations: of episodes, as in training; None for single turns.
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
    model: Json = field(default_factory=dict)
    chat_template_kwargs: Json = field(default_factory=dict)
    function_files: Json = field(default_factory=dict)
    max_tool_calling_iterations: int | None = None

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

    def problem(self) -> str | None:
        """What keeps it from being evaluated, as far as the names of its files tell."""
        folder = Path(self.model)
        if not folder.is_dir():
            return f"there is no folder {folder}" if self.step else None
        if any(found for pattern in _LOADED for found in folder.glob(pattern)):
            return None
        return f"{folder} holds no weights (model.safetensors or adapter_model.safetensors)"

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


def read_config(run: Path, trainer_factory: str | None = None) -> Json:
    """
    The `config.yaml` of the run.

    Args:
        trainer_factory: name of a function that makes the run's trainer; its datasets and functions are the task then,
            in place of what the file says of one.

    Raises:
        ValueError: when it is missing or damaged, or names no task that can be evaluated.
    """
    import yaml

    path = run / "config.yaml"
    if not path.exists():
        raise ValueError(f"{run} has no config.yaml; is it a run directory?")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    if trainer_factory is not None:
        config = settings_of_script(config, trainer_factory)
    _check_config(path, config)
    return config


def _check_config(path: Path, config: Json) -> None:
    if "task" not in config:
        raise ValueError(
            f"{path} does not say on which task the run was trained, as that of a script does not. Name the "
            "function that makes its trainer, --trainer_factory path/to/script.py:function, or add `task: "
            "word_problems`, `gsm8k` or `dataset`, with dataset_name, reward_funcs and model_name_or_path."
        )
    if config["task"] not in TASKS:
        raise ValueError(f"{path} has task: {config['task']}; it must be one of {', '.join(TASKS)}")
    for name in ("max_completion_length", "seed"):
        if not isinstance(config.get(name), int):
            raise ValueError(f"{path} has {name}: {config.get(name)}; it must be the run's own, a whole number")
    names = config.get("reward_funcs", ["tag_pref"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has reward_funcs: {names}; it must be a list of names")


def has_episodes(config: Json) -> bool:
    """Whether the run's completions are episodes with tools or environments."""
    task = _task_settings(config)
    return task_of(task).has_episodes(task)


def _task_settings(config: Json) -> TaskArguments:
    return TaskArguments(**{name: config[name] for name in _TASK_FIELDS if name in config})


def _task_of(config: Json) -> Json:
    """What says which problems and rewards there are; what is as by default is left out, so that it can be added."""
    task, default = asdict(_task_settings(config)), asdict(TaskArguments(task=config["task"]))
    return {name: task[name] for name in task if task[name] != default[name] or name in ("task", "reward_funcs")}


def check_functions(run: Path, config: Json, may_import: bool) -> str | None:
    """
    As [`import_functions`]; also check that one of the functions says what passes.

    Raises:
        ValueError: as [`import_functions`], when none says what passes, and for episodes that cannot be drawn again.
    """
    task = _task_settings(config)
    changed = import_functions(run, task, config.get("function_files") or {}, may_import)
    if has_episodes(config):
        task_of(task).episodes(task)
    passing(task, evaluated_functions(task))
    return changed


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
        task=_task_of(config),
        model_seed=config["seed"],
        dtype=_dtype_of(config),
        model=_model_settings_of(config),
        chat_template_kwargs=config.get("chat_template_kwargs") or {},
        function_files=by_file_name(files_of(_task_settings(config).own_functions())),
        max_tool_calling_iterations=_most_calls(config) if has_episodes(config) else None,
    )
    given: Json = {name: value for name, value in chosen.items() if value is not None}
    settings = replace(settings, **given)
    return replace(settings, num_problems=None) if settings.subset_frac is not None else settings


def caveat_of(config: Json) -> str | None:
    """In what the evaluated policy is not the trained one; None if it is."""
    in_script = (config.get("model_init_kwargs") or {}).get("quantization_config")
    if not (config.get("load_in_4bit") or config.get("load_in_8bit") or in_script):
        return None
    return (
        f"the run was trained on a quantised base model; it is evaluated on the base in {_dtype_of(config)}, which is "
        "another policy"
    )


def _dtype_of(config: Json) -> str:
    """That of the weights, if training loads them in a shorter one than float32; else that in which it computes."""
    named = (config.get("model_init_kwargs") or {}).get("dtype") or config.get("dtype")
    if named == "auto":
        named = (config.get("model_config") or {}).get("dtype")
    name = str(named).removeprefix("torch.")
    if name in ("bfloat16", "float16"):
        return name
    return "bfloat16" if config.get("bf16") else "float32"


def _model_settings_of(config: Json) -> Json:
    """What `trl-entropy train` writes into `config.yaml`, and what a script has given to `DrGRPOConfig`."""
    given = {"revision": config.get("model_revision"), "trust_remote_code": config.get("trust_remote_code")}
    given |= config.get("model_init_kwargs") or {}
    found = {name: given[name] for name in _MODEL_SETTINGS if given.get(name)}
    return {name: value for name, value in found.items() if (name, value) != ("revision", "main")}


def _most_calls(config: Json) -> int:
    """As many as fit into a completion if the run had no limit; each takes a token and more."""
    given = config.get("max_tool_calling_iterations")
    return config["max_completion_length"] if given is None else given


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
    start = str(config.get("model_name_or_path", EMBEDDED_MODEL))
    found = {0: Target(0, start)} if start else {}  # that of a script may have been made in memory
    for path in reversed(checkpoints_of(run)):
        step = int(path.name.split("-")[1])
        found[step] = Target(step, str(path))
    if which == ALL:
        return list(found.values())
    if not found:
        raise ValueError(
            f"{run} has no checkpoint, and its start policy was made in memory; train with save_strategy."
        )
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


def is_done(run: Path, target: Target, settings: Settings, any_sampler: bool = False) -> bool:
    """
    Whether the run has an evaluation of these weights with these settings.

    Args:
        any_sampler: whatever generated the completions.
    """
    return difference(run, target, settings, any_sampler) is None


def difference(run: Path, target: Target, settings: Settings, any_sampler: bool = False) -> str | None:
    """
    How the run's evaluation of the target differs from the one that is wanted: None if it does not.

    Args:
        any_sampler: as [`is_done`].
    """
    found = _settings_in(RunDirectory(run).checkpoint_summary(target.step))
    if found is None:
        return NOT_EVALUATED
    old, new = asdict(found), asdict(_as_read(settings))
    names = [name for name in new if old[name] != new[name] and not (any_sampler and name == "sampler")]
    if names:
        return "; ".join(f"{name} {old[name]}, now {new[name]}" for name in names)
    summary = RunDirectory(run).checkpoint_summary(target.step)
    assert summary is not None
    return None if summary["fingerprint"] == target.fingerprint() else "other weights"


def samplers_used(run: Path, settings: Settings) -> list[str]:
    """The samplers of the run's evaluations that have these settings otherwise, the most frequent first."""
    found = [_settings_in(summary) for summary in RunDirectory(run).checkpoint_summaries()]
    wanted = _as_read(settings)
    used = [one.sampler for one in found if one is not None and replace(one, sampler=wanted.sampler) == wanted]
    return [sampler for sampler, _ in Counter(used).most_common()]


def _settings_in(summary: CheckpointSummary | None) -> Settings | None:
    """The settings of an evaluation, those that an older one does not name by their defaults."""
    try:
        return None if summary is None else Settings(**summary["settings"])
    except TypeError:  # of another version
        return None


def _as_read(settings: Settings) -> Settings:
    return Settings(**json.loads(json.dumps(asdict(settings))))
