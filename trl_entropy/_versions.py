"""The versions of TRL and transformers that the overrides were written against and tested with."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

# First tested version, and first version after the tested ones. Minor releases of TRL change private methods.
TESTED = {"trl": ((1, 16), (1, 17)), "transformers": ((5, 23), (5, 24))}


def _parse(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def untested_versions() -> list[str]:
    """One sentence for each installed package that lies outside the tested range."""
    messages = []
    for package, (low, high) in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not low <= _parse(installed) < high:
            expected = f">={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
            messages.append(f"{package} {installed} is installed, trl_entropy is tested with {package}{expected}")
    return messages


def warn_if_untested() -> None:
    """Warn, once and by name, about an upstream version that trl_entropy was not tested with."""
    messages = untested_versions()
    if messages:
        warnings.warn("; ".join(messages) + ". Numbers may be wrong without an error.", stacklevel=3)
