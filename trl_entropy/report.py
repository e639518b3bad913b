"""Figures of a run: `trl-entropy report RUN` writes `RUN/report/training.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trl_entropy.run_log import RunDirectory


def write_report(path: Path) -> Path:
    """
    Draw reward, held-out pass@1, entropy, and its change in single steps where it was probed.

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
    panels = [
        lambda axes: plots.plot_reward(axes, metrics),
        lambda axes: plots.plot_pass_at_1(axes, evaluation),
        lambda axes: plots.plot_entropy(axes, metrics, evaluation),
    ]
    if any("entropy/delta_measured" in row for row in metrics):
        panels.append(lambda axes: plots.plot_entropy_change(axes, metrics))
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for draw, axes in zip(panels, all_axes, strict=True):
        draw(axes)
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
