"""What is typed, with a real vLLM: two runs that begin at the same moment, and the evaluation of one of them."""

import contextlib
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
from vllm_runs import NEEDS_VLLM, NO_PROBES, REPOSITORY, words_of

from trl_entropy.runs.directory import RunDirectory

pytestmark = NEEDS_VLLM
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(REPOSITORY / "launch" / "cpu.yaml")]


def start(*words: str) -> subprocess.Popen:
    """With none of the variables that an outer launcher, or a run in this process, has left."""
    outer = ("ACCELERATE_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "VLLM_DIST")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen, timeout: float = 600) -> str:
    """What it has printed; at the deadline, or if the test is stopped, all that it started ends with it."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """The folders of two runs that began at the same moment."""
    folder = tmp_path_factory.mktemp("beside")
    paths = [folder / name for name in ("one", "other")]
    shorter = NO_PROBES | {"max_steps": 2}
    started = [start(*LAUNCH, "-m", "trl_entropy.train", *words_of(path, **shorter)) for path in paths]
    for process in started:
        ended(process)
    return paths


def test_two_runs_beside_each_other_do_not_meet(beside):
    rows = [RunDirectory(path).metrics() for path in beside]
    assert [[row["step"] for row in of] for of in rows] == [[1, 2], [1, 2]]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]], "of one seed"


def test_a_checkpoint_is_evaluated_by_vllm(beside):
    """As by `generate`: greedy completions alike but for ties, and pass@1 within its error."""
    folder = beside[0] / "evaluation" / "step_000002"
    records = {}
    for sampler in ("vllm", "transformers"):
        asked = ["--run", str(beside[0]), "--checkpoints", "latest", "--device", "cpu", "--sampler", sampler]
        ended(start("-m", "trl_entropy", "evaluate", *asked, "--num-samples", "2"))
        assert f'"sampler": "{sampler}"' in (folder / "summary.json").read_text()
        records[sampler] = pd.read_parquet(folder / "records.parquet")
    greedy = [of[of.greedy].set_index("prompt_id").completion.sort_index() for of in records.values()]
    assert (greedy[0] == greedy[1]).mean() > 0.9
    sampled = [of[~of.greedy] for of in records.values()]
    rates = [of.correct.mean() for of in sampled]
    assert abs(rates[0] - rates[1]) < 4 * (2 * 0.25 / len(sampled[0])) ** 0.5
    assert len(sampled[0]) == len(sampled[1]) == 2 * len(greedy[0])
    assert sampled[0].groupby("prompt_id").completion.nunique().max() == 2, "each sample has a seed of its own"
