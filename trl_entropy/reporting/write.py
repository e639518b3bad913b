"""Writes what `trl-entropy report` leaves: the figure of a run, and the page of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_entropy.runs.directory import RunDirectory


def write_report(path: Path) -> Path:
    """
    Draw reward, held-out pass@1, entropy, and its change in single steps where it was probed; write the page too.

    Args:
        path: the run directory.

    Returns:
        Path of the figure; the page is `index.html` beside it.

    Raises:
        ValueError: when the directory holds no metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from trl_entropy.analysis import plots

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
    write_page([path], run.report_path / "index.html")
    return target


def write_page(paths: Sequence[Path], target: Path) -> Path:
    """
    Write the page of one or several runs, and its figures as PNG beside it.

    Args:
        paths: run directories of different names.
        target: the HTML file.

    Raises:
        ValueError: when a directory holds no metrics, or two have the same name.
    """
    from trl_entropy.reporting.page import render

    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"runs are told apart by their directories' names, and these are not all different: {names}")
    page, figures = render(paths)
    target.parent.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (target.parent / f"{figure.name}.png").write_bytes(figure.png)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(target)
