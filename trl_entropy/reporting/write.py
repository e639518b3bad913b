"""Writes the files of `trl-entropy report`: the training figure of a run, and the page of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_entropy.reporting.gaps import Gaps
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.durable import replace_bytes, replace_text

if TYPE_CHECKING:
    from trl_entropy.analysis.run import Run
    from trl_entropy.reporting.figures import Figure


def write_report(path: Path, figures: bool = False) -> Path:
    """
    Write the page of a run, and one figure of its reward, held-out pass@1, entropy, and measured entropy changes.

    Args:
        path: the run directory.
        figures: also write the figures of the page as PNG beside it.

    Returns:
        The path of the figure, `report/training.png`, or of the page if the figure could not be drawn; the page is
        `report/index.html`.

    Raises:
        ValueError: when the directory holds no metrics.
    """
    from trl_entropy.analysis.run import load_run

    folder, run = RunDirectory(path).report_path, load_run(path)
    figure = Gaps().attempt("The figure of the training", run.name, _training_figure, run)
    page = _write_page_of([run], folder / "index.html", figures)
    if figure is None:
        return page
    target = folder / "training.png"
    replace_bytes(target, figure.png)
    return target


def write_report_of_finished_run(path: Path) -> Path | None:
    """
    [`write_report`] at the end of a training, which a page that cannot be written does not make fail.

    Returns:
        None if there is no page; the log says why in one line.
    """
    return Gaps().attempt("The page", path, write_report, path)


def _training_figure(run: Run) -> Figure:
    from trl_entropy.analysis import plots
    from trl_entropy.reporting.figures import draw

    metrics, evaluation = run.rows(), run.training_evaluation_rows
    panels = [
        lambda axes: plots.plot_reward(axes, metrics),
        lambda axes: plots.plot_pass_at_1(axes, evaluation),
        lambda axes: plots.plot_entropy(axes, metrics, evaluation),
    ]
    if any("entropy/delta_measured" in row for row in metrics):
        panels.append(lambda axes: plots.plot_entropy_change(axes, metrics))
    return draw("training", "", panels)


def write_page(paths: Sequence[Path], target: Path, figures: bool = False) -> Path:
    """
    Write the page of one or several runs.

    Args:
        paths: run directories; their names must differ, and one that is given twice is shown once.
        target: the HTML file.
        figures: also write the figures of the page as PNG beside it.

    Raises:
        ValueError: when a directory holds no metrics, or two have the same name.
    """
    from trl_entropy.analysis.comparison import distinct
    from trl_entropy.analysis.run import load_run

    return _write_page_of([load_run(path) for path in distinct(paths)], target, figures)


def _write_page_of(runs: list[Run], target: Path, figures: bool) -> Path:
    from trl_entropy.reporting.page import render

    page, drawn = render(runs)
    for figure in drawn if figures else []:
        replace_bytes(target.parent / f"{figure.name}.png", figure.png)
    replace_text(target, page)
    return target
