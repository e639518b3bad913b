"""What the probe keeps over its steps: pairs by kind, with the errors they share, and sums that begin somewhere."""

import json
import math

import pytest

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments
from trl_entropy.probes.agreement import RunningAgreement

PAIRS = [(0.1, 0.12), (-0.2, -0.15), (0.3, 0.31), (0.05, 0.0)]


def estimate(value, stderr):
    return Estimate(value, stderr, 7.0, 8)


def agreement_of(pairs, difference_stderr=None):
    found = RunningAgreement()
    for predicted, measured in pairs:
        difference = None if difference_stderr is None else estimate(predicted - measured, difference_stderr)
        found.add_pair("kind", estimate(predicted, 0.03), estimate(measured, 0.04), difference)
    return found


@pytest.mark.parametrize("difference_stderr, covariance", [(None, 0.0), (0.02, (0.03**2 + 0.04**2 - 0.02**2) / 2)])
def test_errors_of_the_same_completions_are_paired_and_others_independent(difference_stderr, covariance):
    moments = PairMoments.empty()
    for predicted, measured in PAIRS:
        moments = moments.update(predicted, measured, 0.03, 0.04, covariance)
    logged = agreement_of(PAIRS, difference_stderr).metrics()
    for name in ("slope", "corrected_slope", "correlation", "r_squared", "ceiling_r_squared"):
        expected = getattr(moments, name)()
        assert logged[f"entropy/kind_{name}"] == pytest.approx(expected.value, nan_ok=True)
        assert logged[f"entropy/kind_{name}_stderr"] == pytest.approx(expected.stderr, nan_ok=True)


def test_the_corrected_slope_tells_the_two_apart():
    paired, independent = (agreement_of(PAIRS, error).metrics() for error in (0.02, None))
    assert paired["entropy/kind_slope"] == independent["entropy/kind_slope"]
    assert paired["entropy/kind_corrected_slope"] < independent["entropy/kind_corrected_slope"]


def test_statistics_begin_with_the_third_pair_and_a_diverged_step_is_no_pair():
    assert agreement_of(PAIRS[:2]).metrics() == {}
    assert agreement_of([*PAIRS[:2], (math.nan, 0.1), (0.1, math.inf)]).metrics() == {}
    assert agreement_of([*PAIRS, (math.nan, 0.1)]).metrics() == agreement_of(PAIRS).metrics()


def test_a_sum_begins_at_the_entropy_before_the_first_step():
    found = RunningAgreement()
    for start, change in ((2.0, -0.25), (1.75, 0.5), (99.0, 0.125)):
        found.add_change("measured", start, change)
    found.add_change("linear", 2.0, 1.0)
    assert found.metrics() == {"entropy/integral_measured": 2.375, "entropy/integral_linear": 3.0}


def test_it_goes_on_where_it_was_saved():
    straight, first, second = agreement_of(PAIRS, 0.02), agreement_of(PAIRS[:2], 0.02), RunningAgreement()
    for one in (straight, first):
        one.add_change("measured", 2.0, 0.25)
    second.load_state_dict(first.state_dict())
    for predicted, measured in PAIRS[2:]:
        pair = estimate(predicted, 0.03), estimate(measured, 0.04), estimate(predicted - measured, 0.02)
        second.add_pair("kind", *pair)
    assert json.dumps(second.metrics()) == json.dumps(straight.metrics())
    second.add_change("measured", 2.0, 1.0)
    assert first.metrics()["entropy/integral_measured"] == 2.25  # the state is not shared
