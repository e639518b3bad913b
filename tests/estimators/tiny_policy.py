"""A policy so small that every outcome can be listed: the exact side of the tests."""

import itertools
import math

import torch

VOCAB, END, NUM_FEATURES = 3, 2, 4


class TinyPolicy:
    """Softmax of logits linear in random features of (prompt, prefix); prompts are equally likely.

    Rows are all outcomes of all prompts: `token_ids`, `completion_mask` (K, T), `prompt_index` (K,). A sample of
    completions is a tensor of row numbers; what is computed per row is computed once.
    """

    def __init__(self, max_length: int = 3, num_prompts: int = 2, seed: int = 2):
        generator = torch.Generator().manual_seed(seed)
        rows = [(p, o) for p in range(num_prompts) for o in _outcomes(max_length)]
        prefixes = {key: i for i, key in enumerate(sorted({(p, o[:k]) for p, o in rows for k in range(len(o))}))}
        features = torch.randn(len(prefixes), NUM_FEATURES, generator=generator, dtype=torch.float64)
        position = torch.zeros(len(rows), max_length, dtype=torch.long)
        self.token_ids = torch.zeros_like(position)
        self.completion_mask = torch.zeros_like(position, dtype=torch.bool)
        for i, (prompt, outcome) in enumerate(rows):
            self.token_ids[i, : len(outcome)] = torch.tensor(outcome)
            self.completion_mask[i, : len(outcome)] = True
            position[i, : len(outcome)] = torch.tensor([prefixes[prompt, outcome[:k]] for k in range(len(outcome))])
        self.features = features[position]
        self.prompt_index = torch.tensor([prompt for prompt, _ in rows])
        self.num_prompts = num_prompts
        self.num_tokens = self.completion_mask.sum(1).double()
        self.theta = 0.7 * torch.randn(NUM_FEATURES * VOCAB, generator=generator, dtype=torch.float64)
        self.update = torch.randn(NUM_FEATURES * VOCAB, generator=generator, dtype=torch.float64) / 8

    def score(self, theta):
        """Entropy and log-probability of every token of every row, zero beyond the end; differentiable."""
        log_probs = (self.features @ theta.view(NUM_FEATURES, VOCAB)).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        logps = log_probs.gather(-1, self.token_ids[..., None]).squeeze(-1)
        return entropy.where(self.completion_mask, 0.0), logps.where(self.completion_mask, 0.0)

    def probabilities(self, theta):
        """The probability of every row, prompts included."""
        return self.score(theta)[1].sum(1).exp() / self.num_prompts

    def mean_length(self, theta):
        return (self.probabilities(theta) * self.num_tokens).sum()

    def policy_entropy(self, theta):
        """h by the chain rule, from probabilities of whole outcomes alone: no token entropies."""
        p = self.probabilities(theta)
        return (-(p * (p * self.num_prompts).log()).sum()) / self.mean_length(theta)

    def policy_entropy_gradient(self, theta):
        return torch.autograd.functional.jacobian(self.policy_entropy, theta)

    def sample(self, num_prompts, num_generations, generator):
        """Row numbers of `num_generations` completions of each of `num_prompts` drawn prompts, and their clusters."""
        prompts = torch.randint(self.num_prompts, (num_prompts,), generator=generator)
        of_prompt = self.probabilities(self.theta) * (self.prompt_index == prompts[:, None])
        rows = torch.multinomial(of_prompt, num_generations, replacement=True, generator=generator)
        return rows.flatten(), torch.arange(num_prompts).repeat_interleave(num_generations)


def _outcomes(max_length):
    """All token sequences that end with END or have `max_length` tokens."""
    return [
        outcome
        for length in range(1, max_length + 1)
        for outcome in itertools.product(range(VOCAB), repeat=length)
        if END not in outcome[:-1] and (outcome[-1] == END or length == max_length)
    ]


def multisets(probabilities, size):
    """All multisets of `size` of the outcomes, as row numbers, with their probability: the law of a sample."""
    for rows in itertools.combinations_with_replacement(range(len(probabilities)), size):
        counts = [len(list(group)) for _, group in itertools.groupby(rows)]
        orders = math.factorial(size) / math.prod(math.factorial(count) for count in counts)
        yield torch.tensor(rows), orders * math.prod(probabilities[row] for row in rows)


def loglog_slope(steps, values):
    """The least-squares slope of log |value| on log step."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(values).double().abs().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
