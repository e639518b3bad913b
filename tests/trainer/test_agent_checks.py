"""Environments that make the prompts: what trains with them, and what takes prompts elsewhere and is refused."""

import copy

import pytest
from datasets import Dataset
from trl.chat_template_utils import qwen3_chat_template

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.probes import MutualInformationProbe
from trl_entropy.runs import checkpoints
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.trainer.agent_checks import check_agents


class Counting:
    """An environment of a user: each rollout gets the next task."""

    num_tasks = 0

    def reset(self, **kwargs) -> str:
        Counting.num_tasks += 1
        return f"Task {Counting.num_tasks}."

    def look(self) -> str:
        """
        Look around.

        Returns:
            What is seen.
        """
        return "nothing"


def args(**settings):
    defaults = {"output_dir": "unused", "num_generations": 4, "per_device_train_batch_size": 16, "bf16": False}
    return DrGRPOConfig(**(defaults | {"use_cpu": True} | settings))


HELD_OUT = {"entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 4}
DRAWING = [HELD_OUT, {"entropy_control": "report", "entropy_control_num_completions": 4}]
OWN = [
    {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    {"fisher_probe": True, "fisher_num_sequences": 12},
    {"entropy_control": "report", "entropy_control_completions": "rollouts"},
]
SELECTING = [{"curriculum": "pass_rate"}, {"resample_uninformative_groups": True}]


@pytest.mark.parametrize("settings", [*DRAWING, *SELECTING], ids=str)
def test_prompts_of_environments_are_not_taken_from_the_dataset(settings):
    """They were completed by whichever environment came next, of which nothing was said."""
    with pytest.raises(ValueError, match=r"takes prompts from the dataset, but with environment_factory .* reset\(\)"):
        check_agents(args(**settings), environment_factory={"a": Counting})
    check_agents(args(**settings), environment_factory=None)


@pytest.mark.parametrize("settings", OWN, ids=str)
def test_a_steps_own_completions_are_scored_with_environments(settings):
    check_agents(args(**settings), environment_factory={"a": Counting})


def test_turns_need_attribution_by_token(caplog):
    probe = {"entropy_probe": True, "per_device_train_batch_size": 32}
    for mode, said in (("sequence", True), ("token", False), ("none", False)):
        caplog.clear()
        check_agents(args(**probe, entropy_attribution=mode), environment_factory=None, has_episodes=True)
        assert ("not which turns: those need entropy_attribution='token'" in caplog.text) == said
    check_agents(args(**probe, entropy_attribution="sequence"), environment_factory=None)
    assert not caplog.text


@pytest.fixture
def build(model_path, tokenizer, tmp_path):
    def build(dataset, **settings):
        chatting = copy.deepcopy(tokenizer)
        chatting.chat_template = qwen3_chat_template
        short = {"max_completion_length": 4, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        quiet = {"gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none"}
        return DrGRPOTrainer(
            model=model_path,
            reward_funcs=lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids],
            args=args(**({"output_dir": str(tmp_path / "run")} | short | quiet | settings)),
            train_dataset=dataset,
            processing_class=chatting,
            environment_factory={"a": Counting},
        )

    return build


def test_a_dataset_of_environments_without_prompts_trains_and_saves(build):
    dataset = Dataset.from_dict({"environment": ["a"] * 8})
    trainer = build(dataset, effective_sample_size_probe=True)
    trainer.train()
    path = RunDirectory(trainer.args.output_dir).path
    assert checkpoints.newest_complete(path).name == "checkpoint-1"
    assert RunDirectory(path).metrics()[0]["ess/loss_weights"] is not None


def test_no_completion_is_scored_under_other_prompts_where_environments_answer():
    probe = args(mutual_information_probe=True, mutual_information_num_prompts=4, per_device_train_batch_size=32)
    with pytest.raises(ValueError, match="mutual_information_probe scores completions under other prompts"):
        check_agents(probe, environment_factory=Counting)
    with pytest.raises(ValueError, match="MutualInformationProbe scores completions under other prompts"):
        check_agents(args(), environment_factory=Counting, callbacks=[MutualInformationProbe()])
    check_agents(probe, environment_factory=None, has_episodes=True)


def test_refused_when_the_trainer_is_built(build):
    dataset = Dataset.from_dict({"environment": ["a"] * 8})
    with pytest.raises(ValueError, match="draws prompts from train_dataset, whose prompts come from an environment"):
        build(dataset, **HELD_OUT)
    with pytest.raises(ValueError, match="takes prompts from the dataset"):
        build(dataset.add_column("prompt", [[{"role": "user", "content": "Count."}]] * 8), **HELD_OUT)
