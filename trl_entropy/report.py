"""Figures of a run: `trl-entropy report RUN` writes `RUN/report/training.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trl_entropy.run_log import RunDirectory


def write_report(path: Path) -> Path:
    """
    Draw reward, held-out pass@1 and entropy of a run.

    Args:
        path: the run directory.

    Returns:
        Path of the figure.

    Raises:
        ValueError: when the directory holds no metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from trl_entropy import plots

    run = RunDirectory(path)
    metrics, evaluation = run.metrics(), run.evaluation()
    if not metrics:
        raise ValueError(f"{path} holds no metrics.jsonl with a line in it; is it a run directory?")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    plots.plot_reward(left, metrics)
    plots.plot_pass_at_1(middle, evaluation)
    plots.plot_entropy(right, metrics, evaluation)
    run.report_path.mkdir(parents=True, exist_ok=True)
    target = run.report_path / "training.png"
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def main(argv: list[str] | None = None) -> None:
    """Draw the figures of the runs named on the command line."""
    parser = argparse.ArgumentParser(prog="trl-entropy report", description="Draw the figures of a run.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    for path in parser.parse_args(argv).runs:
        print(write_report(path))


if __name__ == "__main__":
    main()
