"""Dr-GRPO's advantages, and a scalar per completion whose gradient is its share of the loss gradient."""

from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_advantages(rewards: Float[Tensor, "B"], num_generations: int) -> Float[Tensor, "B"]:
    """(T1): A_i = r_i minus the mean reward of its group; rows of a group follow one another, G each."""
    grouped = rewards.view(-1, num_generations)
    return (grouped - grouped.mean(dim=1, keepdim=True)).flatten()


def policy_gradient_terms(
    per_token_logps: Float[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    advantages: Float[Tensor, "B"],
    normalizers: Float[Tensor, "B"] | Int[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """(T2): -(A_i / L_i) sum_k S_ik, whose mean over the P G completions has the gradient of the loss.

    At the policy that sampled only: there every ratio is 1, clipping does nothing and grad rho = grad S. Its value
    means nothing. `normalizers` are the L_i, in tokens.
    """
    log_probs = per_token_logps.double().where(completion_mask.bool(), 0.0).sum(1)
    return -advantages.double() / normalizers.double() * log_probs
