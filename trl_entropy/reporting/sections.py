"""The sections of the page: a text, figures and tables for each thing that a run may have measured."""

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
    """A heading with its text, figures and tables."""

    title: str
    text: str
    figures: list[Figure]
    tables: list[Table] = field(default_factory=list)


def sections_of(runs: list[Run]) -> list[Section]:
    """The sections for which the runs have files."""
    return [section for build in _SECTIONS if (section := build(runs)) is not None]


def _training(runs: list[Run]) -> Section:
    steps = compare_runs([run.path for run in runs])
    keys = [key for key in ("reward", "entropy/policy") if key in steps]
    figure = draw("training-overview", "Mean reward and entropy of the completions of each step.",
                   [lambda axes, key=key: plots.plot_runs(axes, steps, key) for key in keys])  # fmt: skip
    return Section(
        "Reward and entropy",
        "Reward and policy entropy over training, measured on each step's own completions.",
        [figure],
    )


def _prediction(runs: list[Run]) -> Section | None:
    probed = [(run, rows) for run in runs if (rows := run.rows("entropy/delta_measured"))]
    if not probed:
        return None
    figures = []
    for run, rows in probed:
        panels: list[Callable] = [lambda axes, rows=rows: plots.plot_entropy_change(axes, rows)]
        if halves := [row for row in rows if row.get("entropy/half_b_measured") is not None]:
            panels.append(lambda axes, halves=halves: plots.plot_prediction(axes, halves, "second_order"))
        caption = f"{run.name}: entropy change of each probed step; right: prediction against measurement."
        figures.append(draw(f"entropy-change-{run.name}", caption, panels))
    text = (
        "How much each probed step changed the policy's entropy, measured on completions that it was not trained on, "
        "and the change that was predicted from the update. On the right, the prediction comes from one half of the "
        "prompts and the measurement from the other; on the line both are equal."
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
        caption = f"{run.name}: results on held-out problems, with 95 % intervals over problems."
        figures.append(draw(f"evaluation-{run.name}", caption, panels))
    text = (
        "Results of trl-entropy evaluate on held-out problems. pass@k is the probability that at least one of k "
        "samples is correct. The intervals are over problems: Student's t, and Wilson's for shares."
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
            caption = f"{run.name}: tokens with most of the entropy, at the first and the last evaluated checkpoint."
            figures.append(draw(f"tokens-{run.name}", caption, panels))
    text = (
        "For each token, the entropy of the distributions from which it was drawn, summed over all samples of a "
        "checkpoint, as a share of the total. A token has a long bar if it is drawn often where the entropy is high."
    )
    return Section("Tokens with most of the entropy", text, figures) if figures else None


def _noise_scale(runs: list[Run]) -> Section | None:
    figures = [
        draw(
            f"noise-scale-{run.name}",
            f"{run.name}: gradient noise scale over the steps so far (95 %), and the prompts in a step.",
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
        "The gradient noise scale is the number of prompts at which the noise of the gradient equals its signal. With "
        "far fewer prompts a step is mostly noise; with far more it gains little from them."
    )
    if any(run.rows("resampling/num_rounds") for run in runs):
        text += (
            " Where groups with equal rewards were replaced, it is about the accepted groups, not about all prompts."
        )
    return Section("Gradient noise", text, figures) if figures else None


def _kernel(runs: list[Run]) -> Section | None:
    figures = []
    for run in runs:
        for step in run.probe_steps("fisher")[-1:]:
            caption = f"{run.name}, step {step}: cosines of the Fisher kernel; lines separate the prompts."
            figures.append(
                draw(f"kernel-{run.name}", caption, [lambda a, r=run, s=step: plots.plot_kernel(a, r.kernel(s))])
            )
    text = (
        "The cosine of two completions says how training on one changes the log-probability of the other: making one "
        "more likely makes the other more likely if the cosine is positive, and less likely if it is negative."
    )
    return Section("How completions influence one another", text, figures) if figures else None


_SECTIONS: tuple[Callable[[list[Run]], Section | None], ...] = (
    _training,
    _prediction,
    _noise_scale,
    _kernel,
    _evaluation,
    _high_entropy_section,
)
