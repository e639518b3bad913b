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
    maximum, a histogram, (`"E"`) the per-completion sums of the probe batch, (`"U"`) products of prompt groups of the
    step's own completions (`entropy_probe_completions="rollouts"`), (`"groups"`) two products of each prompt group with the
    gradient and itself, or (`"pairs"`) products of all pairs of completions.

    What a number is about: `"E"` is all prompts, or those of `eval_dataset`. TRL's keys on rewards and completions are
    of the prompts as drawn. What comes of the step's own completions (`"U"`, `"groups"`, `"pairs"`, `entropy/policy`,
    ...) is of those prompts too, but with `resample_uninformative_groups` of accepted groups: `"U"` and `"groups"` of
    those alone, the rest of the step as it is, with groups that were kept uninformative in it. With `curriculum`
    prompts are drawn by it. Probe files say which in their metadata (`distribution`).
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
_CURRICULUM = [
    Metric(f"curriculum/num_{name}", "prompts", f"training prompts whose pass rate is {text}", "none")
    for name, text in (("hard", "low"), ("normal", "between the bounds"), ("easy", "high"))
]

_RESAMPLING = [
    Metric("resampling/num_rounds", "rounds", "rounds of generation beyond the first draw", "none"),
    Metric("resampling/num_uninformative", "groups", "groups of the first draw whose rewards are all equal", "none"),
    Metric(
        "resampling/num_kept_uninformative", "groups", "of the groups trained on, those without a gradient", "none"
    ),
    Metric("resampling/num_unused", "groups", "informative groups that were drawn beyond need", "none"),
    Metric("resampling/num_completions", "completions", "generated in all rounds", "none"),
    Metric("resampling/informative_share", "1", "informative share of the groups of all rounds", "none"),
    Metric(
        "resampling/completions_per_accepted_group", "completions", "generated / informative groups trained on", "none"
    ),
    Metric("resampling/tokens_per_accepted_group", "tokens", "the same in tokens of completions"),
]

