"""What a run directory holds and what it lacks, in sentences. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from trl_entropy.analysis.run import Run


class Part(NamedTuple):
    """Something that a run may hold of its steps, what it is called, and what to do to have it."""

    name: str
    remedy: str
    steps: Callable[[Run], Iterable[int]]


def _steps_with(key: str) -> Callable[[Run], Iterable[int]]:
    return lambda run: [row["step"] for row in run.rows(key)]


PARTS = {
    "held_out": Part(
        "evaluation on held-out prompts during training",
        "Train with eval_strategy: steps",
        lambda run: run.training_evaluation.index,
    ),
    "completions": Part(
        "completions of the steps",
        "Train with log_completions: true",
        lambda run: run.completions_steps,
    ),
    "evaluation": Part(
        "evaluated checkpoints",
        "Run trl-entropy evaluate --run RUN",
        lambda run: run.evaluated_steps,
    ),
    "entropy_change": Part(
        "measured entropy changes", "Train with entropy_probe: true", _steps_with("entropy/delta_measured")
    ),
    "tokens": Part(
        "probe batches with the entropy of each token",
        "Train with entropy_probe: true",
        lambda run: run.probe_steps("entropy"),
    ),
    "attribution": Part(
        "attributions of an entropy change",
        "Train with entropy_probe: true and entropy_attribution: token",
        lambda run: run.probe_steps("attribution"),
    ),
    "noise_scale": Part("noise scales", "Train with noise_scale_probe: true", _steps_with("noise_scale/simple")),
    "fisher": Part("Fisher kernels", "Train with fisher_probe: true", lambda run: run.probe_steps("fisher")),
    "entropy_control": Part(
        "entropies measured for a control", "Train with entropy_control: hold", _steps_with("entropy_control/entropy")
    ),
}


def describe(run: Run, part: str) -> str:
    """
    A sentence on what the run holds of a part, or how to have it.

    Args:
        run: the run.
        part: one of [`PARTS`].
    """
    name, remedy, find = PARTS[part]
    steps = sorted({int(step) for step in find(run)})
    if steps:
        return f"{run.name} holds {name}: {steps_text(steps)}."
    return f"{run.name} holds no {name}, so there is nothing to show. {remedy}."


def steps_text(steps: Sequence[int], most: int = 6) -> str:
    """Steps in words, runs of consecutive ones as from-to: "steps 1, 3 to 7"."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], step]
        else:
            spans.append([step])
    shown = [" to ".join(map(str, span)) for span in spans[:most]] + ["..."] * (len(spans) > most)
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(shown)}"
