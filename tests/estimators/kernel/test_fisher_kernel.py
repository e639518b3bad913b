"""The kernel and its summaries against loops over pairs, and against planted structure."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_oracles import exact_kernel
from tiny_groups import TinyGroups
from tiny_policy import TinyPolicy, multisets

from trl_entropy.estimators.kernel.fisher_kernel import (
    cosine_kernel,
    kernel_means,
    length_correlation,
    pair_mean,
    permuted_prompts,
    spectrum,
)
from trl_entropy.estimators.optimizer.adamw import live_preconditioner, preconditioner
from trl_entropy.estimators.statistics.u_statistic import cross_gram

PROMPTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
REWARDS = torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 1, 0, 1])


def random_rows(shared=0.0, prompts=PROMPTS, dim=9, seed=0):
    """Rows with a part in common per prompt, of variance `shared`."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(len(prompts), dim, generator=generator, dtype=torch.float64)
    common = torch.randn(int(prompts.max()) + 1, dim, generator=generator, dtype=torch.float64)
    return own + math.sqrt(shared) * common[prompts]


def random_metric(dim=9):
    exp_avg_sq = torch.rand(dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    exp_avg_sq[::4] = 0.0
    return live_preconditioner(exp_avg_sq, 3, 0.99, 1e-8), exp_avg_sq


def test_kernel_has_the_metric_once_and_only_where_it_means_something():
    rows, (metric, exp_avg_sq) = random_rows(), random_metric()
    gram = cross_gram(rows, rows, metric)
    weights = [1 / (math.sqrt(float(v) / (1 - 0.99**3)) + 1e-8) if v > 0 else 0.0 for v in exp_avg_sq]
    for i, j in itertools.product(range(10), repeat=2):
        expected = sum(w * float(a) * float(b) for w, a, b in zip(weights, rows[i], rows[j], strict=True))
        assert float(gram[i, j]) == pytest.approx(expected)
    assert int((metric == 0).sum()) == 3
    with_dead = cross_gram(rows, rows, preconditioner(exp_avg_sq, 3, 0.99, 1e-8))
    assert float(with_dead.trace()) > 1e6 * float(gram.trace())  # 1/eps


def test_cosine():
    rows = random_rows()
    rows[4] = 0.0
    cosine = cosine_kernel(exact_kernel(rows))
    for i, j in itertools.product(range(10), repeat=2):
        expected = torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0)
        assert cosine[i, j].isnan() if 4 in (i, j) else float(cosine[i, j]) == pytest.approx(float(expected))


def test_means_against_loops():
    gram = exact_kernel(random_rows())
    kept = {
        "diagonal": lambda i, j: i == j,
        "same_prompt": lambda i, j: i != j and PROMPTS[i] == PROMPTS[j],
        "cross_prompt": lambda i, j: PROMPTS[i] != PROMPTS[j],
    }
    for name in ("same_prompt", "cross_prompt"):
        kept[f"{name}_equal_reward"] = lambda i, j, f=kept[name]: f(i, j) and REWARDS[i] == REWARDS[j]
        kept[f"{name}_unequal_reward"] = lambda i, j, f=kept[name]: f(i, j) and REWARDS[i] != REWARDS[j]
    means = kernel_means(gram, PROMPTS, REWARDS)
    assert means.keys() == kept.keys()
    assert list(kernel_means(gram, PROMPTS)) == ["diagonal", "same_prompt", "cross_prompt"]
    for name, keep in kept.items():

        def mean(without=None, keep=keep):
            pairs = [p for p in itertools.product(range(10), repeat=2) if keep(*p)]
            values = [float(gram[i, j]) for i, j in pairs if without not in (int(PROMPTS[i]), int(PROMPTS[j]))]
            return sum(values) / len(values)

        left_out = [mean(without) for without in range(4)]
        stderr = math.sqrt(3 / 4 * sum((v - sum(left_out) / 4) ** 2 for v in left_out))
        assert means[name].value == pytest.approx(mean())
        assert means[name].stderr == pytest.approx(stderr)
        assert (means[name].dof, means[name].num_samples) == (3.0, 10)


def test_means_are_unbiased_and_those_of_pairs_expect_zero():
    """Every batch of two groups of two: pair means of K expect 0, as scores do; squares and rewards tell."""
    groups = TinyGroups(TinyPolicy(max_length=1))
    p, prompts, metric = groups.probability, torch.tensor([0, 0, 1, 1]), 1 + groups.theta.abs()
    mean, square = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for rows, q in multisets(p.tolist(), 2):
        gram = exact_kernel(groups.scores[rows].flatten(0, 1), metric)
        mean += q * torch.tensor([e.value for e in kernel_means(gram, prompts).values()], dtype=torch.float64)
        square += q * torch.tensor([e.value for e in kernel_means(gram**2, prompts).values()], dtype=torch.float64)
    a, b = groups.scores.unbind(1)
    diagonal, same = (a * metric * a).sum(1) / 2 + (b * metric * b).sum(1) / 2, (a * metric * b).sum(1)
    assert mean.tolist() == pytest.approx([float(p @ diagonal), 0.0, 0.0], abs=1e-12)
    assert float(square[1]) == pytest.approx(float(p @ same**2))
    assert float(square[1]) > 1.5 * float(square[2]) > 0.01
    equal = groups.rewards[:, 0] == groups.rewards[:, 1]
    assert float((p * same)[equal].sum()) == pytest.approx(-float((p * same)[~equal].sum()))
    assert float((p * same)[equal].sum()) > 0.1 * float(p @ diagonal)


