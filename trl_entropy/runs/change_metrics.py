"""
The keys of what a step changes: the entropy, the reward and other quantities, measured and predicted, and what made
the change: parts of the update, turns, kinds of tokens, completions by outcome. Part of the table in `metrics.py`.
"""

from __future__ import annotations

from trl_entropy.runs.metric import Metric, keys

# fmt: off
# The policy's turns in an episode with tools or an environment, and what its tokens are part of.
TURNS = ("turn_1", "turn_2", "turn_3", "turn_later")
KINDS = ("kind_prose", "kind_call", "kind_arguments")
OF_TURNS = {
    "turn_1": "tokens before the first result of a tool or an environment",
    "turn_2": "tokens of the policy's second turn",
    "turn_3": "tokens of the policy's third turn",
    "turn_later": "tokens of the policy's later turns",
}
OF_EPISODES = OF_TURNS | {
    "kind_prose": "tokens outside calls of tools",
    "kind_call": "tokens of calls of tools, but for their arguments",
    "kind_arguments": "tokens of the arguments of calls of tools",
}

_CHANGES = {
    "measured": "measured change (T7), weighted token by token",
    "linear": "first-order prediction (T8)",
    "second_order": "second-order prediction (T10)",
    "trapezoid": "trapezoid rule with the gradients before and after the step (T10)",
}
_PREDICTIONS = [name for name in _CHANGES if name != "measured"]
_STATISTICS = {
    "slope": "regression slope",
    "corrected_slope": "regression slope, corrected for its flattening by the noise of the prediction,",
    "correlation": "correlation",
    "r_squared": "squared correlation",
    "ceiling_r_squared": "largest squared correlation that the noise allows (nan while the stated errors exceed the "
    "scatter of the steps)",
}
_KINDS_OF_PAIRS = {
    "same_sample": "both on the same completions",
    "cross": "predicted on half a of E's prompts, measured on half b",
    "placebo": "predicted from an earlier step's update",
}
_COMPARED = [*(f"same_sample_{name}" for name in _PREDICTIONS), *(f"cross_{name}" for name in _CHANGES), "placebo"]


_COMPARED_WITH = {
    "measured": "the measured change of half a",
    "linear": "the first-order prediction",
    "second_order": "the second-order prediction",
    "trapezoid": "the trapezoid rule",
    "placebo": "the first-order prediction",
}


def _pairs_of(kind: str) -> str:
    """The two numbers of a regression and the completions that they are from, in words."""
    name = next(name for name in _KINDS_OF_PAIRS if kind.startswith(name))
    return f"of the measured change on {_COMPARED_WITH[kind.removeprefix(f'{name}_')]}, {_KINDS_OF_PAIRS[name]}"


def _changes_of(quantity: str, unit_: str, what: str, changes: dict[str, str], compared: list[str]) -> list[Metric]:
    """The change of a quantity by a step, its predictions, their sums over the run, and how well they agree."""
    return keys("E", [
        ("probe_batch", unit_, f"{what} under the policy before the step, estimated on the probe batch E"),
        *((f"half_{half}_num_prompts", "prompts", f"prompts in half {half} of E") for half in "ab"),
        *((f"delta_{name}", unit_, text) for name, text in changes.items()),
        *((f"half_{half}_{name}", unit_, f"{text}, from half {half} of the prompts of E")
          for half in "ab" for name, text in changes.items()),
        *((f"error_{name}", unit_, f"{text} minus measured change, on the same completions")
          for name, text in changes.items() if name != "measured"),
    ], f"{quantity}/") + keys("E", [
        *((f"integral_{name}", unit_, f"a level: {what} before the first step, plus the sum over the steps since of "
           f"the {text}; only where every step is measured")
          for name, text in changes.items()),
        *((f"{kind}_{name}", "1", f"{text} {_pairs_of(kind)}, over the steps so far")
          for kind in compared for name, text in _STATISTICS.items()),
    ], f"{quantity}/", "last")


