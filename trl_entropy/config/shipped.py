"""The configs and accelerate's files that the package brings, by name: a wheel has them without a clone."""

from __future__ import annotations

from pathlib import Path

_SHIPPED = Path(__file__).parents[1] / "shipped"


def shipped_configs() -> dict[str, Path]:
    """Files of settings for `--config`, by name."""
    return {path.stem: path for path in sorted((_SHIPPED / "configs").glob("*.yaml"))}


def shipped_engines() -> dict[str, Path]:
    """Files for `accelerate launch --config_file`, by name."""
    return {path.stem: path for path in sorted((_SHIPPED / "launch").glob("*.yaml")) if path.stem != "skypilot"}


def config_path(given: str) -> str:
    """
    The path of a file of settings, or of the config that the package brings under this name.

    Raises:
        ValueError: if a bare name is neither.
    """
    if Path(given).exists() or Path(given).name != given or "." in given:
        return given
    known = shipped_configs()
    if given not in known:
        raise ValueError(
            f"--config: there is no file {given}, and the package brings no such config: {', '.join(known)}."
        )
    return str(known[given])
