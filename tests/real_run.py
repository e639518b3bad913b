"""A fixture: three real steps of the quickstart, all probed, with notebook 05's probe; its checkpoint evaluated."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

REPOSITORY = Path(__file__).parents[1]
SETTINGS = {
    "max_steps": 3, "num_prompts_per_step": 4, "per_device_train_batch_size": 16, "num_generations": 4,
    "num_train_problems": 64, "num_eval_problems": 8, "per_device_eval_batch_size": 8, "num_generations_eval": 1,
    "entropy_probe_every": 1, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 8,
    "report_to": "none", "save_strategy": "steps", "likelihood_probe_every": 1,
    "mutual_information_probe": True, "mutual_information_probe_every": 3, "mutual_information_num_prompts": 4,
    "noise_scale_probe": True, "fisher_probe": True, "fisher_num_sequences": 12, "entropy_attribution": "token",
    "entropy_control": "report", "entropy_control_target": 0.3, "entropy_control_num_completions": 8,
    "save_steps": 3, "save_only_model": True, "disable_tqdm": True,
}  # fmt: skip


def probe_of_notebook():
    """The class that notebook 05 shows."""
    cells = json.loads((REPOSITORY / "notebooks" / "05_comparing_runs.ipynb").read_text())["cells"]
    text = next("".join(cell["source"]) for cell in cells if "class LengthSpread" in "".join(cell["source"]))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].split("\n\nDrGRPOTrainer(...")[0]
    scope = {}
    exec(code, scope)
    return scope["LengthSpread"]


class KillAfter(TrainerCallback):
    """Keeps what `kill -9` inside the step after `step` would have left, half a line of it included."""

    def __init__(self, step, path, copy):
        self.step, self.path, self.copy = step, path, copy

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            shutil.copytree(self.path, self.copy)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == self.step + 1 and "loss" in logs:
            line = (self.path / "metrics.jsonl").read_text().splitlines()[-1]
            with open(self.copy / "metrics.jsonl", "a") as file:
                file.write(line[: len(line) // 2])


def train_and_evaluate(path: Path, callbacks=(), **settings) -> None:
    """Leaves a run of three steps in `path`, and the evaluation of its start policy and its checkpoint."""
    from trl_entropy.config.command_line import parse
    from trl_entropy.evaluation.plan import PROFILES, Job, read_config, settings_of, targets_of
    from trl_entropy.evaluation.worker import evaluate
    from trl_entropy.runs.directory import RunDirectory
    from trl_entropy.train import build_trainer

    given = [word for name, value in (SETTINGS | settings).items() for word in (f"--{name}", str(value))]
    task, args, model = parse(["--config", f"{REPOSITORY}/configs/quickstart.yaml", "--output_dir", str(path), *given])
    trainer = build_trainer(task, args, model)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    config = read_config(path)
    chosen = settings_of(config, PROFILES["quick"], subset_frac=0.004, num_samples=2)
    for target in targets_of(path, config, "all"):
        evaluate(Job(target, chosen, str(RunDirectory(path).checkpoint_folder(target.step)), 32, "cpu"))
    RunDirectory(path).write_checkpoint_tables()


@pytest.fixture(scope="session")
def real_run(tmp_path_factory, warm_start_dir) -> Path:
    path = tmp_path_factory.mktemp("real") / "three-steps"
    kill = KillAfter(2, path, path.parent / "killed" / path.name)
    train_and_evaluate(path, callbacks=[probe_of_notebook()(every=1), kill])
    return path
