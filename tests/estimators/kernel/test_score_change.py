"""The kernel's prediction adds up to grad S_i . dtheta of torch's own AdamW step, part by part (T12)."""

import functools

import pytest
import torch
from kernel_oracles import exact_kernel, score_form_coefficients
from tiny_groups import TinyGroups, score_gradients
from tiny_policy import TinyPolicy, multisets
from tiny_step import DEAD, TinyStep

from trl_entropy.estimators.kernel.score_change import (
    change_agreement,
    score_change_parts,
    score_change_shares,
    score_change_sums,
)


@functools.cache
def tiny_step():
    return TinyStep()


def parts_of(step, rows):
    """The prediction for some of the completions, whole prompts, from the Gram of those alone."""
    scores = step.scores[rows]
    products = exact_kernel(scores, step.metric) * step.alpha[rows, 0]
    return score_change_parts(
        products,
        step.prompt_index[rows],
        step.coefficient,
        (scores * step.metric) @ step.gradient,
        scores @ step.parts.momentum,
        scores @ step.parts.weight_decay,
    )


@pytest.mark.parametrize("num_rows", [16, 8, 4])
def test_parts_sum_to_the_change(num_rows):
    step = tiny_step()
    assert step.clip < 0.9
    assert float(step.metric[DEAD]) == 0.0
    rows = torch.arange(num_rows)
    parts = parts_of(step, rows)
    assert all(float(part.abs().max()) > 1e-6 for part in parts)
    torch.testing.assert_close(sum(parts), step.scores[rows] @ step.update, rtol=0, atol=1e-12)


def test_rows_of_part_of_the_batch_lose_nothing():
    step = tiny_step()
    whole, part = parts_of(step, torch.arange(16)), parts_of(step, torch.arange(4, 12))
    for of_all, of_some in zip(whole, part, strict=True):
        torch.testing.assert_close(of_all[4:12], of_some, rtol=0, atol=1e-14)


def test_parts_against_loops():
    step = tiny_step()
    parts = parts_of(step, torch.arange(16))
    for i in range(16):
        acts = [-step.coefficient * float((step.scores[i] * step.metric) @ step.gradients[j]) for j in range(16)]
        mates = [j for j in range(16) if step.prompt_index[j] == step.prompt_index[i] and j != i]
        others = [j for j in range(16) if step.prompt_index[j] != step.prompt_index[i]]
        assert float(parts.own[i]) == pytest.approx(acts[i], abs=1e-14)
        assert float(parts.same_prompt[i]) == pytest.approx(sum(acts[j] for j in mates), abs=1e-14)
        assert float(parts.other_prompts[i]) == pytest.approx(sum(acts[j] for j in others), abs=1e-14)


def test_shares_of_the_change():
    step = tiny_step()
    parts = parts_of(step, torch.arange(16))
    sums = score_change_sums(parts, step.prompt_index)
    shares = score_change_shares(sums)
    whole = step.scores @ step.update
    assert sum(share.value for share in shares.values()) == pytest.approx(1)
    for name, part in parts._asdict().items():
        assert shares[name].value == pytest.approx(float(part @ whole / whole.square().sum()))
        own, total = sums[:, list(shares).index(name)].tolist(), sums.sum(1).tolist()
        left_out = [(sum(own) - own[p]) / (sum(total) - total[p]) for p in range(4)]
        variance = 3 / 4 * sum((value - sum(left_out) / 4) ** 2 for value in left_out)
        assert shares[name].stderr == pytest.approx(variance**0.5)
        assert (shares[name].dof, shares[name].num_samples) == (3.0, 4)


def test_score_form_of_the_entropy_gradient():
    """Its rows give grad h in expectation, with h and E[T] put in, and not sample by sample."""
    policy = TinyPolicy()
    p, h = policy.probabilities(policy.theta), float(policy.policy_entropy(policy.theta))
    scores, logps = score_gradients(policy, policy.theta), policy.score(policy.theta)[1].sum(1)
    # S here is log pi(o | prompt): what `sequence_logps` is
    weights = score_form_coefficients(logps, policy.num_tokens, h) * policy.num_tokens.sum()
    mean = (p * weights) @ scores / policy.mean_length(policy.theta)
    torch.testing.assert_close(mean, policy.policy_entropy_gradient(policy.theta), rtol=1e-11, atol=1e-13)


def test_own_influence_is_not_that_of_fresh_completions():
    """On its own completions a step raises sum A_i S_i by what each group does to itself, too."""
    policy = TinyPolicy(max_length=1)
    groups = TinyGroups(policy)
    y, p = groups.gradients(), groups.probability
    advantages = groups.rewards - groups.rewards.mean(1, keepdim=True)
    shares = groups.completion_gradients() / 4  # of the gradient of a step of two groups of two completions

    def changes(rows):
        """Mean of A_i times each part of the change of S_i, in a step of length 1 with M = 1."""
        scores, g = groups.scores[rows].flatten(0, 1), shares[rows].flatten(0, 1)
        nothing = torch.zeros(4, dtype=torch.float64)
        prompts = torch.tensor([0, 0, 1, 1])
        parts = score_change_parts(-(scores @ g.T), prompts, 1.0, scores @ g.sum(0), nothing, nothing)
        weights = advantages[rows].flatten() / 4
        return torch.stack([weights @ parts.own, weights @ parts.same_prompt, weights @ parts.other_prompts])

    own, mates, others = sum(q * changes(rows) for rows, q in multisets(p.tolist(), 2)).tolist()
    per_group = (advantages[..., None] * groups.scores).mean(1)
    # What another, independent group does: half the product of the two expectations, for two groups.
    assert others == pytest.approx(float(-(p @ per_group) @ (p @ y)) / 2)
    by_itself = sum(
        q * float(-(per_group[rows] @ y[rows].T).diagonal().mean()) for rows, q in multisets(p.tolist(), 2)
    )
    assert own + mates == pytest.approx(by_itself / 2)
    assert own > 0 and own + mates > 3 * others > 0


def test_agreement_is_the_slope_through_the_origin_with_a_jackknife_error():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(5).repeat_interleave(3)
    predicted = torch.randn(15, generator=generator, dtype=torch.float64)
    measured = 1.2 * predicted + 0.1 * torch.randn(15, generator=generator, dtype=torch.float64)
    slope, correlation = change_agreement(predicted, measured, prompts)
    assert slope.value == pytest.approx(float(predicted @ measured / (predicted @ predicted)))
    x, y = predicted - predicted.mean(), measured - measured.mean()
    assert correlation == pytest.approx(float(x @ y / (x.norm() * y.norm())))
    left_out = []
    for prompt in range(5):
        x, y = predicted[prompts != prompt], measured[prompts != prompt]
        left_out.append(float(x @ y / (x @ x)))
    variance = 4 / 5 * sum((value - sum(left_out) / 5) ** 2 for value in left_out)
    assert slope.stderr == pytest.approx(variance**0.5) and (slope.dof, slope.num_samples) == (4, 5)
    assert change_agreement(predicted, 2 * predicted, prompts)[0].stderr == pytest.approx(0, abs=1e-7)