_ENTROPY = _changes_of("entropy", "nats/token", "entropy", _CHANGES, _COMPARED) + keys("E", [
    ("num_completions", "completions", "completions in E"),
    ("num_prompts", "prompts", "prompts in E, over which standard errors are clustered"),
    ("importance_ess", "completions", "effective sample size of E under the policy after the step (T3)"),
    ("importance_ess_sequence", "completions", "the same by the weights of whole completions, as (T21) takes them"),
    ("sampler_ess", "completions", "effective sample size of E if vLLM drew it, by the ratio of policy to sampler"),
    ("router_flip_share", "1", "share of (token, layer) of E that the step sends to other experts of a mixture"),
    ("noise_floor", "nats/token", "apparent change when E is scored again in other batches: rounding alone"),
    ("precision_noise", "1", "noise of TF32 in the first-order prediction, over its standard error; once"),
    ("delta_measured_model", "nats/token", "measured change of the model in the precision of training"),
    ("delta_measured_sequence", "nats/token", "measured change, weighted by whole completions (T6)"),
    ("delta_linear_sequence", "nats/token", "first-order prediction, weighted by whole completions (T8)"),
    ("delta_placebo", "nats/token", "control: first-order prediction from an earlier step's update instead"),
    ("delta_cov_natural", "nats/token", "published predictor -Cov(log pi, A) over the step's tokens (T11)"),
    ("delta_cov_policy_gradient", "nats/token", "published predictor -Cov(log pi, pi A) over the step's tokens (T11)"),
], "entropy/")

# The change of a number of the completions (T21), as that of the entropy.
_CHANGES_OF_NUMBERS = {
    "measured": "measured change (T21), weighted by whole completions",
    "linear": "first-order prediction (T21)",
    "trapezoid": "trapezoid rule with the gradients before and after the step (T21)",
}
_COMPARED_NUMBERS = [
    *(f"same_sample_{name}" for name in _CHANGES_OF_NUMBERS if name != "measured"),
    *(f"cross_{name}" for name in _CHANGES_OF_NUMBERS),
]
_QUANTITIES = [metric for quantity, (unit_, what) in {
    "reward": ("reward", "expected reward"),
    "length": ("tokens", "expected length"),
    "truncated": ("1", "share of truncated completions"),
}.items() for metric in [
    *_changes_of(quantity, unit_, what, _CHANGES_OF_NUMBERS, _COMPARED_NUMBERS),
    Metric(f"{quantity}/delta_in_sample", unit_, f"measured change of the {what} on the step's own completions", "U"),
]]

_ENTROPY_OF_ROLLOUTS = keys("U", [
    ("delta_in_sample", "nats/token", "measured change (T7) on the completions that the step was trained on"),
    ("delta_cross_prompt", "nats/token", "first-order effect of this step's gradient across different prompts (T17)"),
    ("delta_cross_prompt_stderr_unbiased", "nats/token", "error by the unbiased variance, nan where negative"),
    ("delta_cross_prompt_num_prompts", "prompts", "prompts whose pairs make delta_cross_prompt"),
    ("delta_same_sample", "nats/token", "as delta_cross_prompt, with each prompt's effect on itself, hence biased"),
    ("rollouts_gradient_error", "1", "relative difference between the sum of the groups' gradients and the gradient"),
], "entropy/") + keys("none", [
    ("num_coordinates_without_metric", "parameters", "parameters left out because exp_avg_sq = 0"),
], "entropy/")

