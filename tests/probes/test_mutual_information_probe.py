"""The probe's numbers: those of scoring each completion under each prompt, one at a time, on one rank as on two."""

import contextlib
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from ranks_in_threads import on_ranks

from trl_entropy import DrGRPOConfig
from trl_entropy.engine import Engine
from trl_entropy.estimators.statistics.mutual_information import mutual_information
from trl_entropy.gradients.scores import score
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.probes import MutualInformationProbe
from trl_entropy.probes import mutual_information as probe_module
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions

PROMPTS = [(5, 6, 7), (8, 9), (3, 4, 5, 6), (10,)]
LOCK = threading.Lock()
LENGTHS, GENERATIONS = (3, 1, 2, 4, 2, 3, 1, 4), 2


@pytest.fixture(scope="module")
def model():
    return build_model(build_tokenizer(), seed=0).eval()


def batch(groups, sampled):
    """The rollouts of a rank that has these groups, padded to its own longest prompt."""
    rows = [group * GENERATIONS + place for group in groups for place in range(GENERATIONS)]
    width = max(len(PROMPTS[group]) for group in groups)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 30, (8, 4), generator=generator)
    mask = (torch.arange(4) < torch.tensor(LENGTHS)[:, None]).long()
    padded = [[0] * (width - len(PROMPTS[row // 2])) + list(PROMPTS[row // 2]) for row in rows]
    index = torch.tensor([row // 2 for row in rows])
    nothing, logps = torch.zeros(len(rows)), -2 - torch.rand(8, 4, generator=generator)
    return RolloutBatch(
        prompt_ids=torch.tensor(padded), prompt_mask=(torch.tensor(padded) > 0).long(),
        completion_ids=tokens[rows] * mask[rows], completion_mask=mask[rows], loss_mask=mask[rows],
        prompt_index=100 + index, rewards=nothing, raw_advantages=nothing, length_scale=nothing, advantages=nothing,
        first_position=torch.zeros_like(index), sampling_logps=logps[rows] if sampled else None,
    )  # fmt: skip


@contextlib.contextmanager
def one_at_a_time_in(model):
    """The ranks share a model here, whose parameters scoring exchanges for others meanwhile."""
    with LOCK:
        yield model


def measured(model, num_ranks, sampled):
    shares = torch.arange(4).view(num_ranks, -1).tolist()
    args = SimpleNamespace(world_size=num_ranks, num_generations=GENERATIONS, temperature=0.7)
    update = SimpleNamespace(params_before={name: p.detach() for name, p in model.named_parameters()})

    def work(rank, accelerator):
        metrics: dict[str, float] = {}
        probe = MutualInformationProbe(1, 4)
        engine, rollouts = Mock(spec=Engine, accelerator=accelerator), batch(shares[rank], sampled)
        engine.scoring_model.side_effect = lambda params, **kwargs: one_at_a_time_in(model)

        files, record = Mock(spec=ProbeFiles), Mock(spec=StepRecord, step=3, rollouts=rollouts)
        probe.on_before_update(
            args, None, None,
            metrics=metrics, update=update, engine=engine, rollouts=rollouts, record=record, files=files,
        )  # fmt: skip
        (name, step, table), _ = files.write_gathered.call_args
        assert (name, step) == ("mutual_information", 3) and files.write_rollouts.call_args[0] == (3, rollouts)
        again = mutual_information(table["logps"], table["own"], table.get("log_weights"))
        assert again.lower.value == metrics["mutual_information/lower"] and ("log_weights" in table) == sampled
        assert (table["prompt_index"] - 100).tolist() == table["own"].tolist() and table["logps"].shape == (8, 4)
        return metrics

    return on_ranks(num_ranks, work)


def one_at_a_time(model, sampled):
    whole = Completions.of(batch(range(4), sampled))
    logps, log_weights = torch.zeros(8, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for i in range(8):
        answer = whole.input_ids[i, 4 : 4 + LENGTHS[i]]
        for j, prompt in enumerate(PROMPTS):
            ids = torch.cat([torch.tensor(prompt), answer])[None]
            ones = torch.ones_like(answer)[None]
            alone = Completions(ids, torch.ones_like(ids), ones, torch.zeros(1, dtype=torch.long), loss_mask=ones)
            logps[i, j] = score(model, alone, 0.7, 1).logps[0].double().sum()
        if sampled:
            log_weights[i] = logps[i, i // 2] - whole.sampling_logps[i, : LENGTHS[i]].double().sum()
    return mutual_information(logps, torch.arange(8) // 2, log_weights if sampled else None)


@pytest.mark.parametrize("sampled", [False, True], ids=["by the policy", "by another sampler"])
def test_numbers_are_those_of_one_completion_and_prompt_at_a_time_on_any_ranks(model, sampled, monkeypatch):
    # Threads have no process group; that a failing rank ends all is tested with rank_symmetric itself
    monkeypatch.setattr(probe_module, "rank_symmetric", lambda accelerator, what: contextlib.nullcontext())
    expected = one_at_a_time(model, sampled)
    for num_ranks in (1, 2):
        first, *others = measured(model, num_ranks, sampled)
        assert all(other == first for other in others)
        for name, estimate in expected._asdict().items():
            assert first[f"mutual_information/{name}"] == pytest.approx(estimate.value, rel=1e-4, abs=1e-6)
            assert first[f"mutual_information/{name}_stderr"] == pytest.approx(estimate.stderr, rel=1e-3, abs=1e-6)
        assert (first["mutual_information/num_prompts"], first["mutual_information/num_completions"]) == (4, 8)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mutual_information_num_prompts": 5}, "Try mutual_information_num_prompts=4"),
        ({"mutual_information_num_prompts": 2}, "Try mutual_information_num_prompts=3"),
        (
            {"resample_uninformative_groups": True},
            "not chosen by their rewards. Set resample_uninformative_groups=False",
        ),
        ({"top_k": 5}, "top_k=5"),
        ({"mutual_information_num_prompts": 4}, None),
    ],
)
def test_settings_that_the_bounds_exclude_are_refused(tmp_path, settings, told):
    given = {"num_generations": 4, "per_device_train_batch_size": 16, "use_cpu": True, "bf16": False}
    given |= {"mutual_information_probe": True, "mutual_information_num_prompts": 4} | settings
    if told is None:
        assert DrGRPOConfig(str(tmp_path), **given).mutual_information_num_prompts == 4
        return
    with pytest.raises(ValueError, match=told):
        DrGRPOConfig(str(tmp_path), **given)
