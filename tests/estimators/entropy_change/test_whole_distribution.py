"""Sums over whole distributions from scores at two temperatures, against loops over the vocabulary."""

import math

import torch

from trl_entropy.estimators.entropy_change.whole_distribution import distribution_sums


def scores(logits, tokens, temperature):
    logs = (logits / temperature).log_softmax(-1)
    return logs.gather(-1, tokens[..., None])[..., 0], -(logs.exp() * logs).sum(-1)


def slowly(row):
    """The two sums for one vector of logits, entry by entry."""
    total = sum(math.exp(z) for z in row)
    p = [math.exp(z) / total for z in row]
    entropy = -sum(one * math.log(one) for one in p)
    return sum(one**2 for one in p), sum(one * one * (entropy + math.log(one)) for one in p)


def test_both_sums_are_those_of_the_distribution_whatever_token_was_drawn():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 7, dtype=torch.float64, generator=generator)
    for temperature in (1.0, 0.7):
        expected = torch.tensor([[slowly((row / temperature).tolist()) for row in rows] for rows in logits],
                                dtype=torch.float64)  # fmt: skip
        for token in range(7):
            tokens = torch.full((2, 4), token)
            found = distribution_sums(*scores(logits, tokens, temperature), *scores(logits, tokens, temperature / 2))
            torch.testing.assert_close(found.sum_squared, expected[..., 0], rtol=1e-9, atol=0)
            torch.testing.assert_close(found.mean_discriminator, expected[..., 1], rtol=1e-8, atol=1e-12)


def test_the_mean_is_zero_where_all_tokens_are_equally_likely_or_one_is_certain():
    uniform = torch.zeros(1, 1, 5, dtype=torch.float64)
    sure = torch.tensor([[[200.0, 0, 0]]], dtype=torch.float64)
    for logits, c in ((uniform, 0.2), (sure, 1.0)):
        tokens = torch.zeros(1, 1, dtype=torch.long)
        found = distribution_sums(*scores(logits, tokens, 1.0), *scores(logits, tokens, 0.5))
        torch.testing.assert_close(found.sum_squared, torch.full((1, 1), c, dtype=torch.float64))
        assert abs(float(found.mean_discriminator)) < 1e-12