PARTS = {  # of the first-order change (T9)
    "momentum": "due to the momentum of earlier steps",
    "weight_decay": "due to weight decay",
    "gradient": "due to the policy loss on this step's completions",
    "kl": "due to the KL term (beta)",
    "entropy_bonus": "due to TRL's entropy bonus (entropy_coef)",
    "router_aux_loss": "due to the loss that balances the experts of a mixture (router_aux_loss_coef)",
    "entropy_control": "due to the correction by entropy_control",
}
RARE = 0.1  # a token is rare below this probability
OUTCOMES = ("correct", "incorrect")
OUTCOMES_BY_PROBABILITY = ("correct_rare", "correct_common", "incorrect_rare", "incorrect_common")
# What readers call the two outcomes where rewards are not just 0 and 1, so that none says which answers are right.
RELATIVE_OUTCOMES = ("above_mean", "below_mean")
_CATEGORIES = {
    "correct": "completions with an advantage above 0",
    "incorrect": "completions with an advantage below 0",
    "correct_rare": "tokens below probability 0.1 in completions with an advantage above 0",
    "correct_common": "the other tokens of completions with an advantage above 0",
    "incorrect_rare": "tokens below probability 0.1 in completions with an advantage below 0",
    "incorrect_common": "the other tokens of completions with an advantage below 0",
}
_MEAN_OF_CATEGORY = {
    "mean_delta_{}": "entropy change of a step made by them",
    "mean_delta_{}_low": "lower end of the 95 % interval of that change (Student's t)",
    "mean_delta_{}_high": "upper end of the 95 % interval of that change (Student's t)",
}
_OF_CATEGORY = {
    "share_{}": "share of entropy/delta_gradient (T9)",
    "share_{}_low": "lower end of the 95 % interval of that share (Fieller)",
    "share_{}_high": "upper end of the 95 % interval of that share (Fieller)",
    "token_share_{}": "share of the tokens (of the completions if attributed by sequence)",
}
_ATTRIBUTION = keys("sum", [
    *((f"delta_{name}", "nats/token", f"part of entropy/delta_linear {text} (T9)") for name, text in PARTS.items()),
    *((f"delta_{name}", "nats/token", f"part of entropy/delta_gradient: {text} (T9)")
      for name, text in OF_EPISODES.items()),
    *((name, "nats/token", f"mean entropy of the policy: {text}, before the step")
      for name, text in OF_EPISODES.items() if name in KINDS),
], "entropy/") + keys("sum", [
    *((f"share_{name}", "1", f"fraction of entropy/delta_linear {text} (T9)") for name, text in PARTS.items()),
    *((key.format(name), "1", f"{text}: {what}, over the run so far")
      for name, text in (_CATEGORIES | OF_EPISODES).items() for key, what in _OF_CATEGORY.items()),
    *((key.format(name), "nats/token", f"{text}: {what} (T9), mean over the run so far")
      for name, text in (_CATEGORIES | OF_EPISODES | {"all": "completions with an advantage other than 0"}).items()
      for key, what in _MEAN_OF_CATEGORY.items()),
], "entropy/", "last") + keys("sum", [
    ("attribution_rounding", "1", "rest that no part explains, over the sum of the parts' absolute values (T9)"),
], "entropy/", "max")

_REWARD_ATTRIBUTION = keys("sum", [
    *((f"delta_{name}", "reward", f"part of reward/delta_linear {text} (T22)") for name, text in PARTS.items()),
    *((f"delta_{name}", "reward", f"part of reward/delta_gradient: {text} (T22)")
      for name, text in OF_EPISODES.items()),
], "reward/") + keys("sum", [
    *((f"share_{name}", "1", f"fraction of reward/delta_linear {text} (T22)") for name, text in PARTS.items()),
    *((key.format(name), unit_, f"{text}: {what} (T22), over the run so far")
      for name, text in (_CATEGORIES | OF_EPISODES | {"all": "completions with an advantage other than 0"}).items()
      for key, unit_, what in (
        ("mean_delta_{}", "reward", "mean change of the expected reward of a step made by them"),
        ("mean_delta_{}_low", "reward", "lower end of the 95 % interval of that change (Student's t)"),
        ("mean_delta_{}_high", "reward", "upper end of the 95 % interval of that change (Student's t)"),
        ("price_{}", "nats/token per reward", "entropy lost for a unit of expected reward gained"),
        ("price_{}_low", "nats/token per reward", "lower end of the 95 % interval of that price (Fieller)"),
        ("price_{}_high", "nats/token per reward", "upper end of the 95 % interval of that price (Fieller)"),
    )),
], "reward/", "last") + keys("sum", [
    ("attribution_rounding", "1", "rest that no part explains, over the sum of the parts' absolute values (T22)"),
], "reward/", "max")

CHANGES: list[Metric] = [*_ENTROPY, *_QUANTITIES, *_REWARD_ATTRIBUTION, *_ENTROPY_OF_ROLLOUTS, *_ATTRIBUTION]
# fmt: on
