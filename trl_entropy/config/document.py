"""`docs/toggles.md`, written from the settings: `python -m trl_entropy.config.document > docs/toggles.md`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from trl import GRPOConfig

from trl_entropy.config.control_settings import ControlSettings
from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.config.probe_settings import ProbeSettings
from trl_entropy.config.setting import Setting, default_of, own_settings
from trl_entropy.config.training_settings import TrainingSettings
from trl_entropy.tasks.arguments import TaskArguments

_INTRODUCTION = """\
# Every toggle, and every setting

`DrGRPOConfig` has all fields of TRL's `GRPOConfig` and those below. Each can stand in a YAML file or on the command
line (`--entropy_probe true`), or be given to `DrGRPOConfig(...)`. (T1), (T2), ... are equations of
[theory](theory.md); [every metric key](metrics.md) says what is logged under each name, and
[the results](results/index.md) what was measured with the toggles. This page is written by
`python -m trl_entropy.config.document`.
"""
_TABLES = (
    (
        "Probes",
        ProbeSettings,
        "Probes only measure. Training is, bit for bit, what it is without them: TRL's, but with whole prompt groups "
        "shuffled, where TRL's own shuffle of single completions draws other random numbers.",
    ),
    ("Controls", ControlSettings, "Controls change the step or the loss to steer the entropy."),
    ("Training", TrainingSettings, "What is trained on, and when it is evaluated."),
)
_OF_TASK = (
    "Which problems there are, what makes their prompts, and what is rewarded, in `trl-entropy train` and `doctor`; a "
    "script of one's own gives datasets and functions to the trainer. A function is named as "
    "`package.module:function` or `path/to/file.py:function`, and the file that it is in is imported, which runs it. "
    "Its hash stands in `config.yaml`, and a checkpoint is not resumed with a changed file, unless "
    "resume_allow_changes names `function_files`; `trl-entropy evaluate` and `experiment` import it with "
    "`--import_functions` alone."
)
_HEADER = ("setting", "default", "what it does")
_COST = (
    "Costs are in passes through the model. `trl-entropy doctor --config CONFIG --hardware 2xH100-80GB` computes the "
    "seconds of a step, and of each probe and control that is on, in float32 and in TF32, for a GPU that it knows."
)
_CHANGES_TRAINING = (
    "A setting that *changes training* is part of the resume contract: a checkpoint is not resumed with another "
    "value, unless resume_allow_changes names it. The settings of a control that is off are not compared. A setting "
    "is refused where nothing reads it: while its toggle is off, or with another value of what it is *read with*."
)


def document() -> str:
    """The page, in Markdown."""
    parts = [_INTRODUCTION, "## What can be turned on\n", f"{_COST}\n"]
    parts += [_table(("toggle", "logs", "cost"), _toggle_rows())]
    parts += ["\n## All settings\n", f"{_CHANGES_TRAINING}\n"]
    for title, config, text in _TABLES:
        parts += [f"### {title}\n", f"{text}\n", _table(_HEADER, _setting_rows(config)), ""]
    parts += ["### Task\n", f"{_OF_TASK}\n", _table(_HEADER, _task_rows()), ""]
    parts += ["## TRL's fields with another default\n", _table(("field", "TRL", "here"), _changed_defaults())]
    return "\n".join(parts)


def _task_rows() -> Iterable[tuple[str, ...]]:
    for field in dataclasses.fields(TaskArguments):
        yield (
            f"`{field.name}`",
            _shown(getattr(TaskArguments(), field.name) if field.name != "task" else None),
            field.metadata["help"],
        )


def _toggle_rows() -> Iterable[tuple[str, ...]]:
    for name, setting in (one for _, config, _ in _TABLES for one in own_settings(config).items()):
        if setting.logs:
            turned_on = ", ".join(f"`{choice}`" for choice in setting.choices if choice != "none")
            yield (f"`{name}`" + (f": {turned_on}" if turned_on else ""), setting.logs, setting.cost)


def _setting_rows(config: type) -> Iterable[tuple[str, ...]]:
    for name, setting in own_settings(config).items():
        yield f"`{name}`", _shown(default_of(config, name)), f"{setting.help} {' '.join(_notes(setting))}".strip()


def _notes(setting: Setting) -> Iterable[str]:
    """What else belongs to a setting, each in a short sentence."""
    if setting.choices:
        yield f"*Choices:* {', '.join(f'`{choice}`' for choice in setting.choices)}."
    if setting.unit:
        yield f"*Unit:* {setting.unit}."
    if read_with := _read_with(setting):
        yield f"*Read with* {read_with}."
    if isinstance(setting.changes_training, tuple):
        yield f"*Changes training* with {', '.join(f'`{choice}`' for choice in setting.changes_training)}."
    elif setting.changes_training:
        yield "*Changes training.*"


def _read_with(setting: Setting) -> str:
    found = [(name, [f"`{value}`" for value in values]) for name, values in setting.read_with.items()]
    return ", ".join(f"`{name}`: {', '.join(values) or 'set'}" for name, values in found)


def _changed_defaults() -> Iterable[tuple[str, ...]]:
    ours = {field.name: field.default for field in dataclasses.fields(DrGRPOConfig)}
    for field in dataclasses.fields(GRPOConfig):
        if ours[field.name] != field.default:
            yield f"`{field.name}`", _shown(field.default), _shown(ours[field.name])


def _shown(value: object) -> str:
    """As YAML has it."""
    if value is None:
        return "not set"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    print(document())
