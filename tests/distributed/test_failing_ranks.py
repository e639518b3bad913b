"""An exception on one rank ends all ranks soon, each saying the same: in every event, under every engine."""

import json
import re
from pathlib import Path

import pytest
from failing_worker import LIVES_ON, SECONDS_TO_LIVE_ON
from launching import free_port, launch
from probe_worker import FAILING_EVENTS

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("failing_worker.py")
SETTINGS = {"max_steps": 2, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 8}


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize("engine", ["ddp-cpu", "zero1-cpu", "zero2-cpu", "zero3-cpu"])
def test_one_rank_fails_in_any_event_and_all_end(tmp_path, model_path, engine):
    events = (*FAILING_EVENTS, LIVES_ON) if engine == "ddp-cpu" else FAILING_EVENTS
    settings = SETTINGS | {"model_path": model_path}
    arguments = json.dumps({"ports": {event: free_port() for event in events}, "settings": settings})
    result = launch(engine, WORKER, str(tmp_path), arguments, scratch=tmp_path / "ops", timeout=250)
    assert result.returncode == 0, result.stdout[-6000:]
    for event in events:
        failed = float((tmp_path / f"{event}.failed.txt").read_text())
        ended = [json.loads((tmp_path / f"{event}.rank{rank}.json").read_text()) for rank in range(2)]
        assert [e["status"] for e in ended] == [1, 1], event
        other, own = (last_line((tmp_path / f"{event}.rank{rank}.txt").read_text()) for rank in range(2))
        if event == "rank_symmetric":
            assert other == own == "RuntimeError: rank 1 failed while testing: ValueError: injected on rank 1"
        elif event == "reward":  # a user's function is named, with the completion
            said = (
                r"ValueError: reward function failing_reward, .*: ValueError: injected on rank 1, for the completion"
            )
            assert re.match(said, own) and re.search(f"OtherRankFailed: rank 1 failed: {said}", other)
        else:
            assert own == "ValueError: injected on rank 1", event
            assert other.endswith("OtherRankFailed: rank 1 failed: ValueError: injected on rank 1"), event
        seconds = [e["time"] - failed for e in ended]
        print(f"{engine}, {event}: {seconds[0]:.1f} s, {seconds[1]:.1f} s")
        if event == LIVES_ON:  # the other rank's connections stay open, as NCCL's would
            assert seconds[0] < SECONDS_TO_LIVE_ON <= seconds[1]
        else:
            assert max(seconds) < 10, event
