"""(T14a): noise scale and U-statistic of accepted groups are unbiased however many there are, by enumeration.

Every sequence of draws of a tiny policy's groups goes through the rounds as training makes them: the first P groups,
then as many as `round_size` says, and `chosen_groups` fills the batch. Uninformative groups have no gradient, so they
are one outcome.
"""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from tiny_groups import TinyGroups
from tiny_policy import TinyPolicy

from trl_entropy.estimators.entropy_change.cross_prompt import accepted_gram
from trl_entropy.estimators.entropy_change.surrogate import surrogate_terms
from trl_entropy.estimators.noise.noise_scale import GroupProducts, accepted_products, group_products, jackknifed_parts
from trl_entropy.estimators.statistics.u_statistic import cross_gram, u_statistic
from trl_entropy.trainer.group_resampling import chosen_groups, round_size

POLICY = TinyPolicy(max_length=1)
GROUPS = TinyGroups(POLICY)
CASES = [(3, 1, 1), (2, 2, 1), (2, 1, 2)]  # P, rounds, prompts that a round must be a multiple of


class Law:
    """Outcome 0 is any uninformative group; the others have their rows of X and Y, and their probability."""

    def __init__(self, groups, entropy_rows):
        informative = groups.rewards.amax(1) > groups.rewards.amin(1)
        self.y, self.x, p = groups.gradients()[informative], entropy_rows[informative], groups.probability[informative]
        self.accepted_probability = p / p.sum()
        self.share = float(p.sum())
        self.probability = [1 - self.share, *p.tolist()]

    def batches(self, num_prompts, max_rounds, unit):
        """Numbers of the informative groups taken (outcomes - 1), and the probability, of every sequence of draws."""
        taken = defaultdict(float)
        pending = [([outcomes], p) for outcomes, p in self._sequences(num_prompts)]
        while pending:
            rounds, p = pending.pop()
            flags = [torch.tensor(outcomes) > 0 for outcomes in rounds]
            num_informative, num_drawn = sum(int(f.sum()) for f in flags), sum(map(len, flags))
            if num_informative >= num_prompts or len(rounds) > max_rounds:
                batch = [rounds[number][group] for number, group in chosen_groups(flags)]
                taken[tuple(outcome - 1 for outcome in batch if outcome)] += p
                continue
            size = round_size(num_prompts - num_informative, num_informative, num_drawn, unit, num_prompts)
            pending += [([*rounds, outcomes], p * q) for outcomes, q in self._sequences(size)]
        return dict(taken)

    def _sequences(self, size):
        for outcomes in itertools.product(range(len(self.probability)), repeat=size):
            yield outcomes, math.prod(self.probability[outcome] for outcome in outcomes)


def entropy_rows(groups, policy):
    """X_n (K, D) but for factors that are the same for all groups."""
    h = float(policy.policy_entropy(policy.theta))
    terms = torch.autograd.functional.jacobian(
        lambda theta: surrogate_terms(*policy.score(theta), policy.completion_mask, h), policy.theta
    )
    return terms[groups.rows].mean(1) / policy.mean_length(policy.theta)


LAW = Law(GROUPS, entropy_rows(GROUPS, POLICY))
METRIC = 1 + POLICY.theta.abs()


@pytest.fixture(scope="module", params=CASES, ids=str)
def batches(request):
    num_prompts = request.param[0]
    taken = LAW.batches(*request.param)
    assert sum(taken.values()) == pytest.approx(1.0)
    return num_prompts, taken


def padded(rows, num_prompts):
    """The step's groups: those taken, and the others without a gradient."""
    return torch.cat([rows, rows.new_zeros(num_prompts - len(rows), rows.shape[1])])


def given_number(taken, number, function):
    some = [(list(rows), p) for rows, p in taken.items() if len(rows) == number]
    return sum(p * function(rows) for rows, p in some) / sum(p for _, p in some)


