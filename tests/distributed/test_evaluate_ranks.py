"""Evaluation during training on two ranks: with `wait` all halt for it, in the background none does; both end."""

import json
from pathlib import Path

import pytest
from launching import launch

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("evaluate_worker.py")


@pytest.mark.parametrize("when", ["wait", "background"])
def test_both_ranks_halt_or_go_on(when, tmp_path, model_path):
    arguments = [str(tmp_path), model_path, when]
    result = launch("ddp-cpu", WORKER, *arguments, scratch=tmp_path / "ops", timeout=240)
    assert result.returncode == 0, result.stdout[-4000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    evaluated = ranks[0]["evaluated"]
    assert [rank["world_size"] for rank in ranks] == [2, 2] and not ranks[1]["evaluated"]
    assert [step for step, _, _ in evaluated] == [0, 1, 2]
    assert all(rank["end"] >= evaluated[-1][2] for rank in ranks)
    inside = [any(start < begun < end for _, start, end in evaluated) for rank in ranks for begun in rank["steps"]]
    assert len(inside) == 4 and any(inside) == (when == "background")
