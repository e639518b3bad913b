"""All prompt groups of a tiny policy with their probabilities and gradients: the law of a batch, exactly."""

import math

import torch
from tiny_policy import TinyPolicy, multisets

LENGTH = 2  # max_completion_length, L of (T2)


def rewards_of(policy):
    """Whether the first token is 1, and something for the length: groups of equal completions have no gradient."""
    return (policy.token_ids[:, 0] == 1).double() + 0.1 * policy.num_tokens


def score_gradients(policy, theta):
    """grad S_i of every row of the policy at theta."""
    return torch.autograd.functional.jacobian(lambda moved: policy.score(moved)[1].sum(1), theta)


class TinyGroups:
    """Groups of `size` completions as row numbers (K, size), their probability (K,), rewards (K, size), prompt (K,).

    With `halves` every group is two multisets of size / 2 in order, so that its halves are independent draws.
    """

    def __init__(self, policy: TinyPolicy, size=2, theta=None, halves=False):
        self.theta = policy.theta if theta is None else theta
        p = policy.probabilities(self.theta) * policy.num_prompts
        groups = []
        for prompt in range(policy.num_prompts):
            own = (policy.prompt_index == prompt).nonzero().flatten()
            draws = [(own[rows], float(q)) for rows, q in multisets(p[own].tolist(), size // 2 if halves else size)]
            if halves:
                draws = [(torch.cat([a, b]), q * r) for a, q in draws for b, r in draws]
            groups += [(rows, q / policy.num_prompts, prompt) for rows, q in draws]
        self.rows = torch.stack([rows for rows, *_ in groups])
        self.probability = torch.tensor([q for _, q, _ in groups], dtype=torch.float64)
        self.prompt = torch.tensor([prompt for *_, prompt in groups])
        self.rewards = rewards_of(policy)[self.rows]
        self.scores = score_gradients(policy, self.theta)[self.rows]

    def completion_gradients(self, advantages=None):
        """(K, size, D): P G times each completion's share of the loss gradient, -A_i grad S_i / L."""
        if advantages is None:
            advantages = self.rewards - self.rewards.mean(1, keepdim=True)
        return -advantages[..., None] * self.scores / LENGTH

    def gradients(self, advantages=None):
        """Y_n (K, D): the mean of its completions' gradients."""
        return self.completion_gradients(advantages).mean(1)

    def exact_parts(self, metric=1.0):
        """|G|^2 and tr(Sigma) of one group, from the law itself."""
        y, p = self.gradients(), self.probability
        signal = (p @ y).square() @ (metric * torch.ones_like(y[0]))
        return float(signal), float(p @ (y.square() * metric).sum(1) - signal)


def batches(probability, num_prompts):
    """All batches of `num_prompts` groups as row numbers, and their probabilities: as `multisets`, in one tensor."""
    rows = torch.combinations(torch.arange(len(probability)), num_prompts, with_replacement=True)
    run, repeats = torch.ones(len(rows)).double(), torch.ones(len(rows)).double()
    for k in range(1, num_prompts):
        run = torch.where(rows[:, k] == rows[:, k - 1], run + 1, 1.0)
        repeats *= run
    return rows, probability[rows].prod(1) * math.factorial(num_prompts) / repeats


def loss_sums(policy, groups):
    """Of each group the gradient of its loss before it is divided by a number of tokens, (K, D), and its tokens."""
    advantages = groups.rewards - groups.rewards.mean(1, keepdim=True)
    return -(advantages[..., None] * groups.scores).sum(1), policy.num_tokens[groups.rows].sum(1)
