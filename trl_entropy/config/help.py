"""The help of `trl-entropy train` and `sft`: what one sets in a first run, or with `--help all` everything."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Iterable, Mapping

from transformers import TrainingArguments

from trl_entropy.config.setting import own_settings

WIDTH = 100
# What one sets in a first run, in the order in which one thinks of it.
# fmt: off
FIRST = (
    "task", "dataset_name", "prompt_column", "answer_column", "prompt_template", "reward_funcs", "model_name_or_path",
    "use_peft", "output_dir", "num_prompts_per_step", "num_generations", "per_device_train_batch_size",
    "num_train_epochs", "max_steps", "max_completion_length", "learning_rate", "beta", "bf16", "use_cpu",
    "entropy_probe", "entropy_attribution", "noise_scale_probe", "fisher_probe", "entropy_control",
    "evaluate_checkpoints", "save_steps", "resume_from_checkpoint", "report_to",
)
# fmt: on
_UPSTREAM = "Training, of transformers' TrainingArguments"


def help_text(parser: argparse.ArgumentParser, classes: Iterable[type], everything: bool) -> str:
    """
    The help as text.

    Args:
        classes: the dataclasses whose fields are the settings, in the order of the sections.
        everything: all settings by section, in place of those of a first run.
    """
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    lines = [f"usage: {parser.prog} --config FILE.yaml [--setting value ...]", ""]
    lines += ["Every setting can stand in the YAML file or on the command line, which goes before the file.", ""]
    if not everything:
        shown = [actions[name] for name in FIRST if name in actions]
        lines += ["What one sets in a first run:", *_settings(shown), ""]
        return "\n".join([*lines, *fold(f"{parser.prog} --help all shows the other {len(actions) - len(shown)}.")])
    for title, names in _sections(classes, actions).items():
        lines += [f"{title}:", *_settings(actions[name] for name in names), ""]
    return "\n".join(lines).rstrip()


def fold(text: str, indent: str = "") -> list[str]:
    """The text in lines of at most `WIDTH` columns."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _sections(classes: Iterable[type], actions: Mapping[str, argparse.Action]) -> dict[str, list[str]]:
    """Title -> the settings below it."""
    upstream = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = dict[str, list[str]]()
    for one in classes:
        own = own_settings(one)
        for field in dataclasses.fields(one):
            is_training = issubclass(one, TrainingArguments)
            title = _title(one)
            if is_training and field.name not in own:
                title = _UPSTREAM if field.name in upstream else f"Training, of TRL's {_trl_base(one).__name__}"
            if field.name in actions:
                found.setdefault(title, []).append(field.name)
    return dict(sorted(found.items(), key=lambda section: section[0] == _UPSTREAM))


def _title(one: type) -> str:
    if issubclass(one, TrainingArguments):
        return "Probes, controls and training, of this package"
    return f"Model, of TRL's {one.__name__}" if one.__module__.startswith("trl.") else "Task"


def _trl_base(one: type) -> type:
    return next(base for base in one.__mro__ if base.__module__.startswith("trl."))


def _settings(actions: Iterable[argparse.Action]) -> list[str]:
    return [line for action in actions for line in _setting(action)]


def _setting(action: argparse.Action) -> list[str]:
    choices = [str(getattr(choice, "value", choice)) for choice in action.choices or ()]
    short = "|".join(choices)
    beside = f" {short}" if len(short) < WIDTH // 2 else ""
    default = "" if action.default in (None, argparse.SUPPRESS, "") else f" (default: {action.default})"
    text = " ".join((action.help or "").replace("%%", "%").replace("%(default)s", str(action.default)).split())
    text += "" if beside or not choices else f" One of {', '.join(choices)}."
    return [f"  --{action.dest}{beside}{default}", *fold(text, "      ")]
