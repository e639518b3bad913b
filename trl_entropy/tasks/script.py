"""
The task of a script of the user's own: the datasets and functions of the trainer that a function of theirs makes.

No setting names these objects. Whoever evaluates such a run, or asks an experiment of it, names the function.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.named import absolute, described, line_of, named
from trl_entropy.tasks.prompts import prompt_id

if TYPE_CHECKING:
    from datasets import Dataset

SCRIPT = "script"  # the task's name; the factory's stands where that of a dataset does
# Factories that were handed over, by the names that they go by in the settings of an evaluation.
_HANDED_OVER: dict[str, Callable[[], Any]] = {}


class Parts(NamedTuple):
    """
    What is used of a trainer; the trainer itself, with its model, is let go of.

    Attributes:
        train_dataset, eval_dataset: as it has them.
        reward_funcs, metric_funcs: name -> function; for a reward model its name.
        tools, environment_factories: as TRL's trainer has them; none for single turns.
        rollout_func: which draws in place of the trainer.
        output_dir: of its run.
        start: name or folder of the model that training starts from; empty: it was made in memory.
    """

    train_dataset: Any
    eval_dataset: Any
    reward_funcs: dict[str, Callable[..., Any] | str]
    metric_funcs: dict[str, Callable[..., Any]]
    tools: list[Callable[..., Any]]
    environment_factories: dict[str | None, Callable[[], Any]] | None
    rollout_func: Callable[..., Any] | None
    output_dir: str
    start: str


def hand_over(factory: Callable[[], Any]) -> str:
    """
    The name by which [`parts_of`] finds a function that no setting can name; for one of the script that runs, the name
    by which a command finds it.
    """
    module, name = factory.__module__, getattr(factory, "__qualname__", type(factory).__qualname__)
    file = getattr(sys.modules.get(module), "__file__", None) if module == "__main__" else None
    return hand_over_as(absolute(f"{file or module}:{name}"), factory)


def hand_over_as(name: str, factory: Callable[[], Any]) -> str:
    """From now on [`parts_of`] calls `factory` for this name."""
    _HANDED_OVER[name] = factory
    parts_of.cache_clear()
    return name


def settings_of_script(config: dict[str, Any], factory: str) -> dict[str, Any]:
    """The settings of a run with those of its task put in the place of what they say of one; calls the factory."""
    name = absolute(factory)
    parts, of_tasks = parts_of(name), {one.name for one in dataclasses.fields(TaskArguments)}
    names = {"reward_funcs": [*parts.reward_funcs], "metric_funcs": [*parts.metric_funcs]}
    task = {"task": SCRIPT, "dataset_name": name, "model_name_or_path": parts.start, **names}
    return {name: value for name, value in config.items() if name not in of_tasks} | task


@functools.cache
def parts_of(factory: str) -> Parts:
    """
    Call the function of this name, once in a process.

    Raises:
        ValueError: in one line, when it cannot be imported, fails, or returns no trainer.
    """
    if factory in _HANDED_OVER:
        return _parts(_HANDED_OVER[factory](), factory)
    one = named("trainer_factory", factory, {})
    try:
        made = one.value()
    except Exception as error:
        raise ValueError(f"trainer_factory: {line_of(error, one)}: {described(error)}.") from error
    return _parts(made, factory)


def _parts(trainer: Any, factory: str) -> Parts:
    used = ("args", "model", "train_dataset", "eval_dataset", "reward_funcs", "reward_func_names")
    if missing := [name for name in used if not hasattr(trainer, name)]:
        raise ValueError(
            f"trainer_factory: {factory} returned a {type(trainer).__name__} without {missing[0]}; it must return a "
            "DrGRPOTrainer."
        )
    functions = zip(trainer.reward_func_names, trainer.reward_funcs, strict=True)
    config = getattr(trainer.model, "config", None)
    return Parts(
        trainer.train_dataset,
        trainer.eval_dataset,
        {name: name if hasattr(function, "parameters") else function for name, function in functions},
        {one.short: one.function for one in getattr(trainer, "metric_funcs", ())},
        list(getattr(trainer, "_standalone_tools", ())),
        getattr(trainer, "environment_factories", None),
        getattr(trainer, "rollout_func", None),
        str(trainer.args.output_dir),
        str(getattr(config, "_name_or_path", "") or ""),
    )


def load_script(factory: str, split: str) -> Dataset:
    """
    The trainer's problems with the columns `prompt` and `prompt_id` and all others.

    Raises:
        ValueError: when it has none, or none that can be drawn by number.
    """
    from datasets import Dataset

    parts = parts_of(factory)
    which = "train_dataset" if split == "train" else "eval_dataset"
    dataset = getattr(parts, which)
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        found = "None" if dataset is None else f"a {type(dataset).__name__}"
        raise ValueError(
            f"trainer_factory: the {which} of {factory} is {found}; one datasets.Dataset with a column prompt is "
            "needed."
        )
    if "prompt_id" in dataset.column_names:
        return dataset
    return dataset.add_column("prompt_id", [prompt_id(SCRIPT, prompt) for prompt in dataset["prompt"]])
