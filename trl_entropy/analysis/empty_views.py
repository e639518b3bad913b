"""Why a view has no rows: which setting its numbers need, and which steps have them. Imports no torch."""

from __future__ import annotations

from trl_entropy.analysis.run import Run

_NEEDS = {
    "steps": "training has logged no step yet",
    "parts": "no step was split into its parts, which entropy_probe: true with entropy_attribution: sequence or token "
    "does",
    "evaluation": "nothing was evaluated, which eval_strategy: steps or trl-entropy evaluate --run does",
    "groups": "there are no completions of that step, which log_completions: true or entropy_probe: true keep",
    "completions": "there are no completions of that step, which log_completions: true or entropy_probe: true keep",
    "tokens": "there is no probes/rollouts of that step, which entropy_probe: true writes, or no such row in it",
    "dropped": "no group was dropped at that step, which resample_uninformative_groups: true alone does",
    "measured_completions": "there is no probes/entropy of that step, which entropy_probe: true writes",
    "measured_tokens": "there is no probes/entropy of that step, which entropy_probe: true writes, or no such row in "
    "it",
}


def why_empty(run: Run, name: str, step: int | None) -> str:
    """A sentence on the view `name` of `run`, which has no rows; with the steps that would have some."""
    asked = f"{run.path}: view {name!r}" + (f" of step {step}" if step is not None else "")
    return f"{asked} has no rows, since {_NEEDS[name]}{_steps_with(run, name)}."


def _steps_with(run: Run, name: str) -> str:
    if name in ("steps", "parts", "evaluation", "dropped"):
        return ""
    known = run.probe_steps("entropy" if name.startswith("measured") else "rollouts")
    if name in ("groups", "completions"):
        known = sorted({*known, *run.completions_steps})
    if not known:
        return "; no step of this run has it"
    shown = ", ".join(map(str, known[-8:]))
    return f"; steps that have it: {'..., ' if len(known) > 8 else ''}{shown}"
