"""What the experiments at a checkpoint share: options, checks, and where table, JSON and figure go."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.redraws import Cache
from trl_entropy.experiments.state import FixedState
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.directory import describe_environment
from trl_entropy.runs.strict_json import without_nan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Command:
    """
    An experiment at a checkpoint, `trl-entropy experiment NAME --checkpoint RUN/checkpoint-N`.

    Args:
        name: of the module, the output folder and its files.
        purpose: the first line of `--help`.
        options: own options, name -> (default, least value, help); whole numbers.
        compute: from the fixed state, a cache and the options to plain data.
        table: the result as text.
        draw: the result into two axes.
        check: raises `ValueError` if the options do not fit the checkpoint, before anything is loaded.
    """

    name: str
    purpose: str
    options: Mapping[str, tuple[int, int, str]]
    compute: Callable[[FixedState, Cache, argparse.Namespace], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    draw: Callable[[dict[str, Any], Axes, Axes], None]
    check: Callable[[Checkpoint, argparse.Namespace], None] = lambda checkpoint, options: None

    def main(self, argv: list[str] | None = None) -> None:
        """Run, print the table, write `NAME.json` and `NAME.png`."""
        options = self._parser().parse_args(argv)
        quiet_libraries()
        try:
            self._check(options)
            checkpoint = Checkpoint.read(options.checkpoint)
            self.check(checkpoint, options)
        except ValueError as error:
            sys.exit(f"Error: {error}")
        output = options.output or checkpoint.path.parent / "experiments" / f"{self.name}-{checkpoint.step}"
        output.mkdir(parents=True, exist_ok=True)
        result = self._run(options, checkpoint, output)
        numbers, figure = output / f"{self.name}.json", output / f"{self.name}.png"
        numbers.write_text(json.dumps(without_nan(result), indent=2) + "\n", encoding="utf-8")
        self._draw(result, figure)
        print(self.table(result))
        print(f"\n{result['seconds']:.0f} s\nnumbers {numbers}\nfigure  {figure}")

    def _run(self, options: argparse.Namespace, checkpoint: Checkpoint, output: Path) -> dict[str, Any]:
        start = time.perf_counter()
        state = FixedState(checkpoint, output, options.seed)
        result = self.compute(state, Cache.of(output, checkpoint, options.seed), options)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        return {
            "settings": settings,
            "checkpoint": str(checkpoint.path),
            "task": asdict(checkpoint.task),
            **result,
            "seconds": time.perf_counter() - start,
            "environment": describe_environment(),
        }

    def _draw(self, result: dict[str, Any], target: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        self.draw(result, left, right)
        figure.savefig(target, dpi=150)
        plt.close(figure)

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"trl-entropy experiment {self.name}", description=self.purpose)
        parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoint-N with optimizer.pt")
        for name, (default, _, text) in self.options.items():
            parser.add_argument(_flag(name), type=int, default=default, help=f"{text} (default: {default})")
        parser.add_argument("--batch-size", type=int, default=128, help="completions scored at a time")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--output", type=Path, help=f"default: RUN/experiments/{self.name}-N")
        return parser

    def _check(self, options: argparse.Namespace) -> None:
        least = {name: minimum for name, (_, minimum, _) in self.options.items()}
        for name, minimum in {**least, "batch_size": 1, "seed": 0}.items():
            if getattr(options, name) < minimum:
                raise ValueError(f"{_flag(name)} is {getattr(options, name)}; use {minimum} or more")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def with_interval(entry: Mapping[str, float], scale: float = 1.0) -> str:
    """`value [low, high]`."""
    return f"{scale * entry['value']:.4g} [{scale * entry['low']:.4g}, {scale * entry['high']:.4g}]"
