"""Whose change by a step the entropy probe measures: the names of `change_of`, and their metric keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")
# What is known of every completion, whatever functions a run has. Entropy is measured in any case.
OWN_QUANTITIES = ("entropy", "reward", "length", "truncated")
DEFAULT_QUANTITIES = ("entropy", "reward")


def check_change_of(names: Sequence[str] | None) -> None:
    """Raises `ValueError` for names that no run can have: none, an empty one, or one twice."""
    if names is None:
        return
    if not names or not all(names):
        raise ValueError(
            f"change_of is {list(names)!r}; name at least one of {', '.join(OWN_QUANTITIES)}, or a reward function or "
            "metric function of the run."
        )
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise ValueError(f"change_of names {twice[0]!r} twice. Name each quantity once.")


def values_asked_for(values: Mapping[str, Value], names: Sequence[str] | None) -> dict[str, Value]:
    """Those whose keys (see [`keys_of_quantities`]) `change_of` names, in full or by the function's name."""
    asked = names or DEFAULT_QUANTITIES
    functions = {*asked} - {*OWN_QUANTITIES}
    return {key: value for key, value in values.items() if key in asked or key.rpartition("/")[2] in functions}


def keys_of_quantities(names: Sequence[str], rewards: Sequence[str], metrics: Sequence[str]) -> tuple[str, ...]:
    """
    The keys under which the changes of quantities other than the entropy are logged: `reward` (the weighted sum),
    `length`, `truncated`, `rewards/NAME` of a reward function and `metrics/NAME` of a metric function, as their means.

    Args:
        names: of `change_of`; a function by its name, or by its key where another thing has its name too. `reward`,
            `length` and `truncated` are always those of this package, whatever functions are called so.
        rewards, metrics: names of the run's reward functions and metric functions.

    Raises:
        ValueError: for a name that the run does not have, or that two things have.
    """
    check_change_of(names)
    by_name: dict[str, list[str]] = {name: [name] for name in OWN_QUANTITIES}
    for prefix, functions in (("rewards", rewards), ("metrics", metrics)):
        for function in functions:
            if function not in OWN_QUANTITIES:
                by_name.setdefault(function, []).append(f"{prefix}/{function}")
            by_name.setdefault(f"{prefix}/{function}", []).append(f"{prefix}/{function}")
    found = dict[str, None]()
    for name in names:
        if name not in by_name:
            raise ValueError(f"change_of names {name!r}, which this run does not have. It has {', '.join(by_name)}.")
        if len(by_name[name]) > 1:
            raise ValueError(
                f"change_of names {name!r}, and there are several of that name. Name the function by its key: "
                f"{' or '.join(key for key in by_name[name] if key != name)}."
            )
        found[by_name[name][0]] = None
    return tuple(key for key in found if key != "entropy")