_ENTROPY = (
    [
        Metric("entropy/probe_batch", "nats/token", "entropy of the probe batch E before the step", "E"),
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

_PARTS = {
    "momentum": "what the momentum of earlier steps makes",
    "weight_decay": "what weight decay makes",
    "gradient": "what this step's own completions make by the policy loss",
    "kl": "what the KL to the reference makes (beta)",
    "entropy_bonus": "what TRL's entropy bonus makes (entropy_coef)",
    "entropy_control": "what the correction by entropy_control makes",
}
RARE = 0.1  # a token is rare below this probability
OUTCOMES = ("correct", "incorrect")
OUTCOMES_BY_PROBABILITY = ("correct_rare", "correct_common", "incorrect_rare", "incorrect_common")
_CATEGORIES = {
    "correct": "completions with an advantage above 0",
    "incorrect": "completions with an advantage below 0",
    "correct_rare": "tokens of less than probability 0.1 in completions with an advantage above 0",
    "correct_common": "the other tokens of completions with an advantage above 0",
    "incorrect_rare": "tokens of less than probability 0.1 in completions with an advantage below 0",
    "incorrect_common": "the other tokens of completions with an advantage below 0",
}
_ATTRIBUTION = (
    [
        Metric(f"entropy/delta_{name}", "nats/token", f"{text} of entropy/delta_linear (T9)")
        for name, text in _PARTS.items()
    ]
    + [
        Metric(f"entropy/share_{name}", "1", f"{text}, over entropy/delta_linear (T9)")
        for name, text in _PARTS.items()
    ]
    + [Metric("entropy/attribution_rounding", "1", "what no part explains / sum of absolute values of all parts (T9)")]
    + [
        Metric(f"entropy/{key}", "1", f"{what}: {text}, over the run so far")
        for name, text in _CATEGORIES.items()
        for key, what in {
            f"share_{name}": "share of delta_gradient (T9)",
            f"share_{name}_low": "lower end of its 95 % interval (Fieller)",
            f"share_{name}_high": "upper end of its 95 % interval (Fieller)",
            f"token_share_{name}": "share of tokens (of completions, by sequence)",
        }.items()
    ]
)

_NOISE_SCALE = [
    Metric("noise_scale/num_prompts", "prompts", "prompt groups of the step", "groups"),
    Metric("noise_scale/gradient_error", "1", "|mean_n Y_n . g / |g|^2 - 1|", "groups"),
    Metric(
        "noise_scale/between_prompt_trace", "1", "tr(Sigma) that more completions a prompt leave, pooled", "groups"
    ),
    Metric("noise_scale/within_prompt_trace", "1", "the rest of tr(Sigma), which falls as 1/G, pooled", "groups"),
    Metric("noise_scale/between_prompt_share", "1", "share of tr(Sigma) between prompts, pooled", "groups"),
    Metric("noise_scale/num_coordinates_without_metric", "parameters", "left out of (T16): exp_avg_sq = 0", "none"),
] + [
    Metric(name.format(*names), unit, f"{text}{where}", "groups")
    for names, where in ((("simple", ""), ""), (("adam", "adam_"), ", in AdamW's metric before the step (T16)"))
    for name, unit, text in (
        ("noise_scale/{1}grad_sq_norm", "1", "|G|^2 of the expected gradient, unbiased, may be negative (T14), (T15)"),
        ("noise_scale/{1}grad_variance_trace", "1", "tr(Sigma) of one prompt group's gradient, unbiased (T14), (T15)"),
        ("noise_scale/{0}", "prompts", "tr(Sigma) / |G|^2, both pooled over the steps so far"),
        ("noise_scale/{0}_lower", "prompts", "lower end of its 95 % interval (Fieller)"),
        ("noise_scale/{0}_upper", "prompts", "upper end; none where |G|^2 is consistent with 0"),
        ("noise_scale/{1}signal_to_noise", "1", "|G|^2 / (tr(Sigma) / P) of a step, over the steps so far"),
        ("noise_scale/{1}suggested_prompts_lower", "prompts", "prompts for half of a noise-free step's progress"),
        ("noise_scale/{1}suggested_prompts_upper", "prompts", "the same at the interval's upper end"),
    )
]

_PAIRS = {"same_prompt": "pairs of one prompt", "cross_prompt": "pairs of two prompts"}
_PAIRS_BY_REWARD = _PAIRS | {
    f"{pairs}_{reward}": f"{text}, {reward.replace('_', ' ')}"
    for pairs, text in _PAIRS.items()
    for reward in ("equal_reward", "unequal_reward")
}
_FISHER = (
    [
        Metric("fisher/num_completions", "completions", "completions in the kernel (T12)", "pairs"),
        Metric("fisher/diagonal", "nats^2", "mean of K_ii", "pairs"),
        Metric("fisher/num_coordinates_without_metric", "parameters", "left out of M: exp_avg_sq = 0", "none"),
        Metric("fisher/effective_rank", "1", "exp(entropy of the normalised spectrum of K)", "pairs"),
        Metric("fisher/participation_ratio", "1", "(sum l)^2 / sum l^2 over the eigenvalues l of K", "pairs"),
        Metric("fisher/length_correlation", "1", "of cosines with T_i T_j, pairs of two prompts", "pairs"),
        Metric("fisher/cosine_prompt_difference", "1", "mean cosine of one prompt less that of two", "pairs"),
        Metric("fisher/cosine_prompt_difference_null_stddev", "1", "its spread when prompts are permuted", "pairs"),
        Metric("fisher/cosine_prompt_difference_p_value", "1", "share of permutations at least as large", "pairs"),
        Metric("fisher/change_predicted_rms", "nats", "predicted change of S_i by the step (T12), rms", "pairs"),
        Metric("fisher/change_measured_rms", "nats", "measured change of S_i, rms", "pairs"),
        Metric("fisher/change_slope", "1", "measured on predicted change, through the origin", "pairs"),
        Metric("fisher/change_correlation", "1", "of measured and predicted change", "pairs"),
    ]
    + [
        Metric(f"fisher/eigenvalue_{i}", "nats^2", f"eigenvalue {i} of K, from the largest", "pairs")
        for i in (1, 2, 3)
    ]
    + [Metric(f"fisher/{name}", "nats^2", f"mean of K_ij, {text}", "pairs") for name, text in _PAIRS.items()]
    + [
        Metric(f"fisher/{form}_{name}", "1", f"mean {text}, {pairs}", "pairs")
        for form, text in (("cosine", "cosine"), ("cosine_sq", "squared cosine"))
        for name, pairs in _PAIRS_BY_REWARD.items()
    ]
    + [
        Metric(f"fisher/change_share_{part}", "1", f"share of the predicted change: {text}", "pairs")
        for part, text in (
            ("own", "of the completion itself"),
            ("same_prompt", "of the others of its prompt"),
            ("other_prompts", "of other prompts"),
            ("momentum", "of earlier gradients"),
            ("weight_decay", "of the decay"),
        )
    ]
    + [
        Metric(f"fisher/trace_share_lora_{letter}", "1", f"share of LoRA's {letter} matrices in the trace of K", "sum")
        for letter in "AB"
    ]
)

_ENTROPY_CONTROL = [
    Metric(f"entropy_control/{name}", unit_, text, "E")
    for name, unit_, text in (
        ("entropy", "nats/token", "entropy before the step, of the control's own completions and the step's"),
        ("target_change", "nats/token", "change that the step was to make (T19)"),
        ("delta_optimizer", "nats/token", "first-order change by the optimizer's step alone"),
        ("delta_predicted", "nats/token", "first-order change by the step with its correction"),
        (
            "realised_previous",
            "nats/token",
            "change by the step before, between independent batches",
        ),
        ("slope", "1", "realised on predicted over the last 20 steps"),
        ("correction_coefficient", "1", "coefficient of the correction, made or only reported"),
        ("correction_coefficient_over_lr", "1", "the same over the learning rate: an entropy bonus's coefficient"),
        ("relative_size", "1", "length of the correction over that of the optimizer's step, in its metric"),
        ("infeasible", "1", "1 where the cap kept the correction below what the budget takes"),
        ("noise_share", "1", "part of <g, g> that is noise of the estimate of grad h"),
        ("price", "loss per nat/token", "loss that a nat per token costs, to first order"),
        ("active", "1", "whether steps are corrected"),
    )
]

_TOKEN_CONTROL = [
    Metric("token_control/num_tokens", "tokens", "tokens that token_control acts on in the step"),
    Metric(
        "token_control/mean_covariance", "nats x advantage", "their mean covariance of log-probability and advantage"
    ),
]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in _TRL
    + _CURRICULUM
    + _RESAMPLING
    + _STEP
    + _PROBES
    + _OPTIMIZER_STATE
    + _ENTROPY
    + _ENTROPY_OF_ROLLOUTS
    + _NOISE_SCALE
    + _FISHER
    + _ATTRIBUTION
    + _ENTROPY_CONTROL
    + _TOKEN_CONTROL
}

# What `trl-entropy evaluate` measures, each `_low` and `_high` where it has an interval; `pass@k` for k = 2, 4, ..
EVALUATION: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("pass@1", "1", "chance that one sample is right; pass@k: that one of k is, unbiased"),
        Metric("greedy_accuracy", "1", "share of prompts whose greedy completion is right"),
        Metric("answer_tags", "1", "share of samples with exactly one closed answer tag"),
        Metric("answer_tags_any", "1", "share of prompts with such a sample"),
        Metric("well_formed", "1", "share of samples of the form that the prompt asks for"),
        Metric("clipped", "1", "share of samples that did not end within the limit"),
        Metric("length_mean", "tokens", "mean length of samples, the end token counted"),
        Metric("length_std", "tokens", "standard deviation of the length over samples"),
        Metric("length_min", "tokens", "shortest sample"),
        Metric("length_max", "tokens", "longest sample"),
        Metric("max_correct_length", "tokens", "longest right sample"),
        Metric("entropy_mean", "nats/token", "entropy of the next-token distribution, sum over tokens / tokens"),
        Metric("entropy_std", "nats/token", "its standard deviation over tokens"),
        Metric("entropy_max", "nats/token", "its maximum over tokens"),
        Metric("entropy_p95", "nats/token", "its 95th percentile over tokens"),
        Metric("surprisal_mean", "nats/token", "-log pi of the sampled tokens, sum over tokens / tokens"),
        Metric("surprisal_std", "nats/token", "its standard deviation over tokens"),
        Metric("surprisal_max", "nats/token", "its maximum over tokens"),
        Metric("surprisal_p95", "nats/token", "its 95th percentile over tokens"),
        Metric("distinct_answers", "answers", "different answers among a prompt's samples, mean over prompts"),
    )
}


def unit(key: str) -> str:
    """Unit of a key; `<key>_stderr` has its key's unit, `time/*` is in seconds. Empty when unknown (a user's own)."""
    key = key.removeprefix("eval_").removesuffix("_stderr")
    if key.startswith("time/"):
        return "s"
    if key in EVALUATION or key.startswith("pass@"):
        return EVALUATION.get(key, EVALUATION["pass@1"]).unit
    return METRICS[key].unit if key in METRICS else ""
