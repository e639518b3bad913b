"""An agent whose turns vLLM draws: what tools write is context, and the probes weigh the policy's tokens alone."""

import pytest
from vllm_runs import NEEDS_VLLM, drawn_by_the_policy, mean_difference, policy, probe_file, scores, train

from trl_entropy import evaluate
from trl_entropy.models.loading import EMBEDDED_AGENT
from trl_entropy.models.warm_start import warm_start
from trl_entropy.runs.directory import RunDirectory

pytestmark = NEEDS_VLLM
AGENT = {
    "task": "calculator",
    "model_name_or_path": EMBEDDED_AGENT,
    "vllm_max_model_length": 192,
    "max_completion_length": 48,
    "max_tool_calling_iterations": 1,
    "max_steps": 3,
    "learning_rate": 3e-4,
}


@pytest.fixture(scope="module")
def agent() -> str:
    return str(warm_start(name=EMBEDDED_AGENT))


@pytest.mark.parametrize(
    "probe",
    [
        {"entropy_attribution": "token"},
        {
            "entropy_probe_completions": "held_out",
            "entropy_probe_sampler": "vllm",
            "entropy_probe_num_completions": 16,
        },
    ],
    ids=["next rollouts", "held out"],
)
def test_turns_by_vllm_are_measured(agent, tmp_path, probe):
    train(tmp_path / "run", **AGENT, **probe)
    run = RunDirectory(tmp_path / "run")
    for row in run.metrics():
        assert row["tools/call_frequency"] > 0 and row["entropy/turn_2"] > 0
        assert row["entropy/delta_measured_stderr"] > 0
        assert row["sampling/sampling_logp_difference/mean"] < 0.02
    rows, metadata = probe_file(run, 2)
    drawn_at = 2 if metadata["drawn"] == "after the step" else 1
    written = rows["completion_mask"].double() - drawn_by_the_policy(rows)
    assert metadata["sampler"] == "vllm" and written.sum() > 0
    of_policy = scores(policy(run, drawn_at, agent), rows)[1]
    assert 0 < mean_difference(of_policy, rows, rows["sampling_logps"]) < 0.02


def test_an_evaluation_of_episodes_by_vllm_is_refused(agent, tmp_path):
    """TRL's trainer draws an evaluation's episodes, with `generate`."""
    train(tmp_path / "run", **(AGENT | {"max_steps": 1, "entropy_probe": False}))
    with pytest.raises(SystemExit, match="the run has tools or environments; TRL's trainer draws its episodes"):
        evaluate.main(["--run", str(tmp_path / "run"), "--sampler", "vllm", "--device", "cpu"])
