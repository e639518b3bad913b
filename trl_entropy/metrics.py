"""
The table of every metric key that trl_entropy adds: name, unit, how it is reduced over ranks and micro-batches.

TRL's own keys (`reward`, `entropy`, `clip_ratio/*`, `completions/*`, ...) keep TRL's meaning; those that the console
and the figures use are listed too. Imports no torch: a laptop that only reads run directories needs this file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """
    One key of `metrics.jsonl`. `reduce` says what crosses ranks and micro-batches before the one division: sums, a
    maximum, a histogram, (`"E"`) the per-completion sums of the probe batch, or (`"U"`) products of prompt groups of
    the step's own completions (`entropy_probe_source="rollouts"`).
    """

    name: str
    unit: str
    help: str
    reduce: str = "sum"


_TRL = [
    Metric("reward", "reward", "mean over the completions of the generation batch", "TRL"),
    Metric("loss", "reward", "loss of the step, mean over micro-batches and ranks", "TRL"),
    Metric("grad_norm", "1", "norm of the accumulated gradient before clipping", "TRL"),
    Metric("learning_rate", "1", "learning rate that this step used", "TRL"),
    Metric("step_time", "s", "seconds of the optimizer step, generation included", "TRL"),
    Metric("entropy", "nats/token", "mean over micro-batches of TRL's token mean; see entropy/policy", "TRL"),
    Metric(
        "kl", "nats/token", "KL to the start policy (k3 estimate): TRL's when beta > 0, else every kl_every", "sum"
    ),
]

# The reward that says whether the answer is right; its mean over sampled completions is pass@1.
PASS_AT_1 = "rewards/tag_pref/mean"

_STEP = [
    Metric("entropy/policy", "nats/token", "sum of token entropies / number of tokens of the step's completions"),
    Metric("entropy/surprisal", "nats/token", "sum of -log pi of the sampled tokens / number of tokens"),
    Metric("ratio/mean", "1", "importance ratio pi/pi_old, mean over tokens"),
    Metric("ratio/max", "1", "largest importance ratio", "max"),
    Metric("ratio/median", "1", "median importance ratio, to the width of a histogram bin", "histogram"),
    Metric("ratio/p90", "1", "90th percentile of the importance ratio, to the width of a histogram bin", "histogram"),
    Metric("ratio/p99", "1", "99th percentile of the importance ratio, to the width of a histogram bin", "histogram"),
    Metric("completions/think_length", "tokens", "mean length of the text before </think>, where there is one"),
    Metric("answer_check/rejected_fraction", "1", "completions whose answer is outside the limits: reward 0", "TRL"),
    Metric(
        "answer_check/timeout_fraction", "1", "completions whose check was killed at its deadline: reward 0", "TRL"
    ),
    Metric("answer_check/failed_fraction", "1", "completions whose check failed: reward 0", "TRL"),
    Metric("completions/answered", "1", "share of completions that stopped at the closing answer tag"),
]

_PROBES = [
    Metric("ess/loss_weights", "completions", "effective sample size of the loss weights (T3)"),
    Metric("ess/importance_weights", "completions", "effective sample size of the sequence ratios (T3)"),
    Metric("ess/num_completions", "completions", "completions with a non-zero advantage"),
]

_OPTIMIZER_STATE = [
    Metric(f"optimizer_state/{moment}_p{percent}", "1", f"{percent}th percentile of |{moment}|", "none")
    for moment in ("exp_avg", "exp_avg_sq")
    for percent in (1, 10, 50, 90, 99)
] + [
    Metric("optimizer_state/exp_avg_sq_num_zero", "parameters", "coordinates never updated (exp_avg_sq = 0)", "none"),
    Metric("optimizer_state/exp_avg_sq_num_below_eps_sq", "parameters", "coordinates with sqrt(v) below eps", "none"),
]

_CHANGES = {
    "measured": "measured change (T7), per-decision weights",
    "linear": "first-order prediction (T8)",
    "second_order": "second-order prediction before the step (T10)",
    "trapezoid": "trapezoid after the step (T10)",
}
_ENTROPY = (
    [
        Metric("entropy/probe", "nats/token", "entropy of the probe batch E before the step", "E"),
        Metric("entropy/num_completions", "completions", "size of E", "E"),
        Metric("entropy/importance_ess", "completions", "effective sample size of E after the step (T3)", "E"),
        Metric("entropy/sampler_ess", "completions", "the same of the weights of policy over sampler (vLLM)", "E"),
        Metric("entropy/noise_floor", "nats/token", "change by scoring E in other chunks, nothing moved", "E"),
        Metric("entropy/delta_measured_model", "nats/token", "change of the model in training's own precision", "E"),
        Metric("entropy/delta_measured_sequence", "nats/token", "measured change, sequence weights (T6)", "E"),
        Metric("entropy/delta_linear_sequence", "nats/token", "first order, sequence form (T8)", "E"),
        Metric("entropy/delta_placebo", "nats/token", "first order along an earlier step's update", "E"),
        Metric("entropy/delta_cov_natural", "nats/token", "rival: -Cov(log pi, A) over the step's tokens (T11)", "E"),
        Metric("entropy/delta_cov_policy_gradient", "nats/token", "rival: -Cov(log pi, pi A) (T11)", "E"),
    ]
    + [Metric(f"entropy/delta_{name}", "nats/token", text, "E") for name, text in _CHANGES.items()]
    + [
        Metric(f"entropy/half_{half}_{name}", "nats/token", f"{text}, on half {half} of E's prompts", "E")
        for half in "ab"
        for name, text in _CHANGES.items()
    ]
    + [
        Metric(f"entropy/error_{name}", "nats/token", f"{text} minus measured, on the same completions", "E")
        for name, text in _CHANGES.items()
        if name != "measured"
    ]
    + [
        Metric(f"entropy/integral_{name}", "nats/token", f"entropy at the start plus every {text} since", "E")
        for name, text in _CHANGES.items()
    ]
    + [
        Metric(f"entropy/{kind}_{statistic}", "1", f"{statistic} of measured on predicted over the steps so far", "E")
        for kind in (
            [f"same_sample_{name}" for name in _CHANGES if name != "measured"]
            + [f"cross_{name}" for name in _CHANGES]
            + ["placebo"]
        )
        for statistic in ("slope", "corrected_slope", "correlation", "r_squared", "ceiling_r_squared")
    ]
)

_ENTROPY_OF_ROLLOUTS = [
    Metric("entropy/delta_in_sample", "nats/token", "measured change (T7) on the step's own completions", "U"),
    Metric(
        "entropy/delta_cross_prompt", "nats/token", "first order, by this step's gradient, across prompts (T17)", "U"
    ),
    Metric("entropy/delta_cross_prompt_stderr_jackknife", "nats/token", "its conservative standard error (T17)", "U"),
    Metric("entropy/delta_same_sample", "nats/token", "the same with each prompt's effect on itself: biased", "U"),
    Metric("entropy/rollouts_gradient_error", "1", "|sum of the groups' gradients - gradient| / |gradient|", "U"),
    Metric("entropy/num_coordinates_without_metric", "parameters", "coordinates left out: exp_avg_sq = 0", "none"),
]

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in _TRL + _STEP + _PROBES + _OPTIMIZER_STATE + _ENTROPY + _ENTROPY_OF_ROLLOUTS
}


def unit(key: str) -> str:
    """Unit of a key; `<key>_stderr` has its key's unit, `time/*` is in seconds. Empty when unknown (a user's own)."""
    key = key.removeprefix("eval_").removesuffix("_stderr")
    if key.startswith("time/"):
        return "s"
    return METRICS[key].unit if key in METRICS else ""
