"""The settings of what changes a step to steer the entropy: `entropy_control` and `token_control`."""

from __future__ import annotations

from dataclasses import dataclass

from trl_entropy.config.setting import setting


@dataclass
class ControlSettings:
    """The part of [`~trl_entropy.DrGRPOConfig`] that turns controls on and says how they act."""

    entropy_control: str = setting(
        "After each optimizer step, add the smallest change of the parameters that gives the entropy the change that "
        "is asked for (T19). hold: keep the entropy at its target. floor: only keep it from falling below. report: "
        "change nothing, and log what would be done. "
        "Needs an optimizer whose metric is known (docs/optimizers.md).",
        "none",
        choices=("none", "report", "floor", "hold"),
        probe="entropy_control",
        changes_training=("floor", "hold"),
        logs="*changes the step*, except `report`: the smallest change of the parameters that moves the entropy to "
        "`entropy_control_target`, or by `entropy_control_per_step`, is added after the optimizer's step (T19); "
        "`entropy_control/*`: predicted and realised change of the entropy, size of the correction, price of entropy",
        cost="drawing a batch of completions, and two forward and one backward passes over it, which doubles the "
        "time of a step; with `entropy_control_completions: rollouts` nothing is drawn and the passes are over the "
        "step's own completions. Nothing once a floor is let go (`entropy_control_release`)",
    )
    entropy_control_target: float | None = setting(
        "The entropy to steer to. Set either this or entropy_control_per_step.",
        None,
        unit="nats per token",
        probe="entropy_control",
        changes_training=True,
    )
    entropy_control_per_step: float | None = setting(
        "The change of the entropy that is asked of every step, in place of a target. With floor, the least change.",
        None,
        unit="nats per token",
        probe="entropy_control",
        changes_training=True,
    )
    entropy_control_gain: float = setting(
        "Which share of the distance to the target each step is asked to go.",
        0.4,
        probe="entropy_control",
        read_with={"entropy_control_target": ()},
        changes_training=True,
    )
    entropy_control_completions: str = setting(
        "Which completions the gradient of the entropy is computed from. probe: a batch drawn for this purpose. "
        "rollouts: the step's own completions.",
        "probe",
        choices=("probe", "rollouts"),
        probe="entropy_control",
        changes_training=True,
    )
    entropy_control_gradient_ema: float = setting(
        "Weight of earlier steps in the running mean of the entropy's gradient. 0 takes this step's gradient alone, "
        "as is always done with entropy_control_completions=rollouts.",
        0.7,
        probe="entropy_control",
        read_with={"entropy_control_completions": ("probe",)},
        changes_training=True,
    )
    entropy_control_num_completions: int = setting(
        "Size of the batch that is drawn for the entropy control, over all processes, with one completion for each "
        "prompt.",
        128,
        unit="completions",
        probe="entropy_control",
        read_with={"entropy_control_completions": ("probe",)},
        changes_training=True,
    )

    entropy_control_release: float | None = setting(
        "Let go of the floor for good once the mean reward of a step's completions has been at least this in "
        "entropy_control_release_steps steps in a row. From then on nothing is corrected, measured or spent.",
        None,
        unit="reward",
        probe="entropy_control",
        read_with={"entropy_control": ("floor",)},
        changes_training=True,
    )
    entropy_control_release_steps: int = setting(
        "For how many steps in a row the mean reward must have reached entropy_control_release.",
        5,
        unit="steps",
        probe="entropy_control",
        read_with={"entropy_control_release": ()},
        changes_training=True,
    )

    token_control: str = setting(
        "Change the loss of a few tokens to keep the entropy up. clip_cov: leave out random tokens whose covariance "
        "of log-probability and advantage is within token_control_bounds, or those of the largest covariance "
        "(token_control_choice). kl_cov: add a penalty that holds the "
        "tokens of the largest covariance to the policy that sampled them. Both are from arXiv:2505.22617. To "
        "compare with: random leaves out random tokens, random_positive random tokens of positive advantage. "
        "exchange: while the entropy is below token_control_floor, leave out the tokens that lose most entropy for "
        "the reward that they earn, both to first order, by gradients from the completions of earlier steps (T24).",
        "none",
        choices=("none", "clip_cov", "kl_cov", "random", "random_positive", "exchange"),
        probe="token_control",
        changes_training=True,
        logs="*changes the loss* of a fraction of the tokens; `token_control/*`: how many tokens, and their mean "
        "covariance of log-probability and advantage, or with `exchange` their share of the step's change of "
        "entropy and of reward",
        cost="a forward pass over the step's completions, unless the loss is off-policy; none with "
        "`token_control_scope: micro_batch`. `exchange`, below its floor: a forward and two backward passes over the "
        "step's completions and two forward-mode passes over the next step's",
    )
    token_control_scope: str = setting(
        "Which tokens are compared with one another when some are chosen. optimizer_batch: all tokens of the step, on "
        "all processes. micro_batch: those of one process's micro-batch, as in the code of the paper's authors.",
        "optimizer_batch",
        choices=("optimizer_batch", "micro_batch"),
        probe="token_control",
        changes_training=True,
    )
    token_control_fraction: float = setting(
        "Fraction of the completion tokens that is changed. The paper's authors take 2e-4 for clip_cov.",
        2e-3,
        probe="token_control",
        changes_training=True,
    )
    token_control_choice: str = setting(
        "clip_cov: which tokens are left out. random: random ones of those within token_control_bounds, as published. "
        "largest: those of the largest covariance, and no bounds are read.",
        "random",
        choices=("random", "largest"),
        probe="token_control",
        read_with={"token_control": ("clip_cov",)},
        changes_training=True,
    )
    token_control_centre: str = setting(
        "clip_cov and kl_cov: what a token's log-probability is compared with in its covariance. batch: with the mean "
        "over all tokens, as published, and the advantage with its mean. distribution: with its mean under the "
        "distribution that the token was drawn from, which makes the covariance A (S + H); it takes a forward pass "
        "over the step's completions, also where the loss is off-policy, unless token_control_scope is micro_batch.",
        "batch",
        choices=("batch", "distribution"),
        probe="token_control",
        read_with={"token_control": ("clip_cov", "kl_cov")},
        changes_training=True,
    )
    token_control_bounds: list[float] = setting(
        "clip_cov: the lower and the upper bound of the covariance.",
        [1.0, 5.0],
        unit="nats x advantage; with token_control_quantiles, quantiles",
        probe="token_control",
        read_with={"token_control": ("clip_cov",)},
        changes_training=True,
    )
    token_control_quantiles: bool = setting(
        "clip_cov: read token_control_bounds as quantiles of the covariances, from 0 to 1, not as covariances.",
        False,
        probe="token_control",
        read_with={"token_control": ("clip_cov",)},
        changes_training=True,
    )
    token_control_coefficient: float = setting(
        "kl_cov: weight of the penalty, which is the absolute log-ratio of the policy to the one that sampled, at "
        "each chosen token.",
        1.0,
        unit="per nat",
        probe="token_control",
        read_with={"token_control": ("kl_cov",)},
        changes_training=True,
    )
    token_control_floor: float | None = setting(
        "Tokens of a step are left out only if the entropy of the completions of the step before was below this. It "
        "must be set: without a floor, leaving out a fraction of the tokens that lose the entropy lets it run away.",
        None,
        unit="nats per token",
        probe="token_control",
        read_with={"token_control": ("exchange",)},
        changes_training=True,
    )
    token_control_gradient_ema: float = setting(
        "Weight of earlier steps in the running means of the gradients of entropy and expected reward. 0 takes those "
        "of the step before alone.",
        0.7,
        probe="token_control",
        read_with={"token_control": ("exchange",)},
        changes_training=True,
    )
