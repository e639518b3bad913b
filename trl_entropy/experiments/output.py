"""What the experiments share in their output: thirds of a run, cells of tables, the file of numbers, the figure."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trl_entropy.runs.durable import replace_text
from trl_entropy.runs.strict_json import without_nan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item")
Numbers = dict[str, float]  # named numbers, such as an estimate's `value`, `stderr`, `low` and `high`


def thirds(items: Sequence[Item]) -> dict[str, Sequence[Item]]:
    """All items, and the first, second and last third of them, each under its name."""
    cut = [round(len(items) * i / 3) for i in range(4)]
    return {"all": items, **{f"third {i + 1}": items[cut[i] : cut[i + 1]] for i in range(3)}}


def with_interval(entry: Mapping[str, float], scale: float = 1.0, form: str = ".4g") -> str:
    """`value [low, high]`, each multiplied by `scale` and formatted by `form`."""
    value, low, high = (format(scale * entry[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def write_numbers(path: Path, result: object) -> None:
    """Write plain data as JSON; nan and infinities become null."""
    replace_text(path, json.dumps(without_nan(result), indent=2) + "\n")


@contextlib.contextmanager
def saved_figure(path: Path, size: tuple[float, float], dpi: int = 150) -> Iterator[Figure]:
    """An empty figure of `size` inches to draw into; it is saved as an image and closed at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=size, layout="constrained")
    yield figure
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """`--import_functions` and `--trainer_factory`, as `trl-entropy evaluate` has them."""
    parser.add_argument(
        "--import_functions",
        "--import-functions",
        action="store_true",
        help="import the files with functions of one's own that the run was trained with, which runs them",
    )
    factory = "path/to/script.py:function, which returns the trainer of a run of a script of one's own"
    parser.add_argument("--trainer_factory", "--trainer-factory", help=factory)
