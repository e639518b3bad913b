"""The tested versions of every package that numbers depend on; setup.cfg has the same."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

# First tested version, and first version after the tested ones. Minor releases of TRL change private methods.
# accelerate 1.14 is not one of them: under FSDP2 it leaves a tied head in no group of the optimizer. Nor is
# DeepSpeed 0.19.0, whose ZeRO-3 cuts parameters and replaces `linear` in other private places than 0.19.8.
TESTED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "trl": ((1, 16), (1, 17)),
    "transformers": ((5, 22, 2), (5, 25)),
    "accelerate": ((1, 15), (1, 16)),
    "peft": ((0, 21), (0, 22)),
    "datasets": ((5, 2), (5, 3)),
    "torch": ((2, 13), (2, 14)),
    "pandas": ((3,), (4,)),
    "deepspeed": ((0, 19, 8), (0, 20)),
}


def _parse(text: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()


def _written(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def untested_versions() -> list[str]:
    """One sentence for each installed package that lies outside the tested range."""
    messages = []
    for package, (low, high) in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not low <= _parse(installed) < high:
            expected = f">={_written(low)},<{_written(high)}"
            messages.append(f"{package} {installed} is installed, trl_entropy is tested with {package}{expected}")
    return messages


def warn_if_untested() -> None:
    """Warn, once and by name, about versions that trl_entropy was not tested with."""
    messages = untested_versions()
    if messages:
        warnings.warn("; ".join(messages) + ". Numbers may be wrong without an error.", stacklevel=3)
