"""
Settings that nothing reads: those whose toggle is off, whose task is another one, or that another setting's value
leaves unread. One rule over all fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from trl_entropy.config.setting import Setting, default_of, own_settings
from trl_entropy.tasks.arguments import OfTask

# Fields of TRL's `ModelConfig` whose toggle is their prefix's.
_TOGGLE_OF_PREFIX = {"lora_": "use_peft", "bnb_4bit_": "load_in_4bit"}


class Reader(NamedTuple):
    """
    What reads a setting: `toggle`, when it has one of `values` (empty: when it is on), if `others` read it too.
    """

    toggle: str
    values: tuple[object, ...] = ()
    others: tuple[Reader, ...] = ()

    @property
    def needed(self) -> tuple[Reader, ...]:
        """This and the others: all of them must read the setting."""
        return (self, *self.others)

    def reads(self, value: object) -> bool:
        """Whether it does when the toggle has this value."""
        return value in self.values if self.values else value not in (None, False, "none", 0)

    def remedy(self, value: object) -> str:
        """How to have the setting read, now that the toggle has this value."""
        if self.values:
            return f"Set {self.toggle}={' or '.join(map(repr, self.values))}"
        return f"Set {self.toggle}" if value is None else f"Turn {self.toggle} on"


def readers_of(classes: Iterable[type]) -> dict[str, Reader]:
    """Setting -> what reads it, for those that something must be set for."""
    found = dict[str, Reader]()
    for one in classes:
        own = own_settings(one)
        for field in dataclasses.fields(one):
            readers = _readers_of_own(field.name, own[field.name]) if field.name in own else _readers_of_others(field)
            if readers:
                found[field.name] = readers[0]._replace(others=readers[1:])
    return found


def _readers_of_own(name: str, described: Setting) -> tuple[Reader, ...]:
    toggle = () if described.probe in ("", name) else (Reader(described.probe),)
    return (*toggle, *(Reader(other, values) for other, values in described.read_with.items()))


def _readers_of_others(field: dataclasses.Field[Any]) -> tuple[Reader, ...]:
    """Of a field of a task, or of TRL's `ModelConfig`."""
    help = field.metadata.get("help")
    if isinstance(help, OfTask):
        return (Reader("task", help.tasks),)
    prefixes = [prefix for prefix in _TOGGLE_OF_PREFIX if field.name.startswith(prefix)]
    return tuple(Reader(_TOGGLE_OF_PREFIX[prefix]) for prefix in prefixes)


def check_given(given: Mapping[str, object], readers: Mapping[str, Reader], defaults: Mapping[str, object]) -> None:
    """
    Refuse a setting that was given another value than its default, and that nothing reads.

    Raises:
        ValueError: naming the setting and what would read it.
    """
    for name, first in readers.items():
        if name not in given or given[name] == defaults[name]:
            continue
        for reader in first.needed:
            value = given.get(reader.toggle, defaults[reader.toggle])
            if not reader.reads(value):
                raise ValueError(
                    f"{name} is {given[name]!r:.80}, but nothing reads it: {reader.toggle} is {value!r}. "
                    f"{reader.remedy(value)}, or leave {name} out."
                )


def turned_off(flagged: Mapping[str, object], readers: Mapping[str, Reader]) -> set[str]:
    """
    Settings that the command line leaves unread, by turning their toggle off or giving another setting another value:
    where they stand in a file, or before it on the command line, that is meant and no mistake.

    Args:
        flagged: the settings of the command line in their order.
    """
    place = {name: number for number, name in enumerate(flagged)}

    def leaves_unread(name: str, reader: Reader) -> bool:
        toggle = reader.toggle
        return toggle in flagged and not reader.reads(flagged[toggle]) and place.get(name, -1) < place[toggle]

    return {name for name, first in readers.items() if any(leaves_unread(name, reader) for reader in first.needed)}


def check_config(config: object) -> None:
    """[`check_given`] for a configuration in a user's own script."""
    names = own_settings(config)
    readers = {name: first for name, first in readers_of([type(config)]).items() if name in names}
    read = {*names, *(reader.toggle for first in readers.values() for reader in first.needed)}
    defaults = {name: default_of(config, name) for name in read}
    check_given({name: getattr(config, name) for name in read}, readers, defaults)
