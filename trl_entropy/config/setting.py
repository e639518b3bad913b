"""`setting`: a field of the configuration with everything that is known of it, said once, where the field stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from copy import copy
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Setting:
    """
    What is known of a field.

    Attributes:
        help: whole sentences.
        changes_training: whether another value makes another run, so that a checkpoint of the one is not resumed as
            the other; or the values that do, where all others train alike.
        choices: the values it takes; empty: any of its type.
        unit: of its value, or of what it measures.
        probe: the toggle that it belongs to: a probe's, or that of a control. Nothing reads it while that is off.
        read_with: other fields, each with those of its values with which this setting is read; no values: any that
            turns the field on. Nothing reads it unless all of them have one of theirs.
        logs, cost: what turning it on logs and costs.
    """

    help: str
    changes_training: bool | tuple[str, ...]
    choices: tuple[str, ...] = ()
    unit: str = ""
    probe: str = ""
    logs: str = ""
    cost: str = ""
    read_with: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)


class _Help(str):
    """The text of `--help`, with the setting: HfArgumentParser hands a field's metadata to argparse, whole."""

    setting: Setting


def setting(
    help: str,
    default: T,
    *,
    changes_training: bool | tuple[str, ...],
    choices: tuple[str, ...] = (),
    unit: str = "",
    probe: str = "",
    logs: str = "",
    cost: str = "",
    read_with: Mapping[str, tuple[object, ...]] | None = None,
) -> T:
    """A dataclass field; see [`Setting`]."""
    described = Setting(help, changes_training, choices, unit, probe, logs, cost, read_with or {})
    text = _Help((f"{help} Unit: {unit}." if unit else help).replace("%", "%%"))  # argparse formats it
    text.setting = described
    metadata: dict[str, object] = {"help": text}
    if choices or default is False:
        metadata |= {"choices": list(choices)} if choices else {"metavar": "{true,false}"}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def own_settings(config: object) -> Mapping[str, Setting]:
    """The settings of a configuration, or of its class, that were made by [`setting`]: this package's, not TRL's."""
    found = {field.name: field.metadata.get("help") for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return {name: text.setting for name, text in found.items() if isinstance(text, _Help)}


def default_of(config: object, name: str) -> object:
    """The default of a field."""
    (field,) = (field for field in dataclasses.fields(config) if field.name == name)  # type: ignore[arg-type]
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
