"""The sample size of a step is that of all ranks' completions, and of all micro-batches'."""

from types import SimpleNamespace

import pytest
import torch
from ranks_in_threads import on_ranks

from trl_entropy.estimators.statistics.importance import effective_sample_size
from trl_entropy.probes.effective_sample_size import EffectiveSampleSizeProbe
from trl_entropy.rollouts.batch import RolloutBatch

ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 0.5, 0.0, 0.0, 2.0, -0.5])
SCALES = torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0])
LOG_RATIOS = torch.linspace(-0.5, 0.9, 24).view(8, 3)
MASK = (torch.arange(3) < torch.tensor([[3], [1], [2], [3], [1], [3], [2], [0]])).long()
ARGS = SimpleNamespace(max_completion_length=12, num_generations=4)


def rollouts_of(rows):
    """Of a step, only what the probe reads."""
    fields = dict.fromkeys(RolloutBatch.__dataclass_fields__, None)
    batch = object.__new__(RolloutBatch)
    for name, value in (fields | {"raw_advantages": ADVANTAGES[rows], "length_scale": SCALES[rows]}).items():
        object.__setattr__(batch, name, value)
    return batch


def measured(rows, accelerator, on_policy=False):
    probe, metrics = EffectiveSampleSizeProbe(), {}
    for part in rows.split(2):
        ratio = None if on_policy else LOG_RATIOS[part]
        probe.on_micro_batch(ARGS, None, None, metrics=metrics, log_ratio=ratio, mask=MASK[part])
    probe.on_rollouts(ARGS, None, None, metrics=metrics, rollouts=rollouts_of(rows), accelerator=accelerator)
    return metrics


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_numbers_are_those_of_loops_over_all_completions(num_ranks):
    shares = torch.arange(8).chunk(num_ranks)
    first, *others = on_ranks(num_ranks, lambda rank, accelerator: measured(shares[rank], accelerator))
    weights = torch.tensor([s / 48 if a else 0.0 for a, s in zip(ADVANTAGES, SCALES, strict=True)])
    ratios = torch.stack([(r * m).sum().exp() for r, m in zip(LOG_RATIOS, MASK, strict=True)])
    assert first["ess/loss_weights"] == pytest.approx(float(effective_sample_size(weights)), rel=1e-6)
    assert first["ess/importance_weights"] == pytest.approx(float(effective_sample_size(ratios)), rel=1e-5)
    assert first["ess/num_completions"] == 5 and all(other == first for other in others)


def test_on_policy_every_completion_counts_as_one():
    (found,) = on_ranks(1, lambda rank, accelerator: measured(torch.arange(8), accelerator, on_policy=True))
    assert found["ess/importance_weights"] == 8
