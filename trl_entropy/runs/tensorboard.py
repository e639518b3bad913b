"""TensorBoard's tab of custom scalars draws together what belongs together; a resumed run goes on in its folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from trl_entropy.runs.trackers import shown

MULTILINE, MARGIN = "Multiline", "Margin"
Layout = dict[str, dict[str, list]]

_CHANGES = ["measured", "linear", "second_order", "trapezoid"]
_NOISE = "noise_scale/simple", "noise_scale/adam"

# Category -> the probe that it needs, or None -> chart -> keys of one unit; a margin: value, lower, upper.
_LINES: dict[str, tuple[str | None, Mapping[str, list[str]]]] = {
    "Training": (None, {
        "reward": ["reward"],
        "entropy and surprisal, nats/token": ["entropy/policy", "entropy/surprisal"],
        "importance ratio": ["ratio/median", "ratio/p90", "ratio/p99", "ratio/max"],
        "completion length, tokens": [
            f"completions/{name}_length" for name in ("mean", "min", "max", "mean_terminated")
        ],
    }),
    "Entropy change of a step": ("entropy", {
        "measured and predicted, nats/token": [
            *(f"entropy/delta_{name}" for name in _CHANGES), "entropy/delta_cross_prompt", "entropy/delta_in_sample",
        ],
        "what made it, nats/token": [f"entropy/delta_{part}" for part in ("momentum", "weight_decay", "gradient")],
        "summed over the run, nats/token": ["entropy/probe_batch", *(f"entropy/integral_{name}" for name in _CHANGES)],
        "slope of measured on predicted": [f"entropy/cross_{name}_corrected_slope" for name in _CHANGES],
        "effective sample size of the probe batch": ["entropy/importance_ess", "entropy/num_completions"],
    }),
    "Reward change of a step": ("entropy", {
        "reward, measured and predicted": [f"reward/delta_{name}" for name in ("measured", "linear", "trapezoid")],
        "reward, summed over the run": [
            "reward/probe_batch", *(f"reward/integral_{name}" for name in ("measured", "linear", "trapezoid"))
        ],
        "reward, slope of measured on predicted": [
            f"reward/cross_{name}_corrected_slope" for name in ("measured", "linear", "trapezoid")
        ],
    }),
    "Entropy control": ("entropy_control", {
        "change of a step, nats/token": [
            f"entropy_control/{name}"
            for name in ("delta_optimizer", "delta_predicted", "target_change", "realised_previous")
        ],
        "correction, in lengths of the step": ["entropy_control/relative_size"],
    }),
    "Gradient noise": ("noise_scale", {
        "signal to noise of a step": ["noise_scale/signal_to_noise", "noise_scale/adam_signal_to_noise"],
        "prompts of a step, and as many as the noise asks for": [
            "noise_scale/num_prompts", *_NOISE, "noise_scale/suggested_prompts_lower",
            "noise_scale/suggested_prompts_upper",
        ],
    }),
    "How completions act on one another": ("fisher", {
        "mean cosine": ["fisher/cosine_same_prompt", "fisher/cosine_cross_prompt"],
        "change of log-probability, nats": ["fisher/change_predicted_rms", "fisher/change_measured_rms"],
        "rank of the kernel": ["fisher/effective_rank", "fisher/participation_ratio"],
    }),
    "Do completions depend on their prompts": ("mutual_information", {
        "mutual information, nats per completion": [
            f"mutual_information/{name}" for name in ("lower", "upper", "limit")
        ],
    }),
    "Effective sample size": ("effective_sample_size", {
        "completions": ["ess/loss_weights", "ess/importance_weights", "ess/num_completions"],
    }),
}  # fmt: skip
_MARGINS = {
    "Gradient noise": {f"{key}, prompts, 95 %": [key, f"{key}_lower", f"{key}_upper"] for key in _NOISE},
}


def layout_of(probes: Collection[str]) -> Layout:
    """
    What `SummaryWriter.add_custom_scalars` takes.

    Args:
        probes: names of the run's probes; charts of others are left out.
    """
    layout: Layout = {}
    for category, (probe, charts) in _LINES.items():
        if probe is None or probe in probes:
            lines = {title: [MULTILINE, [_only(key) for key in keys]] for title, keys in charts.items()}
            margins = {
                title: [MARGIN, [_tag(key) for key in keys]] for title, keys in _MARGINS.get(category, {}).items()
            }
            layout[category] = lines | margins
    return layout


def _tag(key: str) -> str:
    """As transformers writes a key of training."""
    return f"train/{key}"


def _only(key: str) -> str:
    """The expression that finds this key's tag and none that begins with it, such as its standard error."""
    return f"{re.escape(_tag(key))}$"


def log_into(callbacks: Iterable[TrainerCallback], folder: Path) -> None:
    """Have TensorBoard's files written into `folder`, unless the user has named another place."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:  # no TENSORBOARD_LOGGING_DIR
            callback.logging_dir = str(folder)


def continue_after(callbacks: Iterable[TrainerCallback], step: int) -> None:
    """Have TensorBoard go on after `step` in the run's folder: what an earlier attempt wrote later is hidden."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir:
            callback.tb_writer = callback._SummaryWriter(log_dir=callback.logging_dir, purge_step=step + 1)


def lay_out(callbacks: Iterable[TrainerCallback], probes: Collection[str]) -> None:
    """Have TensorBoard draw together what belongs together, on its tab of custom scalars."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_custom_scalars(layout_of(probes))


def add_later(callbacks: Iterable[TrainerCallback], step: int, metrics: Mapping[str, float]) -> None:
    """Have TensorBoard show numbers of an earlier step."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for name, value in shown(metrics).items():
                callback.tb_writer.add_scalar(_tag(name), value, step)