def accepted_parts(metric):
    """|G|^2 and tr(Sigma) of the accepted law itself."""
    p, y = LAW.accepted_probability, LAW.y
    signal = (p @ y).square() @ (metric * torch.ones_like(y[0]))
    return [float(signal), float(p @ (y.square() * metric).sum(1) - signal)]


@pytest.mark.parametrize("metric", [None, METRIC], ids=["plain", "metric"])
def test_noise_parts_of_accepted_groups_are_unbiased(batches, metric):
    """Given how many were accepted, hence also over all steps with two or more."""
    num_prompts, taken = batches
    expected = accepted_parts(1.0 if metric is None else metric)

    def parts(rows):
        y = padded(LAW.y[rows], num_prompts)
        products = group_products(y, y.mean(0), [metric])[0]
        accepted = torch.arange(num_prompts) < len(rows)
        return jackknifed_parts(*accepted_products(products, accepted)).values

    numbers = {len(rows) for rows in taken}
    assert min(numbers) < num_prompts and max(numbers) == num_prompts  # the bound is met
    for number in numbers - {0, 1}:
        assert given_number(taken, number, parts).tolist() == pytest.approx(expected, rel=1e-9)


def test_with_the_kept_groups_left_in_it_is_biased():
    """For their own law: the mean gradient of a place in the batch. Their number depends on the other places."""
    num_prompts, taken = 3, LAW.batches(3, 1, 1)

    def parts(rows):
        y = padded(LAW.y[list(rows)], num_prompts)
        return jackknifed_parts(*group_products(y, y.mean(0))[0]).values

    mean = sum(p * parts(rows) for rows, p in taken.items())
    filled = sum(p * len(rows) for rows, p in taken.items()) / num_prompts
    signal = filled**2 * accepted_parts(1.0)[0]
    assert abs(float(mean[0]) / signal - 1) > 0.01
    assert abs(float(mean[0]) / accepted_parts(1.0)[0] - 1) > 0.1


def test_u_statistic_of_accepted_groups_is_unbiased(batches):
    """For E[X]' M E[g] given their number: g is N/P of an accepted group's mean."""
    num_prompts, taken = batches
    p = LAW.accepted_probability
    exact = float((p @ LAW.x * METRIC) @ (p @ LAW.y))

    def statistic(rows):
        x, y = (padded(values[rows], num_prompts) for values in (LAW.x, LAW.y))
        x[len(rows) :] = 7.0  # completions without different rewards have an entropy all the same
        accepted = torch.arange(num_prompts) < len(rows)
        return u_statistic(accepted_gram(cross_gram(x, y, METRIC), accepted))

    for number in {len(rows) for rows in taken} - {0, 1}:
        assert given_number(taken, number, statistic) == pytest.approx(number / num_prompts * exact, rel=1e-9)


def test_accepted_groups_are_not_the_policy():
    """Selected by their rewards, their completions have another entropy gradient than the policy."""
    of_policy, of_accepted = (GROUPS.probability @ entropy_rows(GROUPS, POLICY)), LAW.accepted_probability @ LAW.x
    torch.testing.assert_close(of_policy, POLICY.policy_entropy_gradient(POLICY.theta), rtol=1e-9, atol=1e-12)
    assert (of_accepted - of_policy).norm() > 0.2 * of_policy.norm()


def test_all_prompts_from_accepted_groups():
    """With a the informative share: |G|^2 = a^2 |G_acc|^2, tr(Sigma) = a tr(Sigma_acc) + a (1-a) |G_acc|^2."""
    signal, noise = accepted_parts(1.0)
    a = LAW.share
    assert 0.1 < a < 0.9
    assert GROUPS.exact_parts() == pytest.approx((a**2 * signal, a * noise + a * (1 - a) * signal))


def test_too_few_accepted_groups_have_no_parts():
    products = GroupProducts(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    for flags in ([False, False, False], [True, False, False]):
        parts = jackknifed_parts(*accepted_products(products, torch.tensor(flags)))
        assert parts.values.isnan().all() and parts.covariance.isnan().all()
        assert math.isnan(u_statistic(accepted_gram(torch.ones(3, 3), torch.tensor(flags))))
