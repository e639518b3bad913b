"""One step's changes from scores alone, against loops over completions and derivatives of the ratio itself."""

import functools

import pytest
import torch
from tiny_policy import TinyPolicy

from trl_entropy.estimators.entropy_change.step_change import (
    importance_sample_size,
    point_terms,
    stacked,
    step_changes,
    unstacked,
)

POLICY = TinyPolicy()
SAMPLE, PROMPTS = POLICY.sample(6, 3, torch.Generator().manual_seed(0))
MASK = POLICY.completion_mask[SAMPLE]


def scores_at(share, num_derivatives):
    """Entropy and logps of the sample at theta + share * update, and their derivatives along the update."""

    def scores(s):
        entropy, logps = POLICY.score(POLICY.theta + s * POLICY.update)
        return torch.stack([entropy[SAMPLE], logps[SAMPLE]])

    def derivative(function):
        return lambda s: torch.func.jvp(function, (s,), (torch.ones_like(s),))[1]

    at, levels = torch.tensor(float(share), dtype=torch.float64), [scores]
    for _ in range(num_derivatives):
        levels.append(derivative(levels[-1]))
    return [tuple(part) for part in zip(*(level(at) for level in levels), strict=True)]


@functools.cache
def points(form):
    (entropy, logps), after = scores_at(0, 2), scores_at(1, 1)
    planned = point_terms(entropy, logps, logps[0], MASK, form)
    before = point_terms(entropy[:2], logps[:2], logps[0], MASK, form)
    return before, point_terms(*after, logps[0], MASK, form), planned


def ratio_by_loops(share, form):
    """(T6): completions and tokens one by one."""
    (entropy,), (logps,) = scores_at(share, 0)
    (_,), (sampling,) = scores_at(0, 0)
    top = bottom = 0.0
    for i in range(len(SAMPLE)):
        length = int(MASK[i].sum())
        for k in range(length):
            upto = k if form == "decision" else length
            weight = (logps[i, :upto] - sampling[i, :upto]).sum().exp()
            top, bottom = top + weight * entropy[i, k], bottom + weight
    return float(top / bottom)


@pytest.mark.parametrize("form", ["decision", "sequence"])
def test_changes_against_the_ratio_itself(form):
    """Measured: its difference. The rest: its derivatives at both ends of the step, here by central differences."""
    before, after, planned = points(form)
    changes = {name: float(change.value) for name, change in step_changes(before, after, planned).items()}
    step = 1e-3

    def ratio(share):
        return ratio_by_loops(share, form)

    slopes = [(ratio(at + step) - ratio(at - step)) / (2 * step) for at in (0, 1)]
    curvature = (ratio(step) - 2 * ratio(0) + ratio(-step)) / step**2
    assert changes["measured"] == pytest.approx(ratio(1) - ratio(0), rel=1e-12)
    assert changes["linear"] == pytest.approx(slopes[0], rel=1e-6)
    assert changes["trapezoid"] == pytest.approx(sum(slopes) / 2, rel=1e-6)
    assert changes["second_order"] == pytest.approx(slopes[0] + curvature / 2, rel=1e-5)
    assert list(step_changes(before, after)) == ["measured", "linear", "trapezoid"]
    assert list(step_changes(before, after, before)) == ["measured", "linear", "trapezoid"]


def test_weights_are_one_where_the_completions_were_drawn():
    before, after, _ = points("decision")
    torch.testing.assert_close(before.terms.denominator, MASK.sum(1).double())
    assert importance_sample_size(before, before) == pytest.approx(len(SAMPLE))
    (_,), (logps,) = scores_at(1, 0)
    (_,), (sampling,) = scores_at(0, 0)
    weights = [
        sum(float((logps[i, :k] - sampling[i, :k]).sum().exp()) for k in range(int(MASK[i].sum())))
        / float(MASK[i].sum())
        for i in range(len(SAMPLE))
    ]
    expected = sum(weights) ** 2 / sum(w * w for w in weights)
    assert importance_sample_size(before, after) == pytest.approx(expected)
    assert expected < len(SAMPLE)


def test_columns_go_there_and_back():
    before, _, planned = points("decision")
    for point, width in ((before, 4), (planned, 6)):
        columns = stacked(point)
        assert columns.shape == (len(SAMPLE), width)
        torch.testing.assert_close(stacked(unstacked(columns)), columns)
    assert unstacked(stacked(before)).second_tangents is None


@pytest.mark.parametrize("form", ["decision", "sequence"])
@pytest.mark.parametrize("drawn_at", [1.0, 0.4], ids=["after the step", "by an earlier policy"])
def test_completions_of_the_next_step_tell_of_both_ends(form, drawn_at):
    """By enumeration: weighed to either end, the expected sums give the entropy there and its exact derivative."""
    there = POLICY.theta + drawn_at * POLICY.update
    probabilities, sampling = POLICY.probabilities(there), POLICY.score(there)[1]
    for share in (0.0, 1.0):
        theta = POLICY.theta + share * POLICY.update
        (entropy, logps), tangents = torch.func.jvp(POLICY.score, (theta,), (POLICY.update,))
        levels = zip((entropy, logps), tangents, strict=True)
        found = point_terms(*levels, sampling, POLICY.completion_mask, form)
        top, bottom = (float(probabilities @ column) for column in found.terms)
        d_top, d_bottom = (float(probabilities @ column) for column in found.tangents)
        assert bottom == pytest.approx(float(POLICY.mean_length(theta)), rel=1e-12)
        assert top / bottom == pytest.approx(float(POLICY.policy_entropy(theta)), rel=1e-12)
        slope = float(POLICY.policy_entropy_gradient(theta) @ POLICY.update)
        assert (d_top - top / bottom * d_bottom) / bottom == pytest.approx(slope, rel=1e-9)


def test_predictions_without_derivatives_are_left_out():
    (entropy, logps), after = scores_at(0, 1), scores_at(1, 1)
    value_alone = point_terms(*((scores[0],) for scores in after), logps[0], MASK)
    before = point_terms(entropy, logps, logps[0], MASK)
    assert set(step_changes(before, value_alone)) == {"measured", "linear"}
    assert set(step_changes(value_alone, value_alone)) == {"measured"}
    assert unstacked(stacked(value_alone)).tangents is None
