"""What the experiments at a checkpoint share: their options and checks, and where table, numbers and figure go."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.output import add_import_options, saved_figure, write_numbers
from trl_entropy.experiments.redraws import Cache
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.memory import GIB, free_memory
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.directory import describe_environment
from trl_entropy.runs.file_errors import check_writable, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Model, moments, gradient, the step and its two ends, and what one pass along the step takes.
VECTORS_OF_STATE = 12

Result = TypeVar("Result", bound=Mapping[str, object])


@dataclass(frozen=True)
class Command(Generic[Result]):
    """
    An experiment at a checkpoint, `trl-entropy experiment NAME --checkpoint RUN/checkpoint-N`.

    Args:
        name: of the module, of the output folder and of the files in it.
        purpose: the first line of `--help`.
        options: the experiment's own options, name -> (default, smallest allowed value, help); whole numbers.
        compute: makes the result, as plain data, from the fixed state, a cache and the options.
        table: writes the result as text.
        draw: draws the result into two axes.
        check: raises `ValueError` if the options do not fit the checkpoint; called before anything is loaded.
        vectors: float32 vectors of the model's parameters that are held at once, about; memory is checked for them.
    """

    name: str
    purpose: str
    options: Mapping[str, tuple[int, int, str]]
    compute: Callable[[FixedState, Cache, argparse.Namespace], Result]
    table: Callable[[Result], str]
    draw: Callable[[Result, Axes, Axes], None]
    check: Callable[[Checkpoint, argparse.Namespace], None] = lambda checkpoint, options: None
    vectors: Callable[[Checkpoint, argparse.Namespace], int] = lambda checkpoint, options: VECTORS_OF_STATE

    def main(self, argv: list[str] | None = None) -> None:
        """Run the experiment, print the table, and write `NAME.json` and `NAME.png`."""
        options = self._parser().parse_args(argv)
        quiet_libraries()
        try:
            self._check(options)
            checkpoint = Checkpoint.read(options.checkpoint, options.import_functions, options.trainer_factory)
            self.check(checkpoint, options)
            check_memory(checkpoint, self.vectors(checkpoint, options))
            output = options.output or checkpoint.path.parent / "experiments" / f"{self.name}-{checkpoint.step}"
            check_writable(output)
            start = time.perf_counter()
            state = FixedState(checkpoint, output, options.seed)
        except ValueError as error:
            sys.exit(f"Error: {describe(error)}.")
        for warning in filter(None, (checkpoint.warning, state.warning)):
            print(f"Warning: {warning}.", flush=True)
        result = self.compute(state, Cache.of(output, state, options.seed), options)
        seconds = time.perf_counter() - start
        numbers, picture = output / f"{self.name}.json", output / f"{self.name}.png"
        write_numbers(numbers, described(options, checkpoint, result, seconds))
        with saved_figure(picture, (10, 4)) as figure:
            self.draw(result, *figure.subplots(1, 2))
        print(self.table(result))
        print(f"\n{seconds:.0f} s\nnumbers {numbers}\nfigure  {picture}")

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"trl-entropy experiment {self.name}", description=self.purpose)
        parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoint-N, with its optimizer.pt")
        for name, (default, _, text) in self.options.items():
            parser.add_argument(_flag(name), type=int, default=default, help=f"{text} (default: {default})")
        parser.add_argument("--batch-size", type=int, default=128, help="completions scored at a time (default: 128)")
        add_import_options(parser)
        parser.add_argument("--seed", type=int, default=0, help="of all draws of completions (default: 0)")
        parser.add_argument("--output", type=Path, help=f"folder to write to (default: RUN/experiments/{self.name}-N)")
        return parser

    def _check(self, options: argparse.Namespace) -> None:
        least = {name: minimum for name, (_, minimum, _) in self.options.items()}
        for name, minimum in {**least, "batch_size": 1, "seed": 0}.items():
            if getattr(options, name) < minimum:
                raise ValueError(f"{_flag(name)} is {getattr(options, name)}; use {minimum} or more")


def check_memory(checkpoint: Checkpoint, vectors: int) -> None:
    """
    Check that so many float32 vectors of the model's parameters fit into the memory that is free.

    Raises:
        ValueError: when they do not.
    """
    number = checkpoint.num_parameters()
    on_cpu = checkpoint.config.get("use_cpu") or not torch.cuda.is_available()
    needed, free = 4 * vectors * number, free_memory() if on_cpu else torch.cuda.mem_get_info()[0]
    if needed > free:
        raise ValueError(
            f"{checkpoint.path} has {number:,} parameters, of which this experiment holds about {vectors} vectors in "
            f"float32, {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free; it was made for small models"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def described(
    options: argparse.Namespace, checkpoint: Checkpoint, result: Mapping[str, object], seconds: float
) -> dict[str, object]:
    """The result with the settings and the environment that it was made with."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {
        "settings": settings,
        "checkpoint": str(checkpoint.path),
        "task": asdict(checkpoint.task),
        "function_files": dict(checkpoint.function_files),
        **result,
        "seconds": seconds,
        "environment": describe_environment(),
    }
