"""The sections of the page: a text, figures and tables for each thing that a run may have measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from trl_entropy.analysis import plots
from trl_entropy.analysis.comparison import table_of_runs
from trl_entropy.analysis.run import Run
from trl_entropy.analysis.tokens import high_entropy_tokens
from trl_entropy.reporting.figures import Figure, draw
from trl_entropy.reporting.gaps import Gaps
from trl_entropy.reporting.tables import Table, agreement_table, checkpoint_table
from trl_entropy.runs.strict_json import Json

Panels = list[Callable]


@dataclass(frozen=True)
class Section:
    """A heading with its text, figures and tables."""

    title: str
    text: str
    figures: list[Figure]
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """What a section shows of one run."""

    figure: Figure
    table: Table | None = None


@dataclass(frozen=True)
class Topic:
    """A section that shows each run by itself; `of_run` is None for a run without the files."""

    title: str
    text: str
    of_run: Callable[[Run], Content | None]


def sections_of(runs: list[Run], configs: Mapping[str, Json], gaps: Gaps) -> list[Section]:
    """The sections for which the runs have files; what of them cannot be made is added to `gaps`."""
    names = ", ".join(run.name for run in runs)
    overview = gaps.attempt(_OVERVIEW, names, _training, runs, configs)
    topics = [_section(topic, runs, gaps) for topic in _TOPICS]
    return [section for section in (overview, *topics) if section is not None]


def _section(topic: Topic, runs: list[Run], gaps: Gaps) -> Section | None:
    found = [gaps.attempt(topic.title, run.name, topic.of_run, run) for run in runs]
    contents = [content for content in found if content is not None]
    if not contents:
        return None
    tables = [content.table for content in contents if content.table is not None]
    return Section(topic.title, topic.text, [content.figure for content in contents], tables)


_OVERVIEW = "Reward and entropy"


def _training(runs: list[Run], configs: Mapping[str, Json]) -> Section | None:
    steps = table_of_runs(runs, configs)
    keys = [key for key in ("reward", "entropy/policy") if key in steps]
    if not keys:
        return None
    figure = draw("training-overview", "Mean reward and entropy of the completions of each step.",
                   [lambda axes, key=key: plots.plot_runs(axes, steps, key) for key in keys])  # fmt: skip
    text = "Reward and policy entropy over training, measured on each step's own completions."
    if steps["settings"].nunique() > 1:
        text += " The runs differ in more than their seeds, so there is no mean over them; the legend says in what."
    return Section(_OVERVIEW, text, [figure])


def _prediction(run: Run) -> Content | None:
    rows = run.rows("entropy/delta_measured")
    if not rows:
        return None
    panels: Panels = [lambda axes: plots.plot_entropy_change(axes, rows)]
    if halves := [row for row in rows if row.get("entropy/half_b_measured") is not None]:
        panels.append(lambda axes: plots.plot_prediction(axes, halves, "second_order"))
    caption = f"{run.name}: entropy change of each probed step; right: prediction against measurement."
    return Content(draw(f"entropy-change-{run.name}", caption, panels), agreement_table(run))


def _evaluation(run: Run) -> Content | None:
    if run.evaluation.empty:
        return None
    metrics = list(run.evaluation["metric"].unique())
    passes = [metric for metric in metrics if metric.startswith("pass@")]
    rates = [*dict.fromkeys([*passes[:1], *passes[-1:]]), "greedy_accuracy"]
    panels: Panels = [
        lambda axes: plots.plot_checkpoints(axes, run.evaluation, rates),
        lambda axes: plots.plot_checkpoints(axes, run.evaluation, ["entropy_mean", "surprisal_mean"]),
        lambda axes: plots.plot_positions(axes, run.positions),
    ]
    caption = f"{run.name}: results on held-out problems, with 95 % intervals over problems."
    return Content(draw(f"evaluation-{run.name}", caption, panels), checkpoint_table(run))


def _high_entropy(run: Run) -> Content | None:
    steps = run.evaluated_steps
    if not steps:
        return None
    panels: Panels = [
        lambda axes, step=step: plots.plot_high_entropy_tokens(
            axes, high_entropy_tokens(run.evaluation_tokens_of(step))
        ).set_title(f"step {step}")
        for step in dict.fromkeys([steps[0], steps[-1]])
    ]
    caption = f"{run.name}: tokens with most of the entropy, at the first and the last evaluated checkpoint."
    return Content(draw(f"tokens-{run.name}", caption, panels))


def _noise_scale(run: Run) -> Content | None:
    rows = run.rows("noise_scale/simple")
    if not rows:
        return None
    panels: Panels = [
        lambda axes, metric=metric: plots.plot_noise_scale(axes, rows, metric)
        for metric in ("simple", "adam")
        if any(row.get(f"noise_scale/{metric}") is not None for row in rows)
    ]
    caption = f"{run.name}: gradient noise scale over the steps so far (95 %), and the prompts in a step."
    if run.rows("resampling/num_rounds"):
        caption += " Groups with equal rewards were replaced: it is about the accepted groups, not about all prompts."
    return Content(draw(f"noise-scale-{run.name}", caption, panels))


def _kernel(run: Run) -> Content | None:
    steps = run.probe_steps("fisher")
    if not steps:
        return None
    caption = f"{run.name}, step {steps[-1]}: cosines of the Fisher kernel; lines separate the prompts."
    return Content(draw(f"kernel-{run.name}", caption, [lambda axes: plots.plot_kernel(axes, run.kernel(steps[-1]))]))


_TOPICS = (
    Topic(
        "Entropy change: predicted against measured",
        "How much each probed step changed the policy's entropy, measured on completions that it was not trained on, "
        "and the change that was predicted from the update. On the right, the prediction comes from one half of the "
        "prompts and the measurement from the other; on the line both are equal.",
        _prediction,
    ),
    Topic(
        "Gradient noise",
        "The gradient noise scale is the number of prompts at which the noise of the gradient equals its signal. With "
        "far fewer prompts a step is mostly noise; with far more it gains little from them.",
        _noise_scale,
    ),
    Topic(
        "How completions influence one another",
        "The cosine of two completions says how training on one changes the log-probability of the other: making one "
        "more likely makes the other more likely if the cosine is positive, and less likely if it is negative.",
        _kernel,
    ),
    Topic(
        "Evaluation across checkpoints",
        "Results of trl-entropy evaluate on held-out problems. pass@k is the probability that at least one of k "
        "samples is correct. The intervals are over problems: Student's t, and Wilson's for shares.",
        _evaluation,
    ),
    Topic(
        "Tokens with most of the entropy",
        "For each token, the entropy of the distributions from which it was drawn, summed over all samples of a "
        "checkpoint, as a share of the total. A token has a long bar if it is drawn often where the entropy is high.",
        _high_entropy,
    ),
)
