"""Which extra of setup.cfg brings a package that is missing."""

from __future__ import annotations

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
