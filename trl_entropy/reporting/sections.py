"""Sections of a run's page: what each shows, its figures and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trl_entropy.analysis import plots
from trl_entropy.analysis.comparison import compare_runs
from trl_entropy.analysis.run import Run, high_entropy_tokens
from trl_entropy.reporting.figures import Figure, draw
from trl_entropy.reporting.tables import Table, agreement_table, checkpoint_table


@dataclass(frozen=True)
class Section:
    """A heading with what belongs to it."""

    title: str
    text: str
    figures: list[Figure]
    tables: list[Table] = field(default_factory=list)


def sections_of(runs: list[Run]) -> list[Section]:
    """Those that the runs have files for."""
    return [section for build in _SECTIONS if (section := build(runs)) is not None]


def _training(runs: list[Run]) -> Section:
    steps = compare_runs([run.path for run in runs])
    keys = [key for key in ("reward", "entropy/policy") if key in steps]
    figure = draw("training-overview", "Reward and entropy of each step's own completions.",
                   [lambda axes, key=key: plots.plot_runs(axes, steps, key) for key in keys])  # fmt: skip
    return Section("Reward and entropy", "What training did, step by step.", [figure])


def _prediction(runs: list[Run]) -> Section | None:
    probed = [(run, rows) for run in runs if (rows := run.rows("entropy/delta_measured"))]
    if not probed:
        return None
    figures = []
    for run, rows in probed:
        panels: list[Callable] = [lambda axes, rows=rows: plots.plot_entropy_change(axes, rows)]
        if halves := [row for row in rows if row.get("entropy/half_b_measured") is not None]:
            panels.append(lambda axes, halves=halves: plots.plot_prediction(axes, halves, "second_order"))
        caption = f"{run.name}: each probed step's change of entropy, and prediction against measurement."
        figures.append(draw(f"entropy-change-{run.name}", caption, panels))
    text = (
        "How much each probed step changed the policy's entropy, measured on completions of their own, and what the "
        "update predicted. On the right one half of the prompts predicts and the other measures: points on the line "
        "agree."
    )
    return Section("Entropy change: predicted against measured", text, figures,
                   [table for run, _ in probed if (table := agreement_table(run)) is not None])  # fmt: skip


def _evaluation(runs: list[Run]) -> Section | None:
    evaluated = [run for run in runs if not run.evaluation.empty]
    if not evaluated:
        return None
    figures = []
    for run in evaluated:
        metrics = list(run.evaluation["metric"].unique())
        passes = [metric for metric in metrics if metric.startswith("pass@")]
        panels: list[Callable] = [
            lambda axes, run=run, passes=passes: plots.plot_checkpoints(
                axes, run.evaluation, [passes[0], passes[-1], "greedy_accuracy"]
            ),
            lambda axes, run=run: plots.plot_checkpoints(axes, run.evaluation, ["entropy_mean", "surprisal_mean"]),
            lambda axes, run=run: plots.plot_positions(axes, run.positions),
        ]
        caption = f"{run.name}: held-out problems, 95 % intervals over problems."
        figures.append(draw(f"evaluation-{run.name}", caption, panels))
    text = (
        "Held-out problems, drawn by trl-entropy evaluate. pass@k is the chance that at least one of k samples is "
        "right. Intervals come from drawing problems again; where all problems agree they have no width."
    )
    return Section("Evaluation across checkpoints", text, figures, [checkpoint_table(run) for run in evaluated])


def _high_entropy_section(runs: list[Run]) -> Section | None:
    figures = []
    for run in runs:
        tokens = run.evaluation_tokens
        steps = sorted(tokens["step"].unique()) if len(tokens) else []
        panels = [
            lambda axes, step=step, tokens=tokens: plots.plot_high_entropy_tokens(
                axes, high_entropy_tokens(tokens[tokens["step"] == step])
            ).set_title(f"step {step}")
            for step in dict.fromkeys([*steps[:1], *steps[-1:]])
        ]
        if panels:
            caption = f"{run.name}: tokens that hold most of the entropy, first and last evaluated checkpoint."
            figures.append(draw(f"tokens-{run.name}", caption, panels))
    text = (
        "The entropy of the distribution that each token was drawn from, summed by token over all samples of a "
        "checkpoint: tokens with a long bar are drawn where the policy is undecided."
    )
    return Section("Tokens that hold the entropy", text, figures) if figures else None


def _noise_scale(runs: list[Run]) -> Section | None:
    figures = [
        draw(
            f"noise-scale-{run.name}",
            f"{run.name}: noise scale of the steps so far, 95 % interval, and the prompts that a step has.",
            [
                lambda axes, rows=rows, metric=metric: plots.plot_noise_scale(axes, rows, metric)
                for metric in ("simple", "adam")
                if any(row.get(f"noise_scale/{metric}") is not None for row in rows)
            ],
        )
        for run in runs
        if (rows := run.rows("noise_scale/simple"))
    ]
    text = (
        "The noise scale says, in prompts, at which batch size the gradient's noise equals its signal: a step with "
        "far fewer prompts follows noise, one with far more gains little by them."
    )
    if any(run.rows("resampling/num_rounds") for run in runs):
        text += " Where uninformative groups were replaced, it is that of accepted groups, not of all prompts."
    return Section("How noisy the gradient is", text, figures) if figures else None


def _kernel(runs: list[Run]) -> Section | None:
    figures = []
    for run in runs:
        for step in run.probe_steps("fisher")[-1:]:
            caption = f"{run.name}, step {step}: cosines of the Fisher kernel, completions prompt by prompt."
            figures.append(
                draw(f"kernel-{run.name}", caption, [lambda a, r=run, s=step: plots.plot_kernel(a, r.kernel(s))])
            )
    text = (
        "How completions act on one another: a step along one's score raises the log-probability of those with a "
        "positive cosine and lowers the others'. Lines part the prompts."
    )
    return Section("How completions act on one another", text, figures) if figures else None


_SECTIONS: tuple[Callable[[list[Run]], Section | None], ...] = (
    _training,
    _prediction,
    _noise_scale,
    _kernel,
    _evaluation,
    _high_entropy_section,
)
