"""Experiments at a checkpoint of a run on a dataset of one's own, with a reward function of one's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trl_entropy.experiment import main
from trl_entropy.experiments import command
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.redraws import Cache
from trl_entropy.experiments.state import FixedState
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.tasks.named import files_of

REWARD = """def long(prompts, completions, least=10, **kwargs):
    return [float(len(text) > least) for text in completions]
"""
SETTINGS = {
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "num_generations": 4, "use_cpu": True,
    "max_completion_length": 12, "learning_rate": 1e-3, "max_grad_norm": 1.0, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random policy with the moments of AdamW after one step, as a checkpoint has them."""
    path, tokenizer = tmp_path_factory.mktemp("model"), build_tokenizer()
    model = build_model(tokenizer, seed=0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    return path


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    """Of a run that trained on a file with a function of another file."""
    rows = [{"question": f"Ann has {i} apples.", "level": i} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "mine.py"
    file.write_text(REWARD)
    own = {
        "task": "dataset", "dataset_name": str(tmp_path / "rows.jsonl"), "prompt_column": "question",
        "reward_funcs": [f"{file}:long"], "reward_kwargs": {"long": {"least": 20}},
        "function_files": files_of([f"{file}:long"]),
    }  # fmt: skip
    shutil.copytree(model, tmp_path / "run" / "checkpoint-1")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(SETTINGS | own))
    return tmp_path / "run" / "checkpoint-1"


def state_of(checkpoint: Path) -> FixedState:
    return FixedState(Checkpoint.read(checkpoint, may_import=True), checkpoint.parent / "state", seed=0)


def test_the_step_is_of_the_users_problems_and_rewards(checkpoint):
    state = state_of(checkpoint)
    tokenizer, batch = state.trainer.processing_class, state.rollouts
    texts = [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)
    ]
    assert batch.rewards.tolist() == [float(len(text) > 20) for text in texts]
    assert 0 < batch.rewards.mean() < 1
    prompts = tokenizer.batch_decode(batch.prompt_ids, skip_special_tokens=True)
    assert len({*prompts}) == 4 and all(text.startswith("Ann has ") for text in prompts)
    assert state.warning is None and 0 < len(state.on_held_out().problems) < state.num_problems


def test_an_experiment_imports_only_what_it_was_asked_to(checkpoint, capsys):
    def compute(state, cache, options):
        return {"num_problems": state.num_problems, "drawn": len(state.draw(np.arange(3), (0,)))}

    asks = command.Command("nothing", "", {}, compute, str, lambda result, left, right: None)
    with pytest.raises(
        SystemExit, match=r"mine\.py:long\. They must be imported.*add --import_functions if you trust"
    ):
        asks.main(["--checkpoint", str(checkpoint)])
    assert not (checkpoint.parent / "experiments").exists()
    asks.main(["--checkpoint", str(checkpoint), "--import_functions"])
    numbers = json.loads((checkpoint.parent / "experiments/nothing-1/nothing.json").read_text())
    assert numbers["task"]["task"] == "dataset" and numbers["num_problems"] > 30 and numbers["drawn"] == 3
    assert [Path(file).name for file in numbers["function_files"]] == ["mine.py"]
    assert "Warning" not in capsys.readouterr().out


def test_the_run_of_a_script_through_the_function_that_makes_its_trainer(checkpoint, tmp_path):
    script = tmp_path / "my_script.py"
    script.write_text(
        "from types import SimpleNamespace as Trainer\nfrom datasets import Dataset\n"
        "def none(prompts, completions, **kwargs):\n    return [0.0 for _ in completions]\n"
        "def make():\n    rows = Dataset.from_list([{'prompt': f'Dan has {i}.'} for i in range(6)])\n"
        "    return Trainer(args=Trainer(output_dir=''), model=None, train_dataset=rows, eval_dataset=rows,\n"
        "                   reward_funcs=[none], reward_func_names=['none'], environments=None, rollout_func=None)\n"
    )
    (checkpoint.parent / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    with pytest.raises(ValueError, match=r"Name the function that makes the trainer of a script, --trainer_factory"):
        Checkpoint.read(checkpoint)
    read = Checkpoint.read(checkpoint, trainer_factory=f"{script}:make")
    assert [Path(file).name for file in read.function_files] == ["my_script.py"]
    state = FixedState(read, tmp_path / "state", seed=0)
    assert state.num_problems == 6 and not state.rollouts.rewards.any()


def test_a_change_of_a_file_or_of_the_problems_is_said_and_computed_anew(checkpoint, tmp_path):
    (checkpoint / "checkpoint_complete.json").write_text('{"data": "of other problems"}')
    before = state_of(checkpoint)
    assert before.checkpoint.warning is None
    assert before.warning == f"the problems are not those that {checkpoint.parent} was trained on"
    cache = Cache.of(tmp_path, before, 0)
    before.data_fingerprints = ("others", "others")
    assert Cache.of(tmp_path, before, 0) != cache
    (tmp_path / "mine.py").write_text(REWARD + "\n")
    changed = Checkpoint.read(checkpoint, may_import=True)
    assert changed.warning == f"{tmp_path / 'mine.py'} is not what it was when the run began"
    assert changed.function_files != before.checkpoint.function_files


def test_what_cannot_be_done_is_one_line_before_a_model_is_loaded(checkpoint, tmp_path, monkeypatch):
    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["linearity", "--checkpoint", str(checkpoint), "--import_functions", *more])
        assert "\n" not in str(ended.value)
        return str(ended.value)

    monkeypatch.setattr("trl_entropy.experiments.state.DrGRPOTrainer", lambda **_: pytest.fail("loading"))
    with monkeypatch.context() as patch:
        patch.setattr(command, "free_memory", lambda: 2**24)
        assert "has 459,904 parameters, of which this experiment holds about 12 vectors in float32" in refused()
    (tmp_path / "mine.py").write_text("def long(prompts, completions, least, **kwargs):\n    return [1 / 0]\n")
    assert f"{tmp_path / 'mine.py'}, line 2: ZeroDivisionError" in refused()
    (tmp_path / "mine.py").write_text("def short(prompts, completions, **kwargs):\n    return [1]\n")
    assert "has no 'long'; it has short" in refused()
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in moments["param_groups"]:
        group["lr"] = 0.0
    torch.save(moments, checkpoint / "optimizer.pt")
    (tmp_path / "mine.py").write_text(REWARD)
    assert "the learning rate after" in refused() and "take an earlier checkpoint" in refused()
