"""pass@k by enumeration of all subsets and of all outcomes."""

import itertools
import math

import pytest
import torch

from trl_entropy.estimators.statistics.pass_at_k import pass_at_k, powers_of_two_up_to


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples):
    for k in range(1, num_samples + 1):
        for num_correct in range(num_samples + 1):
            outcomes = [1] * num_correct + [0] * (num_samples - num_correct)
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            (found,) = pass_at_k(torch.tensor([num_correct]), num_samples, k).tolist()
            assert found == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("chance", [0.1, 0.6])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_is_unbiased_over_all_outcomes(chance, k):
    num_samples, mean = 6, 0.0
    for outcome in itertools.product((0, 1), repeat=num_samples):
        probability = math.prod(chance if correct else 1 - chance for correct in outcome)
        mean += probability * float(pass_at_k(torch.tensor([sum(outcome)]), num_samples, k))
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-13)


def test_the_plug_in_of_the_mean_would_be_biased():
    num_samples, k, chance = 4, 4, 0.25
    outcomes = itertools.product((0, 1), repeat=num_samples)
    mean = sum(chance ** sum(o) * (1 - chance) ** (4 - sum(o)) * (1 - (1 - sum(o) / 4) ** k) for o in outcomes)
    assert mean < 1 - (1 - chance) ** k - 0.1  # 1 - (1 - c/n)^k is far too low, which the unbiased form is not


def test_it_varies_less_than_the_first_k_and_agrees_with_it_on_average():
    num_samples, k = 6, 2
    for num_correct in range(num_samples + 1):
        orders = set(itertools.permutations([1] * num_correct + [0] * (num_samples - num_correct)))
        first_k = [float(any(order[:k])) for order in orders]
        assert sum(first_k) / len(first_k) == pytest.approx(float(pass_at_k(torch.tensor([num_correct]), 6, k)))


def test_what_is_refused():
    with pytest.raises(ValueError, match="k=5 of 4 samples"):
        pass_at_k(torch.tensor([1]), 4, 5)
    with pytest.raises(ValueError, match="0 to 4"):
        pass_at_k(torch.tensor([5]), 4, 1)


def test_powers_of_two():
    assert [powers_of_two_up_to(n) for n in (1, 2, 3, 4, 7, 8)] == [[1], [1, 2], [1, 2], [1, 2, 4], [1, 2, 4],
                                                                    [1, 2, 4, 8]]  # fmt: skip
