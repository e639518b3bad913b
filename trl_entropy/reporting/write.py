"""Writes the files of `trl-entropy report`: the training figure of a run, and the page of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_entropy.runs.directory import RunDirectory


def write_report(path: Path) -> Path:
    """
    Write the page of a run, and one figure of its reward, held-out pass@1, entropy, and measured entropy changes.

    Args:
        path: the run directory.

    Returns:
        The path of the figure, `report/training.png`; the page is `report/index.html`.

    Raises:
        ValueError: when the directory holds no metrics.
    """
    from trl_entropy.analysis import plots
    from trl_entropy.reporting.figures import draw

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
    run.report_path.mkdir(parents=True, exist_ok=True)
    target = run.report_path / "training.png"
    target.write_bytes(draw("training", "", panels).png)
    write_page([path], run.report_path / "index.html")
    return target


def write_page(paths: Sequence[Path], target: Path) -> Path:
    """
    Write the page of one or several runs, and its figures as PNG files beside it.

    Args:
        paths: run directories; their names must differ.
        target: the HTML file.

    Raises:
        ValueError: when a directory holds no metrics, or two have the same name.
    """
    from trl_entropy.reporting.page import render

    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(
            f"The page names each run by its directory, and these names are not all different: {names}. Rename one."
        )
    page, figures = render(paths)
    target.parent.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (target.parent / f"{figure.name}.png").write_bytes(figure.png)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(target)