def test_nothing_selected_is_nan():
    gram = torch.eye(3)
    assert math.isnan(pair_mean(gram, torch.zeros(3, 3, dtype=torch.bool), torch.arange(3)).value)
    one_prompt = kernel_means(gram, torch.zeros(3, dtype=torch.long))
    assert math.isnan(one_prompt["cross_prompt"].value)
    assert one_prompt["diagonal"].value == 1.0
    assert math.isnan(one_prompt["diagonal"].stderr)


def test_mean_interval_covers():
    """Prompts of 4 completions with a common part: same-prompt products expect `shared` times the dimension."""
    prompts, covered = torch.arange(24).repeat_interleave(4), {"same_prompt": 0, "cross_prompt": 0}
    for seed in range(100):
        means = kernel_means(exact_kernel(random_rows(0.5, prompts, 20, seed)), prompts)
        for name, truth in (("same_prompt", 10.0), ("cross_prompt", 0.0)):
            low, high = means[name].interval()
            covered[name] += low <= truth <= high
    assert covered["same_prompt"] >= 88
    assert covered["cross_prompt"] >= 95  # a degenerate U-statistic: the jackknife is conservative


def test_spectrum_of_known_matrices():
    orthogonal = torch.linalg.qr(random_rows(dim=10)).Q
    values = torch.tensor([4.0, 3, 2, 1] + [0.0] * 6, dtype=torch.float64)
    found = spectrum(orthogonal @ values.diag() @ orthogonal.T)
    torch.testing.assert_close(found.eigenvalues, values, rtol=0, atol=1e-12)
    assert found.participation_ratio == pytest.approx(100 / 30)
    entropy = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    flat, single = spectrum(torch.eye(7)), spectrum(torch.ones(5, 5))
    assert (flat.participation_ratio, flat.effective_rank) == (pytest.approx(7), pytest.approx(7))
    assert (single.participation_ratio, single.effective_rank) == (pytest.approx(1), pytest.approx(1))
    assert math.isnan(spectrum(torch.zeros(3, 3)).effective_rank)


def test_permuted_prompts_find_planted_structure_and_nothing_else():
    prompts = torch.arange(8).repeat_interleave(4)
    gram = exact_kernel(random_rows(0.5, prompts, 20))
    state = torch.random.get_rng_state()
    null = permuted_prompts(gram, prompts, 199, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())
    means = kernel_means(gram, prompts)
    assert null.difference == pytest.approx(means["same_prompt"].value - means["cross_prompt"].value)
    assert null.p_value == 1 / 200
    assert null.difference > 5 * null.null_stddev > 5 * abs(null.null_mean)
    assert null == permuted_prompts(gram, prompts, 199, torch.Generator().manual_seed(0))


def test_permutation_p_values_are_uniform_without_structure():
    prompts, generator = torch.arange(4).repeat_interleave(3), torch.Generator().manual_seed(0)
    p_values = [
        permuted_prompts(exact_kernel(random_rows(0.0, prompts, 6, seed)), prompts, 19, generator).p_value
        for seed in range(100)
    ]
    assert 0.4 < sum(p_values) / 100 < 0.65
    assert sum(p <= 0.1 for p in p_values) <= 19  # 10 expected


def test_length_correlation():
    prompts = torch.arange(6).repeat_interleave(2)
    lengths = torch.arange(1, 13)
    gram = lengths.double().outer(lengths.double())
    assert length_correlation(gram + 3.0, lengths, prompts).value == pytest.approx(1)
    noisy = gram + 40 * exact_kernel(random_rows(0.0, prompts, 4))
    estimate = length_correlation(noisy, lengths, prompts)

    def direct(kept):
        pairs = [(i, j) for i in kept for j in kept if prompts[i] != prompts[j]]
        return float(torch.corrcoef(torch.tensor([[float(noisy[p]), float(gram[p])] for p in pairs]).double().T)[0, 1])

    left_out = [direct([i for i in range(12) if prompts[i] != p]) for p in range(6)]
    stderr = math.sqrt(5 / 6 * sum((v - sum(left_out) / 6) ** 2 for v in left_out))
    assert (estimate.value, estimate.stderr) == (pytest.approx(direct(range(12))), pytest.approx(stderr))


@given(st.permutations(range(10)))
def test_order_of_completions_does_not_matter(order):
    gram = exact_kernel(random_rows())
    one = kernel_means(gram, PROMPTS, REWARDS)
    other = kernel_means(gram[order][:, order], PROMPTS[list(order)], REWARDS[list(order)])
    for name, estimate in one.items():
        assert other[name].value == pytest.approx(estimate.value)
        assert other[name].stderr == pytest.approx(estimate.stderr)
