"""Sums by outcome against loops."""

import torch

from trl_entropy.estimators.attribution.likelihood import outcome_sums


def test_sums_are_those_of_loops_and_add_over_processes():
    generator = torch.Generator().manual_seed(0)
    changes, advantages = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages[3], tokens = 0.0, torch.randint(1, 9, (9,), generator=generator).double()
    rows = list(zip(changes.tolist(), tokens.tolist(), advantages.tolist(), strict=True))
    expected = [
        [sum(c for c, _, a in rows if a > 0), sum(n for _, n, a in rows if a > 0)],
        [sum(c for c, _, a in rows if a < 0), sum(n for _, n, a in rows if a < 0)],
        [sum(c < 0 for c, _, a in rows if a > 0), sum(a > 0 for _, _, a in rows)],
    ]
    found = outcome_sums(changes, tokens, advantages)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    halves = [outcome_sums(changes[part], tokens[part], advantages[part]) for part in (slice(4), slice(4, 9))]
    torch.testing.assert_close(sum(halves), found)
