"""
The table of metric keys that trl_entropy adds: name, unit, meaning, and how each is reduced over ranks and over steps.

TRL's own keys (`reward`, `entropy`, `clip_ratio/*`, `completions/*`, ...) keep TRL's meaning; those that the console
and the figures show are listed too. This module imports no torch, so that a run can be read on a laptop without it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from trl_entropy.runs.change_metrics import CHANGES, OF_TURNS
from trl_entropy.runs.metric import Metric, keys

# fmt: off
_TRL = keys("TRL", [
    ("reward", "reward", "mean reward of the completions of the generation batch"),
    ("loss", "reward", "loss of the step, mean over micro-batches and ranks"),
    ("step_time", "s", "seconds of the optimizer step, generation included"),
    ("entropy", "nats/token", "TRL's mean token entropy, averaged over micro-batches; see entropy/policy"),
    ("completions/mean_length", "tokens", "mean length of the completions"),
    ("completions/mean_terminated_length", "tokens", "mean length of the completions that ended by themselves"),
    ("answer_check/rejected_fraction", "1", "completions whose answer is beyond the checker's limits: reward 0"),
    ("answer_check/timeout_fraction", "1", "completions whose check ran out of time: reward 0"),
    ("answer_check/failed_fraction", "1", "completions whose check failed: reward 0"),
]) + keys("TRL", [
    ("grad_norm", "1", "norm of the accumulated gradient before clipping"),
    ("learning_rate", "1", "learning rate that this step used"),
    ("num_tokens", "tokens", "tokens of prompts and completions of the run so far"),
], over_steps="last") + keys("TRL", [
    ("completions/max_length", "tokens", "length of the longest completion"),
    ("completions/max_terminated_length", "tokens", "length of the longest completion that ended by itself"),
    ("clip_ratio/high_max", "1", "largest fraction of a completion's tokens whose ratio is clipped from above"),
    ("sampling/sampling_logp_difference/max", "nats", "largest difference of a token's log pi and vLLM's"),
    ("sampling/importance_sampling_ratio/max", "1", "largest importance ratio of the policy and vLLM"),
], over_steps="max") + keys("TRL", [
    ("completions/min_length", "tokens", "length of the shortest completion"),
    ("completions/min_terminated_length", "tokens", "length of the shortest completion that ended by itself"),
    ("clip_ratio/low_min", "1", "smallest fraction of a completion's tokens whose ratio is clipped from below"),
    ("sampling/importance_sampling_ratio/min", "1", "smallest importance ratio of the policy and vLLM"),
], over_steps="min")

# The reward for a correct answer; its mean over sampled completions is pass@1.
PASS_AT_1 = "rewards/tag_pref/mean"

_STEP = keys("sum", [
    ("kl", "nats/token", "KL to the start policy (k3 estimator): TRL's if beta > 0, else every kl_every steps"),
    ("entropy/policy", "nats/token", "mean entropy of the policy over all tokens of the step's completions"),
    *((f"entropy/{name}", "nats/token", f"mean entropy of the policy: {text}")
      for name, text in OF_TURNS.items()),
    ("entropy/surprisal", "nats/token", "mean of -log pi(token) over all tokens of the step's completions"),
    ("ratio/mean", "1", "importance ratio pi/pi_old, mean over tokens"),
    ("completions/think_length", "tokens", "mean number of tokens before </think>, over completions that have it"),
    ("completions/answered", "1", "fraction of completions that ended at the closing answer tag (stop_at_answer)"),
]) + keys("max", [
    ("ratio/max", "1", "largest importance ratio of a token"),
], over_steps="max") + keys("histogram", [
    ("ratio/median", "1", "median importance ratio, accurate to one histogram bin"),
    ("ratio/p90", "1", "90th percentile of the importance ratio, accurate to one histogram bin"),
    ("ratio/p99", "1", "99th percentile of the importance ratio, accurate to one histogram bin"),
])

_EFFECTIVE_SAMPLE_SIZE = keys("sum", [
    ("loss_weights", "completions", "effective sample size of the weights of completions in the loss (T3)"),
    ("importance_weights", "completions", "effective sample size of the importance ratios of whole completions (T3)"),
    ("num_completions", "completions", "completions with a non-zero advantage"),
], "ess/")

_LIKELIHOOD = keys("sum", [
    ("delta_above_mean", "nats/token", "mean change of log pi(token) by the step, in its own completions of an "
     "advantage above 0"),
    ("delta_below_mean", "nats/token", "the same in its completions of an advantage below 0"),
    ("falling_above_mean", "1", "share of its completions of an advantage above 0 that became less likely"),
], prefix="likelihood/")
_MUTUAL_INFORMATION = keys("pairs", [
    ("lower", "nats", "lower bound on the mutual information of prompt and completion, per completion (T23)"),
    ("upper", "nats", "upper bound on the mutual information of prompt and completion, per completion (T23)"),
    ("limit", "nats", "the largest value of the lower bound: the logarithm of the number of prompts"),
    ("conditional_entropy", "nats", "entropy of a whole completion given its prompt, estimated by its surprisal"),
    ("identified", "1", "fraction of completions that are likeliest under their own prompt"),
    ("num_prompts", "prompts", "prompts whose completions were scored under one another"),
    ("num_completions", "completions", "completions of these prompts"),
], "mutual_information/")

_OPTIMIZER_STATE = keys("none", [
    *((f"{moment}_p{percent}", "1", f"percentile {percent} of |{moment}| over the trained parameters")
      for moment in ("exp_avg", "exp_avg_sq") for percent in (1, 10, 50, 90, 99)),
    ("exp_avg_sq_num_zero", "parameters", "parameters that never had a gradient (exp_avg_sq = 0)"),
    ("exp_avg_sq_num_below_eps_sq", "parameters", "parameters with sqrt(exp_avg_sq) below Adam's epsilon"),
], "optimizer_state/", "last")

_CURRICULUM = keys("none", [
    ("num_hard", "prompts", "training prompts whose estimated pass rate is below curriculum_hard_below"),
    ("num_normal", "prompts", "training prompts whose estimated pass rate is between the two bounds"),
    ("num_easy", "prompts", "training prompts whose estimated pass rate is above curriculum_easy_above"),
], "curriculum/", "last")

_RESAMPLING = keys("none", [
    ("num_rounds", "rounds", "rounds of generation after the first"),
    ("num_uninformative", "groups", "groups of the first round whose rewards were all equal"),
    ("num_kept_uninformative", "groups", "trained groups whose rewards were all equal"),
    ("num_unused", "groups", "generated groups with unequal rewards that were not needed"),
    ("num_completions", "completions", "completions generated in all rounds"),
    ("informative_share", "1", "fraction of the groups of all rounds whose rewards differ"),
    ("completions_per_accepted_group", "completions", "generated completions per trained group whose rewards differ"),
], "resampling/") + keys("sum", [
    ("tokens_per_accepted_group", "tokens", "generated tokens per trained group whose rewards differ"),
], "resampling/")

# (name of the noise scale, prefix of the other keys) -> where it is measured.
_METRICS_OF_NOISE = {("simple", ""): "", ("adam", "adam_"): ", in the optimizer's metric before the step (T16)"}
_NOISE_SCALE = keys("groups", [
    ("num_prompts", "prompts", "prompt groups of the step that the estimate uses"),
    ("gradient_error", "1", "|mean Y_n - g| / |g|: do the groups' gradients Y_n add up to the gradient g"),
    *((name.format(*names), unit_, text + where)
      for names, where in _METRICS_OF_NOISE.items() for name, unit_, text in (
        ("{1}grad_sq_norm", "1", "|G|^2 of the expected gradient, unbiased, may be negative (T14), (T15)"),
        ("{1}grad_variance_trace", "1", "tr(Sigma) of one prompt group's gradient, unbiased (T14), (T15)"),
    )),
], "noise_scale/") + keys("groups", [
    ("between_prompt_trace", "1", "part of tr(Sigma) that stays with any number of completions per prompt, pooled"),
    ("within_prompt_trace", "1", "part of tr(Sigma) that falls as 1/G with G completions per prompt, pooled"),
    ("between_prompt_share", "1", "fraction of tr(Sigma) that lies between prompts, pooled"),
    *((name.format(*names), unit_, text + where)
      for names, where in _METRICS_OF_NOISE.items() for name, unit_, text in (
        ("{0}", "prompts", "noise scale tr(Sigma) / |G|^2, both pooled over the steps so far"),
        ("{0}_lower", "prompts", "lower end of the noise scale's 95 % interval (Fieller)"),
        ("{0}_upper", "prompts", "upper end of that interval; infinite where |G|^2 is consistent with 0"),
        ("{1}signal_to_noise", "1", "|G|^2 / (tr(Sigma) / P), signal to noise of a step, pooled over steps"),
        ("{1}suggested_prompts_lower", "prompts", "prompts per step for half of a noise-free step's progress"),
        ("{1}suggested_prompts_upper", "prompts", "the same from the upper end of the noise scale's interval"),
    )),
], "noise_scale/", "last") + keys("none", [
    ("num_coordinates_without_metric", "parameters", "parameters left out of (T16) because exp_avg_sq = 0"),
], "noise_scale/")

_PAIRS = {"same_prompt": "pairs of completions of one prompt", "cross_prompt": "pairs of completions of two prompts"}
_PAIRS_BY_REWARD = _PAIRS | {
    f"{pairs}_{reward}": f"{text}, {reward.replace('_', ' ')}"
    for pairs, text in _PAIRS.items() for reward in ("equal_reward", "unequal_reward")
}
_SOURCES = {
    "own": "the completion itself",
    "same_prompt": "the other completions of its prompt",
    "other_prompts": "completions of other prompts",
    "momentum": "the momentum of earlier steps",
    "weight_decay": "weight decay",
}
_FISHER = keys("pairs", [
    ("num_completions", "completions", "completions in the kernel (T12)"),
    ("num_prompts", "prompts", "prompts of these completions, over which the errors of the changes are clustered"),
    ("diagonal", "nats^2", "mean of K_ii, the squared norms of the completions' scores"),
    ("effective_rank", "1", "exp(entropy of the normalised spectrum of K)"),
    ("participation_ratio", "1", "(sum l)^2 / sum l^2 over the eigenvalues l of K"),
    ("length_correlation", "1", "correlation of cosine and product of lengths, pairs of completions of two prompts"),
    ("cosine_prompt_difference", "1", "mean cosine of pairs of one prompt minus that of pairs of two prompts"),
    ("cosine_prompt_difference_null_stddev", "1", "standard deviation of that difference when prompts are permuted"),
    ("cosine_prompt_difference_p_value", "1", "fraction of permutations with a difference at least as large"),
    ("change_predicted_rms", "nats", "root mean square of the predicted changes of log pi(completion) (T12)"),
    ("change_measured_rms", "nats", "root mean square of the measured changes of log pi(completion)"),
    ("change_slope", "1", "regression slope through the origin, measured change on predicted change"),
    ("change_correlation", "1", "correlation of measured and predicted change"),
    *((f"eigenvalue_{i}", "nats^2", f"eigenvalue {i} of K, from the largest") for i in (1, 2, 3)),
    *((name, "nats^2", f"mean of K_ij, {text}") for name, text in _PAIRS.items()),
    *((f"cosine_{name}", "1", f"mean cosine, {text}") for name, text in _PAIRS_BY_REWARD.items()),
    *((f"change_share_{name}", "1", f"fraction of the predicted change due to {text}")
      for name, text in _SOURCES.items()),
], "fisher/") + keys("none", [
    ("num_coordinates_without_metric", "parameters", "parameters left out of the metric M because exp_avg_sq = 0"),
], "fisher/") + keys("sum", [
    (f"trace_share_lora_{letter}", "1", f"fraction of the trace of K in LoRA's {letter} matrices") for letter in "AB"
], "fisher/")

_ENTROPY_CONTROL = keys("E", [
    ("entropy", "nats/token", "entropy before the step, from the control's own completions and the step's"),
    ("num_prompts", "prompts", "prompts of these completions, over which the error of that entropy is clustered"),
    ("target_change", "nats/token", "change that the step is meant to make (T19)"),
    ("delta_optimizer", "nats/token", "first-order prediction of the change by the optimizer's step alone"),
    ("delta_predicted", "nats/token", "first-order prediction of the change by the corrected step"),
    ("realised_previous", "nats/token", "measured change by the previous step, from independent batches"),
    ("correction_coefficient", "1", "coefficient of the correction (T19), also when it is only reported"),
    ("correction_coefficient_over_lr", "1", "correction_coefficient / learning rate; compares with an entropy bonus"),
    ("relative_size", "1", "length of the correction over that of the optimizer's step, in the optimizer's metric"),
    ("infeasible", "1", "1 if entropy_control_cap made the correction smaller than the target needs"),
    ("noise_share", "1", "fraction of <g, g> that is noise in the estimated entropy gradient g"),
    ("price", "loss per nat/token", "first-order increase of the loss per nat per token of entropy"),
    ("active", "1", "1 if the step is corrected, 0 if the correction is only reported"),
    ("released", "1", "1 once the floor has been let go by entropy_control_release, 0 before"),
], "entropy_control/") + keys("E", [
    ("slope", "1", "regression slope of measured on predicted change, over the last 20 steps"),
], "entropy_control/", "last")

_TOKEN_CONTROL = keys("sum", [
    ("num_tokens", "tokens", "tokens of the step whose contribution token_control changes"),
    ("mean_covariance", "nats x advantage", "mean covariance of log-probability and advantage over these tokens"),
], "token_control/") + keys("sum", [
    (f"{what}_share", "1", f"fraction of the {what}'s first-order change by this step's gradient that these tokens "
     "would have made (T24); outside [0, 1] where parts have opposite signs") for what in ("entropy", "reward")
], "token_control/", "last")

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in [
        *_TRL, *_CURRICULUM, *_RESAMPLING, *_STEP, *_EFFECTIVE_SAMPLE_SIZE, *_LIKELIHOOD, *_OPTIMIZER_STATE,
        *CHANGES, *_NOISE_SCALE, *_FISHER,
        *_MUTUAL_INFORMATION, *_ENTROPY_CONTROL, *_TOKEN_CONTROL,
    ]
}

# What `trl-entropy evaluate` measures, with `_low` and `_high` where there is an interval; pass@k for k = 1, 2, 4, ...
EVALUATION: dict[str, Metric] = {metric.name: metric for metric in keys("sum", [
    ("pass@1", "1", "probability that a sample is correct; pass@k: that at least one of k samples is (unbiased)"),
    ("greedy_accuracy", "1", "fraction of prompts whose greedy completion is correct"),
    ("answer_tags", "1", "fraction of samples with exactly one closed answer tag"),
    ("answer_tags_any", "1", "fraction of prompts with at least one such sample"),
    ("well_formed", "1", "fraction of samples in the format that the prompt asks for"),
    ("undecided", "1", "fraction of samples whose answer check ran out of time or failed: reward 0"),
    ("clipped", "1", "fraction of samples cut off at the maximum length"),
    ("length_mean", "tokens", "mean length of the samples, end token included"),
    ("length_std", "tokens", "standard deviation of the samples' length"),
    ("length_min", "tokens", "length of the shortest sample"),
    ("length_max", "tokens", "length of the longest sample"),
    ("max_correct_length", "tokens", "length of the longest correct sample"),
    *((f"{name}_{statistic}", "nats/token", text.format(what))
      for name, what in (("entropy", "entropy of the next token"), ("surprisal", "surprisal -log pi(token)"))
      for statistic, text in (
          ("mean", "{}, mean over all sampled tokens"), ("std", "{}, standard deviation over tokens"),
          ("max", "{}, largest of a token"), ("p95", "{}, 95th percentile over tokens"))),
    ("distinct_answers", "answers", "number of different answers among a prompt's samples, mean over prompts"),
])}
# fmt: on


_OF_FUNCTION = re.compile(r"((rewards|metrics)/(.+))/([a-z_]+)")


def metric_of(key: str) -> Metric | None:
    """What is known of a key: its row of the table; of `rewards/NAME/delta_measured` as of `reward/delta_measured`."""
    if key in METRICS or (found := _OF_FUNCTION.fullmatch(key)) is None:
        return METRICS.get(key)
    _, kind, name, change = found.groups()
    alike = METRICS.get(f"reward/{change}")
    if alike is None:
        return None
    of_function = "reward" if kind == "rewards" else name
    text = alike.help.replace("expected reward", f"expectation of {name}")
    return replace(alike, name=key, unit=of_function if alike.unit == "reward" else alike.unit, help=text)


# What ends the key of a standard error; the way in which it was estimated may follow.
_STDERR = re.compile(r"_stderr(_[a-z]+)?$")


def over_steps(key: str) -> str:
    """
    How the values of a key in several steps become one: `"mean"`, `"error"` of a mean, `"last"`, `"max"` or `"min"`.

    The standard error of n independent values' mean is sqrt(sum of squares) / n. Keys that are not in the table are
    averaged, as TRL does it; their standard errors, by the name `KEY_stderr`, are not.
    """
    base = _STDERR.sub("", key)
    known = metric_of(base)
    rule = known.over_steps if known else "mean"
    return "error" if rule == "mean" and base != key else rule


def unit(key: str) -> str:
    """The unit of a key, the same for `<key>_stderr`; `time/*` is in seconds. Empty for an unknown key."""
    key = key.removeprefix("eval_").removesuffix("_stderr")
    if key.startswith("time/"):
        return "s"
    if key in EVALUATION or key.startswith("pass@"):
        return EVALUATION.get(key, EVALUATION["pass@1"]).unit
    known = metric_of(key)
    return known.unit if known else ""
