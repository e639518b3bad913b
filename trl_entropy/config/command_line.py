"""The command lines of `trl-entropy train` and `sft`: YAML and flags become task, training arguments and model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from trl import ModelConfig, TrlParser

from trl_entropy.config.bf16 import explaining_bf16
from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.config.help import help_text
from trl_entropy.config.number_checks import check_numbers
from trl_entropy.config.settings_file import Settings, convert_setting, hints_of, one_line, read_settings, sentence
from trl_entropy.config.shipped import config_path
from trl_entropy.config.unread import check_given, readers_of, turned_off
from trl_entropy.config.without_secrets import SFTArguments
from trl_entropy.models.loading import EMBEDDED_MODEL, check_model
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks.arguments import TaskArguments, check_problem_numbers, implied_task
from trl_entropy.tasks.completion_functions import check_functions
from trl_entropy.tasks.demonstrations import DemonstrationArguments
from trl_entropy.tasks.registry import check_task


def parse(argv: list[str] | None = None) -> tuple[TaskArguments, DrGRPOConfig, ModelConfig]:
    """Read the command line and its `--config` file; every error in a setting is raised here, before any loading."""
    parser = _Parser([TaskArguments, DrGRPOConfig, ModelConfig], "trl-entropy train")
    # tqdm is off by default once transformers is silenced.
    parser.set_defaults(lora_dropout=0.0, model_name_or_path=EMBEDDED_MODEL, disable_tqdm=False)
    task, args, model = parser.read(argv)
    check_functions(task)
    if args.reward_weights is not None and len(args.reward_weights) != len(task.reward_funcs):
        raise ValueError(
            f"reward_weights has {counted(len(args.reward_weights), 'number')}, reward_funcs "
            f"{len(task.reward_funcs)}; each "
            "reward function needs one."
        )
    check_problem_numbers(task, prompts_per_step=args.generation_batch_size // args.num_generations)
    check_task(task, str(model.model_name_or_path))
    check_model(model)
    if args.resume_from_checkpoint is None:
        RunDirectory(args.output_dir).check_unused()
    return task, args, model


def parse_sft(argv: list[str] | None = None) -> tuple[DemonstrationArguments, SFTArguments, ModelConfig]:
    """
    Read the command line of `trl-entropy sft` and its `--config` file.

    Raises:
        ValueError: for every error in the settings, before anything is loaded.
    """
    parser = _Parser([DemonstrationArguments, SFTArguments, ModelConfig], "trl-entropy sft")
    parser.set_defaults(disable_tqdm=False)  # tqdm is off by default once transformers is silenced
    task, args, model = parser.read(argv)
    check_problem_numbers(task)
    check_numbers(args)
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is not set. Name a model on the hub or a local folder.")
    if task.merge_adapter and not model.use_peft:
        raise ValueError("merge_adapter=True needs an adapter. Set use_peft=True, or merge_adapter=False.")
    if (Path(args.output_dir) / "config.yaml").exists() and args.resume_from_checkpoint is None:
        raise ValueError(f"{args.output_dir} already holds a run. Choose another --output_dir, or move it away.")
    return task, args, model


class _Parser(TrlParser):
    """
    TRL's parser, whose errors are a `ValueError` of one line that names the setting, and for a file its line.

    Written against trl 1.16 and transformers 5.23: `parse_args_into_dataclasses` calls `parse_known_args` and then the
    dataclasses with what it found.
    """

    def __init__(self, classes: Iterable[type], prog: str) -> None:
        super().__init__(classes, allow_abbrev=False, prog=prog)
        self._hints = hints_of(self.dataclass_types)

    def error(self, message: str) -> NoReturn:
        raise ValueError(one_line(message) + ".")

    def read(self, argv: list[str] | None) -> tuple[Any, ...]:
        """The dataclasses with the settings of the file, and above them those of the command line."""
        given_words = sys.argv[1:] if argv is None else list(argv)
        if {"--help", "-h"} & {*given_words}:
            print(help_text(self, self.dataclass_types, everything=given_words[-1] == "all"))
            sys.exit(0)
        flags, path = _without_config(given_words)
        file = Settings({}, {}) if path is None else read_settings(config_path(path), self._hints)
        os.environ.update(file.environment)
        # The first option of a setting has its default; `--no_x`, which comes after `--x`, has another.
        defaults = {action.dest: action.default for action in reversed(self._actions)}
        readers = readers_of(self.dataclass_types)
        given, order = vars(self.parse_known_args(flags)[0]), _names_of(flags)
        off = turned_off({name: given[name] for name in order if name in given}, readers)
        flags = _without_flags(flags, off)
        flagged = {name: given[name] for name in _names_of(flags) if name in given}
        settings = {name: value for name, value in file.values.items() if name not in off}
        if "task" in defaults and defaults["task"] is None:
            defaults["task"] = implied_task((settings | flagged).get("dataset_name"))
        check_given(settings | flagged, readers, defaults)
        for action in self._actions:
            if action.choices and action.dest in settings:
                self._check_choice(action.dest, settings[action.dest], list(action.choices))
        self.set_defaults_with_config(**settings)
        try:
            with explaining_bf16():
                return self.parse_args_into_dataclasses(args=flags)
        except (TypeError, ArithmeticError, AttributeError) as error:  # of a value that no check of ours foresaw
            raise ValueError(f"the settings do not go together: {sentence(error)}") from error

    def _check_choice(self, name: str, value: object, choices: list[object]) -> None:
        if value is not None and not isinstance(value, list) and getattr(value, "value", value) not in choices:
            raise ValueError(f"{name} is {value!r:.80}; use one of {', '.join(map(str, choices))}.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, str) and name in self._hints:
                setattr(found, name, convert_setting(name, value, self._hints[name]))
        return found, rest


def _name_of(flag: str) -> str:
    """The setting that a word of the command line names; empty for a value."""
    return flag[2:].split("=")[0].replace("-", "_") if flag.startswith("--") else ""


def _names_of(flags: list[str]) -> list[str]:
    """The settings that the command line names, in the order in which each stands last."""
    names = [part for flag in flags for part in (_name_of(flag), _name_of(flag).removeprefix("no_")) if part]
    return list(dict.fromkeys(reversed(names)))[::-1]


def _without_flags(flags: list[str], names: set[str]) -> list[str]:
    """The command line without these settings and their values."""
    kept, keeps = list[str](), True
    for flag in flags:
        keeps = _name_of(flag) not in names if flag.startswith("--") else keeps
        kept += [flag] if keeps else []
    return kept


def _without_config(argv: list[str]) -> tuple[list[str], str | None]:
    """The command line without `--config PATH`, and the path."""
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if argv.count("--config") > 1:
        raise ValueError("--config stands twice on the command line; a run has one file.")
    if "--config" not in argv:
        return argv, None
    place = argv.index("--config")
    if place + 1 == len(argv):
        raise ValueError("--config needs the path of a YAML file behind it.")
    return argv[:place] + argv[place + 2 :], argv[place + 1]
