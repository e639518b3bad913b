"""Token entropies against loops and whole-outcome probabilities."""

import math

import pytest
import torch
from tiny_policy import TinyPolicy

from trl_entropy.estimators.entropy_change.entropy import entropy_and_logps


def test_against_loops():
    logits, ids, temperature = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.1]]).double(), torch.tensor([1, 2]), 0.7
    entropy, logps = entropy_and_logps(logits, ids, temperature)
    for row in range(2):
        scores = [math.exp(float(x) / temperature) for x in logits[row]]
        probabilities = [score / sum(scores) for score in scores]
        assert float(entropy[row]) == pytest.approx(-sum(p * math.log(p) for p in probabilities), rel=1e-14)
        assert float(logps[row]) == pytest.approx(math.log(probabilities[ids[row]]), rel=1e-14)


def test_uniform_and_certain():
    logits = torch.stack([torch.zeros(50), torch.full((50,), -500.0).index_fill(0, torch.tensor(3), 500.0)])
    entropy, logps = entropy_and_logps(logits, torch.tensor([3, 3]))
    assert entropy.tolist() == pytest.approx([math.log(50), 0.0], rel=1e-6)
    assert logps.tolist() == pytest.approx([-math.log(50), 0.0], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_precision(given, returned):
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)).to(given)
    entropy, logps = entropy_and_logps(logits, torch.zeros(3, dtype=torch.long))
    assert (entropy.dtype, logps.dtype) == (returned, returned)
    exact = entropy_and_logps(logits.double(), torch.zeros(3, dtype=torch.long))[0]
    assert entropy.double().tolist() == pytest.approx(exact.tolist(), rel=1e-6)  # bf16 logits lose nothing more


def test_token_entropies_and_surprisals_add_up_to_the_entropy_of_outcomes():
    """E[sum H] = E[-sum S] = -sum_o p(o) log p(o); the Rao-Blackwell form varies less."""
    policy = TinyPolicy()
    logits = policy.features @ policy.theta.view(policy.features.shape[-1], -1)
    entropy, logps = entropy_and_logps(logits, policy.token_ids)
    p = policy.probabilities(policy.theta)
    exact = -(p * (p * policy.num_prompts).log()).sum()
    sums = [(values * policy.completion_mask).sum(1) for values in (entropy, -logps)]
    assert [float(p @ s) for s in sums] == pytest.approx([float(exact)] * 2, rel=1e-12)
    rao_blackwell, sampled = (float(p @ s.square() - (p @ s).square()) for s in sums)
    assert rao_blackwell < 0.5 * sampled
