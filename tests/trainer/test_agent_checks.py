"""Tools and environments: what trains with them, and what a probe would measure wrongly and is refused."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from trl.chat_template_utils import qwen3_chat_template

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.control import EntropyControl
from trl_entropy.probes import FisherProbe, RolloutEntropyProbe
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
ENVIRONMENTS = {"tools": None, "environment_factory": {"a": Counting}}
TOOLS = {"tools": [Counting().look], "environment_factory": None}


@pytest.mark.parametrize("settings", OWN, ids=str)
@pytest.mark.parametrize("agents", [ENVIRONMENTS, TOOLS], ids=["environments", "tools"])
def test_results_of_tools_are_not_scored_as_the_policys(settings, agents):
    with pytest.raises(ValueError, match="scores every token of the step's completions, but with") as error:
        check_agents(args(**settings), **agents)
    assert "\n" not in str(error.value)
    check_agents(args(**settings), tools=None, environment_factory=None)


@pytest.mark.parametrize("probe", [RolloutEntropyProbe(), FisherProbe(), EntropyControl(source="rollouts")])
def test_neither_in_callbacks(probe):
    with pytest.raises(ValueError, match=f"{type(probe).__name__} scores every token"):
        check_agents(args(), **TOOLS, callbacks=[probe])


SELECTING = [{"curriculum": "pass_rate"}, {"resample_uninformative_groups": True}]


@pytest.mark.parametrize("settings", [*DRAWING, *SELECTING], ids=str)
def test_prompts_of_environments_are_not_taken_from_the_dataset(settings):
    """They were completed by whichever environment came next, of which nothing was said."""
    with pytest.raises(ValueError, match=r"takes prompts from the dataset, but with environment_factory .* reset\(\)"):
        check_agents(args(**settings), **ENVIRONMENTS)


def test_a_draw_with_tools_is_of_first_turns(caplog):
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        check_agents(args(**HELD_OUT), **TOOLS)
    assert "draws first turns alone" in caplog.text


def test_a_draw_is_not_by_a_rollout_function(caplog):
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        check_agents(args(**HELD_OUT), tools=None, environment_factory=None, rollout_func=print)
        assert "not by rollout_func" in caplog.text
        caplog.clear()
        check_agents(args(), tools=None, environment_factory=None, rollout_func=print)
    assert not caplog.text


@pytest.mark.parametrize("settings", OWN, ids=str)
def test_tokens_that_a_rollout_function_masks_are_met_at_the_first_step(make_trainer, settings):
    """Nothing tells of them before."""
    trainer = make_trainer(**settings)
    generate = trainer._generate_and_score_completions

    def masking(inputs):
        batch = generate(inputs)
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][:, 1] = 0
        return batch

    trainer._generate_and_score_completions = masking
    with pytest.raises(ValueError, match="some are masked as results of tools"):
        trainer.train()


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


def test_refused_when_the_trainer_is_built(build):
    dataset = Dataset.from_dict({"environment": ["a"] * 8})
    with pytest.raises(ValueError, match="draws prompts from train_dataset, whose prompts come from an environment"):
        build(dataset, **HELD_OUT)
    with pytest.raises(ValueError, match="takes prompts from the dataset"):
        build(dataset.add_column("prompt", [[{"role": "user", "content": "Count."}]] * 8), **HELD_OUT)
