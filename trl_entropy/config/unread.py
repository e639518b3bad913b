"""Settings that nothing reads: those whose toggle, or whose task, is another one. One rule over all fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from trl_entropy.config.setting import default_of, own_settings
from trl_entropy.tasks.arguments import OfTask

# Fields of TRL's `ModelConfig` whose toggle is their prefix's.
_TOGGLE_OF_PREFIX = {"lora_": "use_peft", "bnb_4bit_": "load_in_4bit"}


class Reader(NamedTuple):
    """What reads a setting: `toggle`, when it has one of `values`; empty: when it is on."""

    toggle: str
    values: tuple[str, ...] = ()

    def reads(self, value: object) -> bool:
        """Whether it does when the toggle has this value."""
        return value in self.values if self.values else value not in (None, False, "none", 0)

    def remedy(self) -> str:
        """How to have the setting read."""
        return f"Set {self.toggle}={' or '.join(map(repr, self.values))}" if self.values else f"Turn {self.toggle} on"


def readers_of(classes: Iterable[type]) -> dict[str, Reader]:
    """Setting -> what reads it, for those that something must be turned on for."""
    found = dict[str, Reader]()
    for one in classes:
        own = own_settings(one)
        for field in dataclasses.fields(one):
            help, name = field.metadata.get("help"), field.name
            if name in own and own[name].probe not in ("", name):
                found[name] = Reader(own[name].probe)
            elif isinstance(help, OfTask):
                found[name] = Reader("task", (help.task,))
            else:
                prefix = next((prefix for prefix in _TOGGLE_OF_PREFIX if name.startswith(prefix)), None)
                if prefix is not None:
                    found[name] = Reader(_TOGGLE_OF_PREFIX[prefix])
    return found


def check_given(given: Mapping[str, object], readers: Mapping[str, Reader], defaults: Mapping[str, object]) -> None:
    """
    Refuse a setting that was given another value than its default, and that nothing reads.

    Raises:
        ValueError: naming the setting and what would read it.
    """
    for name, reader in readers.items():
        if name not in given or given[name] == defaults[name]:
            continue
        toggle = given.get(reader.toggle, defaults[reader.toggle])
        if not reader.reads(toggle):
            raise ValueError(
                f"{name} is {given[name]!r:.80}, but nothing reads it: {reader.toggle} is {toggle!r}. "
                f"{reader.remedy()}, or leave {name} out."
            )


def turned_off(flagged: Mapping[str, object], readers: Mapping[str, Reader]) -> set[str]:
    """
    Settings whose toggle the command line turns off: where they stand in a file, or before it on the command line,
    that is meant and no mistake.

    Args:
        flagged: the settings of the command line in their order.
    """
    place = {name: number for number, name in enumerate(flagged)}
    return {
        name
        for name, reader in readers.items()
        if reader.toggle in flagged
        and not reader.reads(flagged[reader.toggle])
        and place.get(name, -1) < place[reader.toggle]
    }


def check_config(config: object) -> None:
    """[`check_given`] for a configuration in a user's own script."""
    names = own_settings(config)
    defaults = {name: default_of(config, name) for name in names}
    readers = {name: reader for name, reader in readers_of([type(config)]).items() if name in names}
    check_given({name: getattr(config, name) for name in names}, readers, defaults)
