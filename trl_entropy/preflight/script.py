"""The planned run of a script of one's own: what it gives to `DrGRPOTrainer`, caught before a model is loaded."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from datasets import Dataset
from torch import nn
from trl import GRPOTrainer, ModelConfig
from trl.trainer.utils import get_callable_name

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.preflight.finding import Finding, Findings
from trl_entropy.preflight.shapes import ModelShape, model_shape, shape_of_module
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.named import absolute, described, line_of, named
from trl_entropy.tasks.script import SCRIPT, hand_over_as
from trl_entropy.trainer.agent_checks import check_agents
from trl_entropy.trainer.dr_grpo import DrGRPOTrainer
from trl_entropy.trainer.metric_functions import named_functions

_IN_MEMORY = "(made by the script)"


class _Caught(BaseException):
    """Leaves the script with what it gives to the trainer; a script that catches exceptions does not catch it."""


@dataclass(frozen=True)
class PlannedScript:
    """
    A run of a script.

    Attributes:
        task: the script's; the trainer's datasets and functions are found by it, as in an evaluation.
        args: as the script makes them.
        model: what names the model, its adapter and its quantisation.
        given: the arguments of the trainer by name.
    """

    task: TaskArguments
    args: DrGRPOConfig
    model: ModelConfig
    given: dict[str, Any]

    def shape(self) -> ModelShape:
        """That of the model, which is not loaded if the script gives a name; as [`model_shape`]."""
        given = self.given["model"]
        return (
            shape_of_module(given, "the script's", self.model)
            if isinstance(given, nn.Module)
            else model_shape(self.model)
        )

    def findings(self) -> Findings:
        """What an evaluation will ask for, and what does not go with the script's environments."""
        if not isinstance(self.given.get("eval_dataset"), Dataset):
            yield Finding(
                "The trainer's eval_dataset is no single datasets.Dataset, which trl-entropy evaluate takes.",
                "Give it one to evaluate checkpoints.",
                is_problem=False,
            )
        try:
            check_agents(self.args, environment_factory=self.given.get("environment_factory"))
        except ValueError as error:
            yield Finding(str(error))


def planned_script(factory: str) -> PlannedScript:
    """
    Call the function that makes the trainer, up to the trainer's constructor; what comes after it is not run.

    Raises:
        ValueError: in one line, when it cannot be imported, fails before, or makes no such trainer.
    """
    one, name = named("trainer_factory", factory, {}), absolute(factory)
    try:
        with mock.patch.object(DrGRPOTrainer, "__init__", _catch):
            made = one.value()
    except _Caught as caught:
        return _planned(caught.args[0], name)
    except Exception as error:
        raise ValueError(f"trainer_factory: {line_of(error, one)}: {described(error)}.") from error
    raise ValueError(f"trainer_factory: {factory} made no DrGRPOTrainer; it returned a {type(made).__name__}.")


def _catch(self: object, *args: Any, **kwargs: Any) -> None:
    metric_funcs = kwargs.pop("metric_funcs", ())
    bound = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs)
    raise _Caught(bound.arguments | {"metric_funcs": metric_funcs})


def _planned(given: dict[str, Any], name: str) -> PlannedScript:
    args, training = given.get("args"), given.get("train_dataset")
    if not isinstance(args, DrGRPOConfig):
        raise ValueError(
            f"trainer_factory: {name} gives the trainer {type(args).__name__} as args; a DrGRPOConfig is needed."
        )
    if not isinstance(training, Dataset):
        raise ValueError(
            f"trainer_factory: the train_dataset of {name} is a {type(training).__name__}; trl-entropy doctor reads a "
            "datasets.Dataset."
        )
    held_out = given.get("eval_dataset")
    hand_over_as(name, lambda: _stand_in(given, held_out if isinstance(held_out, Dataset) else training))
    number = len(held_out) if isinstance(held_out, Dataset) else 1
    task = TaskArguments(task=SCRIPT, dataset_name=name, num_eval_problems=number)
    return PlannedScript(task, args, _model(given, args), given)


def _stand_in(given: dict[str, Any], held_out: Dataset) -> SimpleNamespace:
    """What [`trl_entropy.tasks.script.parts_of`] reads of a trainer."""
    functions = given.get("reward_funcs") or []
    functions = functions if isinstance(functions, list) else [functions]
    names = [one.split("/")[-1] if isinstance(one, str) else get_callable_name(one) for one in functions]
    environments = given.get("environment_factory")
    return SimpleNamespace(
        args=given["args"], model=None, train_dataset=given["train_dataset"], eval_dataset=held_out,
        reward_funcs=[nn.Identity() if isinstance(one, str) else one for one in functions], reward_func_names=names,
        metric_funcs=named_functions(given["metric_funcs"]), _standalone_tools=given.get("tools") or [],
        environment_factories=environments if environments is None or isinstance(environments, dict)
        else {None: environments},
        rollout_func=given.get("rollout_func"),
    )  # fmt: skip


def _model(given: dict[str, Any], args: DrGRPOConfig) -> ModelConfig:
    """As `trl-entropy train` has it of its settings."""
    model, init = given.get("model"), args.model_init_kwargs or {}
    config = getattr(model, "config", None)
    name = model if isinstance(model, str) else getattr(config, "_name_or_path", "") or _IN_MEMORY
    dtype = init.get("dtype", "float32") if isinstance(model, str) else getattr(model, "dtype", "float32")
    adapters = getattr(model, "peft_config", None) or {}
    adapter = given.get("peft_config") or next(iter(adapters.values()), None)
    quantised = given.get("quantization_config") or getattr(config, "quantization_config", None)
    found = ModelConfig(
        model_name_or_path=str(name),
        dtype=str(dtype).removeprefix("torch."),
        attn_implementation=init.get("attn_implementation") or getattr(config, "_attn_implementation", None),
        load_in_4bit=bool(getattr(quantised, "load_in_4bit", False)),
        load_in_8bit=bool(getattr(quantised, "load_in_8bit", False)),
    )
    if adapter is not None:
        found.use_peft = True
        for own, theirs in _OF_LORA.items():
            value = getattr(adapter, theirs, None)
            setattr(found, own, sorted(value) if isinstance(value, set) else value)
    return found


# Fields of `ModelConfig`, and those of peft's `LoraConfig`.
_OF_LORA = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora",
}  # fmt: skip
