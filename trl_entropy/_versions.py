"""The versions of TRL and transformers that were tested, and which extra brings a package that is missing."""

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


# What a module is imported from, and the extra of setup.cfg that installs it.
_TRAINING = (
    "torch",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "jaxtyping",
    "psutil",
    "filelock",
    "math_verify",
)
EXTRAS = {
    **dict.fromkeys((*_TRAINING, "tensorboard"), "train"),
    **{"deepspeed": "deepspeed", "vllm": "vllm", "bitsandbytes": "quantization", "gguf": "gguf"},
}


def what_to_install(error: ModuleNotFoundError) -> str | None:
    """What is missing and how to have it, in a sentence; None if the package has no extra with that module."""
    name = (error.name or "").split(".")[0]
    if name not in EXTRAS:
        return None
    return f"{name} is not installed; it comes with pip install 'trl_entropy[{EXTRAS[name]}]'"
