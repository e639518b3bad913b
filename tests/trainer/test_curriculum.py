"""The pass-rate sampler: what it draws, how it learns, that it resumes."""

import itertools

import pytest
import torch

from trl_entropy.trainer.curriculum import PassRateSampler


def sampler(**settings):
    defaults = {"num_prompts": 40, "batch_size": 8, "mini_repeat_count": 1, "repeat_count": 1, "seed": 3}
    return PassRateSampler(**(defaults | settings))


def chunks(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def test_layout_is_that_of_trls_sampler():
    from trl.trainer.utils import RepeatSampler

    ours = sampler(batch_size=4, mini_repeat_count=3, repeat_count=2)
    theirs = RepeatSampler(range(40), mini_repeat_count=3, batch_size=4, repeat_count=2, seed=3)
    rows, expected = list(ours), list(theirs)
    assert len(rows) == len(expected) == len(ours) == len(theirs)
    for mine, other in zip(chunks(rows, 24), chunks(expected, 24), strict=True):
        assert mine[:12] == mine[12:] and other[:12] == other[12:]
        assert all(len(set(group)) == 1 for group in chunks(mine, 3)) and len(set(mine)) == 4


def test_with_one_bucket_every_prompt_comes_once_an_epoch():
    source = sampler()
    assert sorted(source) == list(range(40))  # all rates are 0.5: normal
    assert sorted(source) == list(range(40))


def test_draws_follow_the_weights():
    source = sampler(num_prompts=400, batch_size=100, weights=(3.0, 1.0, 0.0), ema=1.0)
    source.update(dict.fromkeys(range(200), 0.0) | dict.fromkeys(range(300, 400), 1.0))
    assert source.bucket_sizes() == {"hard": 200, "normal": 100, "easy": 100}
    drawn = next(iter(chunks(list(source), 100)))
    hard = sum(i < 200 for i in drawn)
    assert not any(i >= 300 for i in drawn) and 60 <= hard <= 90 and len(set(drawn)) == 100


def test_round_robin_inside_a_bucket():
    source = sampler(num_prompts=30, batch_size=5, weights=(1.0, 0.0, 0.0), ema=1.0)
    source.update(dict.fromkeys(range(10), 0.0))
    rows = chunks(list(source), 5)
    assert set(rows[0] + rows[1]) == set(range(10)) == set(rows[2] + rows[3])
    assert rows[2] == rows[0]


def test_what_is_excluded_is_not_drawn_and_keeps_its_turn():
    source = sampler(num_prompts=10, batch_size=5)
    first = source.draw(4, exclude={0, 1, 2})
    assert len(set(first)) == 4 and not {0, 1, 2} & set(first)
    rest = source.draw(9, exclude=first)
    assert sorted(first + rest) == list(range(10))  # six were left, and those came in their order
    assert source.draw(2) == first[:2]


def test_buckets_without_weight_are_drawn_when_nothing_else_is_left():
    source = sampler(num_prompts=8, batch_size=8, weights=(1.0, 0.0, 0.0))
    assert sorted(source) == list(range(8))
    with pytest.raises(ValueError, match="7 prompts, a generation takes 8 distinct"):
        sampler(num_prompts=7)


def test_pass_rates_are_moving_averages_and_bounds_belong_to_normal():
    source = sampler(ema=0.5)
    source.update({0: 1.0, 1: 0.0})
    source.update({0: 1.0})
    assert source.rates[:3].tolist() == [0.875, 0.25, 0.5]
    source.rates[:2] = torch.tensor([0.2, 0.8], dtype=torch.float64)
    assert source.bucket_sizes() == {"hard": 0, "normal": 40, "easy": 0}


@pytest.mark.parametrize("seen", [1, 3, 5])
def test_resumed_draws_are_those_of_the_unbroken_run(seen):
    """Rates change while drawing; one generation is always fetched ahead, as accelerate's loader does."""

    def learn(source, rows):
        source.update({i: float(i % 3 == 0) for i in rows})

    straight, expected = sampler(), []
    state = None
    for epoch in range(2):
        for number, rows in enumerate(generations(straight)):
            expected.append(rows)
            learn(straight, rows)
            if epoch == 0 and number == seen - 1:
                state = {k: v.clone() if hasattr(v, "clone") else v for k, v in straight.state_dict().items()}
                state["drawn"] = [list(chunk) for chunk in state["drawn"]]
    resumed, got = sampler(), []
    resumed.resumes_within_epoch = seen < 5
    resumed.load_state_dict(state)
    if seen < 5:
        for number, rows in enumerate(generations(resumed)):
            got.append(rows)
            if number >= seen:
                learn(resumed, rows)
    else:
        got = expected[:5]
    for rows in generations(resumed):
        got.append(rows)
        learn(resumed, rows)
    assert got == expected


def generations(source):
    """Chunks of 8 with the next one drawn before the current one is handed out."""
    iterator = iter(source)
    ahead = list(itertools.islice(iterator, 8))
    while ahead:
        current = ahead
        ahead = list(itertools.islice(iterator, 8))
        yield current
