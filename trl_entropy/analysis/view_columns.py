"""What the columns of the views hold: unit and meaning of each, which the page shows beside it."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """
    A column of a view.

    Attributes:
        unit: of its numbers; empty for texts and names.
        help: what it says, in a sentence that the page shows.
        digits: significant digits that a reader can use, to which the page rounds; 0: texts and whole numbers.
    """

    unit: str
    help: str
    digits: int = 0


_ROW = Column("", "The completion's number in the step's file, from 0.")
_PROMPT_INDEX = Column(
    "", "The number of the prompt group, counted over the run; where no probe has a file, in the step."
)
_PROMPT = Column("", "The text of the prompt.")
_POSITION = Column("", "The token's place in the completion, from 0.")
_TOKEN_ID = Column("", "The token's number in the tokenizer.")
_TOKEN = Column("", "The token's text.")
_ROUND = Column(
    "", "The round in which the prompt was drawn: 0 is the first draw, later ones fill places of dropped groups."
)
_LOGP_CHANGE = Column(
    "nats",
    "Change of the completion's log-probability by the step, where it was measured on the step's own completions: by "
    "likelihood_probe, by entropy_probe_completions: rollouts, or by the Fisher probe for those that it takes.",
    4,
)
_OWN = Column("", "Whether the policy wrote the token; a tool's or an environment's are context, in no number.")

COLUMNS: dict[str, dict[str, Column]] = {
    "steps": {"step": Column("", "The number of the optimizer step. Every key of metrics.jsonl is a column too.")},
    "parts": {
        "step": Column("", "The number of the optimizer step."),
        "part": Column("", "What made this part of the change. The parts sum to the measured change."),
        "change": Column(
            "nats/token",
            "The part of the step's entropy change: momentum, weight decay, gradient, KL, bonus and control sum to "
            "the first-order prediction with rounding, and curvature is the rest of the measured change.",
            4,
        ),
    },
    "evaluation": {
        "step": Column("", "The step after which it was evaluated; 0 is the start policy."),
        "source": Column("", "What evaluated: training, with the set's name if there are several, or evaluate."),
        "metric": Column("", "What was measured on held-out prompts."),
        "value": Column("", "The number.", 4),
        "low": Column("", "Lower end of its 95 % interval over prompts; only trl-entropy evaluate has one.", 4),
        "high": Column("", "Upper end of its 95 % interval over prompts.", 4),
    },
    "groups": {
        "prompt_index": _PROMPT_INDEX,
        "num_completions": Column("completions", "Completions of this prompt in the step."),
        "reward_mean": Column("", "Mean reward of the group; the pass rate where rewards are 0 and 1.", 4),
        "reward_std": Column("", "Standard deviation of the rewards in the group; at 0 there is nothing to learn.", 4),
        "length_mean": Column("tokens", "Mean number of tokens that the policy wrote in a completion.", 4),
        "entropy": Column("nats/token", "Mean entropy of the policy over the group's tokens, before the step.", 4),
        "change": Column(
            "nats/token",
            "What training on this group added to the step's entropy change, to first order (T9). The groups sum to "
            "the gradient's part.",
            4,
        ),
        "change_stderr": Column(
            "nats/token",
            "Standard error of that change over other completions of this prompt, taken as independent: the mean "
            "reward, which they share and the advantages subtract, is not in it. Over prompts, see share.",
            3,
        ),
        "share": Column(
            "1",
            "The group's share of the sum over groups. Given only where the sum is further from 0 than twice the half "
            "width of its 95 % interval.",
            3,
        ),
        "num_truncated": Column("completions", "Completions that reached max_completion_length without an end token."),
        "signal": Column("", "Whether any advantage differs from 0. Without, the group adds nothing to the gradient."),
        "round": _ROUND,
        "prompt": _PROMPT,
    },
    "dropped": {
        "group": Column("", "The number of the group among those that were drawn for the step."),
        "round": _ROUND,
        "rule": Column(
            "",
            "Why it was dropped: all its rewards are equal (equal rewards), or enough other groups had come before it "
            "(not needed).",
        ),
        "reward": Column("", "The reward: the weighted sum of the reward functions.", 4),
        "prompt": _PROMPT,
        "text": Column("", "The completion's text."),
    },
    "completions": {
        "row": _ROW,
        "prompt_index": _PROMPT_INDEX,
        "reward": Column("", "The reward: the weighted sum of the reward functions.", 4),
        "advantage": Column("", "The reward less the group's mean, as the loss scales it (T1).", 4),
        "change": Column("nats/token", "What training on it added to the entropy change, to first order (T9).", 4),
        "entropy": Column("nats/token", "Mean entropy of the policy over its tokens, before the step.", 4),
        "surprisal": Column("nats/token", "Mean of -log pi(token) over its tokens, before the step.", 4),
        "length": Column("tokens", "Tokens that the policy wrote."),
        "context_length": Column("tokens", "Tokens that tools or an environment wrote."),
        "turns": Column("", "The policy's turns."),
        "end": Column(
            "",
            "How it ends: at an end token (ended), at max_completion_length without one (truncated), at an answer or "
            "by an environment (stopped), without a token that counts in the loss (masked), or not known (unknown).",
        ),
        "round": _ROUND,
        "logp_change": _LOGP_CHANGE,
        "entropy_change": Column("nats/token", "Mean change of the entropy at its tokens, measured on it.", 4),
        "prompt": _PROMPT,
        "text": Column("", "The completion's text, where no probe recorded its tokens."),
    },
    "tokens": {
        "row": _ROW,
        "position": _POSITION,
        "token_id": _TOKEN_ID,
        "token": _TOKEN,
        "change": Column("nats/token", "What training on it added to the entropy change, to first order (T9).", 3),
        "entropy": Column("nats", "Entropy of the distribution from which the token was drawn, before the step.", 3),
        "logp": Column("nats", "Log-probability of the token under the policy, before the step.", 3),
        "weight": Column(
            "1", "The loss's weight of the token: its derivative by the log-probability, sign turned, which is "
            "the advantage, clipped and divided by the normaliser.", 3,
        ),
        "logp_change": Column(
            "nats", "Change of its log-probability by the step (likelihood_probe, or rollouts as the probe batch).", 3,
        ),
        "entropy_change": Column("nats", "Change of the entropy there by the step, measured on it.", 3),
        "kind": Column("", "What the token is part of: prose, a call of a tool, or a call's arguments."),
        "turn": Column("", "The policy's turn, from 1."),
        "own": _OWN,
    },
    "measured_completions": {
        "row": _ROW,
        "prompt_index": _PROMPT_INDEX,
        "length": Column("tokens", "Tokens that the policy wrote."),
        "entropy": Column("nats/token", "Mean entropy of the policy over its tokens, before the step.", 4),
        "entropy_change": Column("nats/token", "Mean change of the entropy at its tokens by the step.", 4),
        "logp_change": Column("nats", "Change of the completion's log-probability by the step.", 4),
        "prompt": _PROMPT,
    },
    "measured_tokens": {
        "row": _ROW,
        "position": _POSITION,
        "token_id": _TOKEN_ID,
        "token": _TOKEN,
        "entropy": Column("nats", "Entropy of the next-token distribution here, before the step.", 3),
        "entropy_change": Column("nats", "Its change by the step.", 3),
        "logp": Column("nats", "Log-probability of the token before the step.", 3),
        "logp_change": Column("nats", "Its change by the step.", 3),
        "own": _OWN,
    },
}  # fmt: skip


def column(view: str, name: str) -> Column:
    """What a column holds; `reward/FUNCTION` of the completions is a reward, and a key of the steps has 4 digits."""
    if view == "steps":
        return COLUMNS["steps"].get(name, Column("", "", 4))
    if name.startswith("reward/"):
        return Column("", f"What the reward function {name.removeprefix('reward/')} gave.", 4)
    return COLUMNS[view][name]
