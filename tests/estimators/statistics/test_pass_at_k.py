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


def outcomes_of(num_samples, chance):
    """(probability, number of correct samples, outcome) of all outcomes of independent samples."""
    for outcome in itertools.product((0, 1), repeat=num_samples):
        yield math.prod(chance if correct else 1 - chance for correct in outcome), sum(outcome), outcome


def test_it_has_not_the_bias_of_the_plug_in_of_the_mean():
    num_samples, k, chance = 4, 4, 0.25
    truth, plug_in, found = 1 - (1 - chance) ** k, 0.0, 0.0
    for probability, num_correct, _ in outcomes_of(num_samples, chance):
        plug_in += probability * (1 - (1 - num_correct / num_samples) ** k)
        found += probability * float(pass_at_k(torch.tensor([num_correct]), num_samples, k))
    assert found == pytest.approx(truth, abs=1e-13) and plug_in < truth - 0.1  # 1 - (1 - c/n)^k is far too low


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_varies_less_than_the_first_k_and_agrees_with_it_on_average(k):
    num_samples, chance = 6, 0.3
    moments = {"all": [0.0, 0.0], "first": [0.0, 0.0]}
    for probability, num_correct, outcome in outcomes_of(num_samples, chance):
        found = {
            "all": float(pass_at_k(torch.tensor([num_correct]), num_samples, k)),
            "first": float(any(outcome[:k])),
        }
        for name, value in found.items():
            moments[name][0] += probability * value
            moments[name][1] += probability * value**2
    assert moments["all"][0] == pytest.approx(moments["first"][0], abs=1e-13)
    variances = {name: square - mean**2 for name, (mean, square) in moments.items()}
    assert 0 < variances["all"] < 0.9 * variances["first"]


def test_what_is_refused():
    with pytest.raises(ValueError, match="k=5 of 4 samples"):
        pass_at_k(torch.tensor([1]), 4, 5)
    with pytest.raises(ValueError, match="0 to 4"):
        pass_at_k(torch.tensor([5]), 4, 1)


def test_powers_of_two():
    assert [powers_of_two_up_to(n) for n in (1, 2, 3, 4, 7, 8)] == [[1], [1, 2], [1, 2], [1, 2, 4], [1, 2, 4],
                                                                    [1, 2, 4, 8]]  # fmt: skip
