"""`watch_step` in a plain PyTorch loop, against a plain forward pass in float64."""

import copy
import re
from pathlib import Path

import pytest
import torch
from ranks_in_threads import on_ranks
from torch import nn

from trl_entropy import watch_step
from trl_entropy.estimators.entropy_change.step_change import point_terms, step_changes
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.probes.watch_step import check_equal_rows

PROMPT, LENGTH, TEMPERATURE = 3, 5, 0.8


@pytest.fixture(scope="module")
def rows():
    """8 completions of 4 prompts, of several lengths; and 4 others to learn from."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 300, (12, PROMPT + LENGTH), generator=generator)
    ids[:8, :PROMPT] = ids[:4, :PROMPT].repeat_interleave(2, dim=0)
    lengths = torch.randint(1, LENGTH + 1, (8,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    attention = torch.cat([torch.ones(8, PROMPT, dtype=torch.long), mask], dim=1)
    return ids[:8], attention, mask, torch.arange(4).repeat_interleave(2), ids[8:]


def scores_float64(model: nn.Module, ids, attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and log-probability of every completion token by one plain forward pass."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, PROMPT - 1 : -1]
    logps = (logits / TEMPERATURE).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1), logps.gather(-1, ids[:, PROMPT:, None]).squeeze(-1)


@torch.no_grad()
def oracle(before: nn.Module, after: nn.Module, rows) -> dict[str, float]:
    """The changes with derivatives by central differences along the step, all in float64."""
    ids, attention, mask, prompts, _ = rows
    before, after = (copy.deepcopy(model).double().eval() for model in (before, after))
    shift = [b.data - a.data for a, b in zip(before.parameters(), after.parameters(), strict=True)]

    def scores_at(share: float):
        moved = copy.deepcopy(before)
        for param, change in zip(moved.parameters(), shift, strict=True):
            param.data += share * change
        return scores_float64(moved, ids, attention)

    points, step = [], 0.05  # Qwen2 normalises in float32 even here, so that shorter steps drown
    drawn = scores_at(0.0)[1]
    for end in (0.0, 1.0):
        values, low, high = scores_at(end), scores_at(end - step), scores_at(end + step)
        slopes = [(one - other) / (2 * step) for one, other in zip(high, low, strict=True)]
        points.append(point_terms((values[0], slopes[0]), (values[1], slopes[1]), drawn, mask))
    return {name: change.estimate(prompts) for name, change in step_changes(*points).items()}


@pytest.fixture(scope="module")
def model():
    return build_model(build_tokenizer(), seed=0)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, ids) -> None:
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_numbers_are_those_of_float64(model, rows, optimizer_class):
    policy = copy.deepcopy(model)
    optimizer = optimizer_class(policy.parameters(), lr={torch.optim.SGD: 0.1}.get(optimizer_class, 1e-3))
    learn(policy, optimizer, rows[-1])
    before = copy.deepcopy(policy)
    with watch_step(policy, optimizer, *rows[:-1], temperature=TEMPERATURE) as watched:
        assert watched.measured is None
        optimizer.step()
    for name, expected in oracle(before, policy, rows).items():
        got = getattr(watched, name)
        assert got.value == pytest.approx(expected.value, rel=1e-3, abs=2e-6), name
        assert got.stderr == pytest.approx(expected.stderr, rel=1e-2), name
    assert abs(watched.measured.value) > 100 * 2e-6
    assert watched.trapezoid_error.value == pytest.approx(watched.trapezoid.value - watched.measured.value)
    assert 0 < watched.importance_ess <= len(rows[0])
    assert {"entropy/delta_measured", "entropy/delta_linear_stderr", "entropy/error_trapezoid"} <= set(
        watched.as_dict()
    )


def test_watching_changes_nothing(model, rows):
    trained = []
    for watches in (False, True):
        policy = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        for _ in range(2):
            learn(policy, optimizer, rows[-1])
            if watches:
                with watch_step(policy, optimizer, *rows[:-1], derivatives=False) as watched:
                    optimizer.step()
                assert watched.linear is None
            else:
                optimizer.step()
        trained.append(torch.cat([param.detach().flatten() for param in policy.parameters()]))
        assert policy.training
    assert torch.equal(*trained)


def test_the_loop_of_the_documents_runs_as_it_stands(model, rows, capsys):
    page = (Path(__file__).parents[2] / "docs" / "use" / "loop.md").read_text()
    (code,) = re.findall(r"```python\n(from trl_entropy import watch_step\n.*?)```", page, re.DOTALL)
    policy = copy.deepcopy(model)
    names = {"model": policy, "optimizer": torch.optim.AdamW(policy.parameters(), lr=1e-3)}
    learn(policy, names["optimizer"], rows[-1])
    exec(
        code, names | dict(zip(("input_ids", "attention_mask", "completion_mask", "prompt_index"), rows, strict=False))
    )
    assert len(capsys.readouterr().out.split()) == 3


def test_an_exception_inside_is_the_users(model, rows):
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(KeyError), watch_step(model, optimizer, *rows[:-1]) as watched:
        raise KeyError
    assert watched.measured is None


def test_unequal_rows_are_refused_on_all_processes():
    def said(rank, accelerator):
        with pytest.raises(ValueError, match=r"and they have 3, 4\. Give each 3") as caught:
            check_equal_rows(accelerator, 3 + rank)
        return str(caught.value)

    first, second = on_ranks(2, said)
    assert first == second
    assert on_ranks(2, lambda rank, accelerator: check_equal_rows(accelerator, 3)) == [None, None]
