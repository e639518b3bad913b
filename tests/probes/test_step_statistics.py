"""Sums over the tokens of a step, micro-batch by micro-batch, against loops over its tokens."""

import math

import pytest
import torch
from ranks_in_threads import on_ranks

from trl_entropy.probes.step_statistics import StepStatistics


def micro_batches(seed=0):
    """(per_token_logps, token_entropy, log_ratio, start_logps, mask); what is masked is nan or large."""
    generator = torch.Generator().manual_seed(seed)
    for width in (5, 3):
        logps, entropy, ratio, start = torch.rand(4, 4, width, generator=generator)
        mask = (torch.arange(width) < torch.tensor([[width], [1], [2], [0]])).long()
        yield -logps, entropy.where(mask.bool(), 9.0), (ratio - 0.5).where(mask.bool(), 9.0), -start, mask


def tokens_of(place):
    return [float(x) for batch in micro_batches() for x in batch[place][batch[4].bool()]]


def reduced(accelerator, batches, off_policy=True):
    statistics = StepStatistics(torch.device("cpu"))
    for logps, entropy, ratio, start, mask in batches:
        statistics.add_tokens(logps, entropy, ratio if off_policy else None, mask)
        statistics.add_kl(logps, start, mask)
        statistics.add_chosen(mask.bool() & (entropy > 0.5), logps)
    return statistics.reduce(accelerator)


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("first", [0, 1])  # the largest ratio is on either rank
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_means_are_over_the_tokens_of_all_micro_batches_and_ranks(num_ranks, first):
    batches = list(micro_batches())[:: 1 - 2 * first]
    share = len(batches) // num_ranks
    shares = [batches[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
    found, *others = on_ranks(num_ranks, lambda rank, accelerator: reduced(accelerator, shares[rank]))
    logps, entropy, ratio, start = map(tokens_of, range(4))
    assert all(other == found for other in others)
    assert len(entropy) == 8 + 6
    assert found["entropy/policy"] == pytest.approx(mean(entropy), rel=1e-6)
    assert found["entropy/surprisal"] == pytest.approx(-mean(logps), rel=1e-6)
    assert found["ratio/mean"] == pytest.approx(mean([math.exp(x) for x in ratio]), rel=1e-6)
    assert found["ratio/max"] == pytest.approx(math.exp(max(ratio)), rel=1e-6)
    assert found["ratio/median"] == pytest.approx(math.exp(sorted(ratio)[6]), rel=0.03)
    # KL of the policy to the start policy, by what TRL takes for it: k3, of log pi_start - log pi.
    differences = [b - a for a, b in zip(logps, start, strict=True)]
    assert found["kl"] == pytest.approx(mean([math.exp(d) - d - 1 for d in differences]), rel=1e-6)
    chosen = [a for a, h in zip(logps, entropy, strict=True) if h > 0.5]
    assert found["token_control/num_tokens"] == len(chosen) > 2
    assert found["token_control/mean_covariance"] == pytest.approx(mean(chosen), rel=1e-6)


def test_on_policy_every_ratio_is_1():
    (found,) = on_ranks(1, lambda rank, accelerator: reduced(accelerator, micro_batches(), off_policy=False))
    assert {found[f"ratio/{name}"] for name in ("mean", "median", "p90", "p99", "max")} == {1.0}


def test_without_a_token_there_is_no_mean():
    statistics = StepStatistics(torch.device("cpu"))
    nothing = torch.zeros(2, 3)
    statistics.add_tokens(nothing, nothing, None, nothing.long())
    (found,) = on_ranks(1, lambda rank, accelerator: statistics.reduce(accelerator))
    assert math.isnan(found["entropy/policy"])
