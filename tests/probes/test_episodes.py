"""What turns and kinds of tokens did to entropy and reward, and their prices: on one rank as on two, and resumed."""

import pytest
import torch
from ranks_in_threads import on_ranks

from trl_entropy.probes.episodes import EpisodeRecords
from trl_entropy.rollouts.batch import RolloutBatch

MASK = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1]] * 2)
KINDS = torch.tensor([[0, 1, 0, 0, 0, 1]] * 8)
TURNS = [[0, 0, None, 1, None, 2], [0, None, None, 1, 1, None], [0, 0, 0, None, None, None], [0, 0, None, None, 1, 1]]
PROMPTS = torch.arange(8) // 2
GENERATOR = torch.Generator().manual_seed(0)
PAID, EARNED = (torch.randn(3, 8, 6, generator=GENERATOR, dtype=torch.float64) + shift for shift in (-0.5, 1.0))


def rollouts_of(rows):
    batch = object.__new__(RolloutBatch)
    for name in RolloutBatch.__dataclass_fields__:
        object.__setattr__(batch, name, {"loss_mask": MASK[rows], "prompt_index": PROMPTS[rows]}.get(name))
    return batch


def recorded(rows, accelerator, with_reward=True, resumed_after=None):
    records, logged = EpisodeRecords(), {}
    for step in range(3):
        if step == resumed_after:
            state, records = records.state_dict(), EpisodeRecords()
            records.load_state_dict(state)
        earned = EARNED[step, rows] if with_reward else None
        given = rollouts_of(rows), KINDS[rows], accelerator, earned
        logged = records.add(PAID[step, rows], torch.ones(len(rows), 6), *given)
    return logged


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_parts_and_prices_are_those_of_loops(num_ranks):
    shares = torch.arange(8).chunk(num_ranks)
    first, *others = on_ranks(num_ranks, lambda rank, accelerator: recorded(shares[rank], accelerator))
    assert all(other == pytest.approx(first) for other in others)
    for turn, name in enumerate(("turn_1", "turn_2", "turn_3")):
        places = [(row, k) for row in range(8) for k in range(6) if TURNS[row % 4][k] == turn]
        paid, earned = ([sum(float(of[s, i, k]) for i, k in places) for s in range(3)] for of in (PAID, EARNED))
        assert first[f"entropy/delta_{name}"] == pytest.approx(paid[2])
        assert first[f"reward/delta_{name}"] == pytest.approx(earned[2])
        assert first[f"reward/mean_delta_{name}"] == pytest.approx(sum(earned) / 3)
        assert first[f"reward/price_{name}"] == pytest.approx(-sum(paid) / sum(earned))
    whole = float((EARNED[2] * MASK).sum())
    for names in (("turn_1", "turn_2", "turn_3"), ("kind_prose", "kind_call")):
        assert sum(first[f"reward/delta_{name}"] for name in names) == pytest.approx(whole)
    assert not {"reward/price_turn_later", "reward/price_kind_arguments", "reward/price_all"} & first.keys()


def test_a_resumed_run_goes_on_where_it_was():
    straight, resumed, without = (
        on_ranks(1, lambda rank, accelerator, given=given: recorded(torch.arange(8), accelerator, **given))[0]
        for given in ({}, {"resumed_after": 2}, {"with_reward": False})
    )
    assert resumed == straight
    assert without == {key: value for key, value in straight.items() if key.startswith("entropy/")}
