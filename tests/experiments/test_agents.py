"""Experiments at a checkpoint of an agent: completions are drawn again with the run's tools and environments."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trl_entropy.estimators.entropy_change.delta_entropy import delta_linear
from trl_entropy.estimators.entropy_change.step_change import point_terms
from trl_entropy.experiment import main
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.redraws import redrawn_rows
from trl_entropy.experiments.state import FixedState
from trl_entropy.models.loading import EMBEDDED_AGENT
from trl_entropy.models.warm_start import warm_start
from trl_entropy.rollouts.completions import Completions

SETTINGS = {
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "num_generations": 4, "use_cpu": True,
    "max_completion_length": 48, "max_tool_calling_iterations": 1, "learning_rate": 1e-3, "max_grad_norm": 1.0,
    "seed": 0, "model_name_or_path": EMBEDDED_AGENT, "reward_funcs": ["tag_pref"],
}  # fmt: skip
MINE = """
from trl_entropy.tasks.calculator import CalculatorEnvironment, calculate, load_calculator_problems
from types import SimpleNamespace as Trainer

def rows(split):
    return load_calculator_problems(split, 40)

def of_script(**agents):
    from trl_entropy.tasks.rewards import tag_pref
    return Trainer(args=Trainer(output_dir=''), model=None, train_dataset=rows('train'), eval_dataset=rows('test'),
                   reward_funcs=[tag_pref], reward_func_names=['tag_pref'], **agents)

def make():
    return of_script(_standalone_tools=[calculate], environment_factories=None, rollout_func=None)

def rolling():
    return of_script(_standalone_tools=[], environment_factories=None, rollout_func=print)
"""
OWN = {"task": "dataset", "dataset_name": "mine.py:rows"}
KINDS = {
    "the embedded agent": {"task": "calculator", "num_train_problems": 40},
    "tools": OWN | {"tools": ["mine.py:calculate"]},
    "environment": OWN | {"environment_factory": "mine.py:CalculatorEnvironment"},
    "script": {},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The agent after its warm start, with moments of AdamW."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("agent") / "checkpoint-1"
    shutil.copytree(warm_start(name=EMBEDDED_AGENT), path)
    model = AutoModelForCausalLM.from_pretrained(path)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    return path


@pytest.fixture
def checkpoint(model, tmp_path, monkeypatch):
    """Makes the checkpoint of a run of a kind."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)

    def make(kind: str) -> Path:
        shutil.copytree(model, tmp_path / "run" / "checkpoint-1")
        Path("run/config.yaml").write_text(yaml.safe_dump(SETTINGS | KINDS[kind]))
        return tmp_path / "run" / "checkpoint-1"

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_and_the_redraws_are_of_episodes(checkpoint, kind, tmp_path):
    read = Checkpoint.read(checkpoint(kind), True, "mine.py:make" if kind == "script" else None)
    state = FixedState(read, tmp_path / "state", seed=0)
    tokenizer = state.trainer.processing_class
    redrawn = state.draw(np.arange(8), (1,))
    assert torch.equal(redrawn.input_ids, state.draw(np.arange(8), (1,)).input_ids)
    for completions in (Completions.of(state.rollouts), redrawn):
        written = completions.completion_mask.bool() & ~completions.loss_mask.bool()
        ids = completions.input_ids[:, -written.shape[1] :]
        texts = [tokenizer.decode(row[mask]) for row, mask in zip(ids, written, strict=True) if mask.any()]
        assert len(texts) > len(ids) / 3, "more than a third calls"
        assert all(text.startswith("<tool_response>") and text.endswith("\nResponse:") for text in texts)
    # The equations' own gradients, of loss and entropy, against TRL's backward pass and forward mode along the step.
    x, y, _ = redrawn_rows(state, state.rollouts, torch.arange(len(state.rollouts.rewards)))
    direction = torch.cat([value.flatten() for value in state.update.values()]).double()
    gradient = torch.cat([dict(state.model.named_parameters())[name].grad.flatten() for name in state.update])
    assert float(y.double().mean(0) @ direction) == pytest.approx(float(gradient.double() @ direction), rel=1e-4)
    completions = Completions.of(state.rollouts)
    scores = state.score(completions, 64, direction=state.update, order=1)
    terms = point_terms(scores.entropy, scores.logps, scores.logps[0], completions.loss_mask)
    assert float(x.double().mean(0) @ direction) == pytest.approx(
        float(delta_linear(terms.terms, terms.tangents).value), rel=1e-4
    )


def test_what_cannot_be_drawn_again_is_refused_in_one_line(checkpoint, monkeypatch):
    path = checkpoint("script")
    monkeypatch.setattr("trl_entropy.experiments.command.FixedState", lambda *a: pytest.fail("loading"))
    with pytest.raises(
        SystemExit, match=r"mine\.py:rolling has a rollout_func, which draws with a trainer of its own"
    ):
        main(["linearity", "--checkpoint", str(path), "--trainer_factory", "mine.py:rolling"])
    made_in_memory = Checkpoint.read(path, trainer_factory="mine.py:make")
    with pytest.raises(ValueError, match=r"the policy that .* began with was made in memory"):
        made_in_memory.at_start()
