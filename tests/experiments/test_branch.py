"""`trl-entropy experiment branch`: what a branch starts from, what it keeps on disk, a small run from end to end."""

import json
import math
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

from trl_entropy.config.command_line import parse
from trl_entropy.experiment import main
from trl_entropy.experiments import branch, branch_training
from trl_entropy.experiments.branch_training import Branch, Branches, Plan, division, moments_of
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.output import saved_figure
from trl_entropy.train import build_trainer
from trl_entropy.trainer.dr_grpo import DrGRPOTrainer

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = ("--prompts", "2", "4", "--steps", "2", "--num-seeds", "2", "--num-completions", "64", "--noise-steps", "3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, warm_start_dir) -> Path:
    """Two steps of a small quickstart from the warm start, with the optimizer's state."""
    run = tmp_path_factory.mktemp("run")
    arguments = [
        "--config", str(CONFIG), "--output_dir", str(run), "--num_prompts_per_step", "4", "--num_generations", "4",
        "--per_device_train_batch_size", "8", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2",
        "--entropy_probe", "False", "--kl_every", "0", "--num_train_problems", "32", "--num_eval_problems", "8",
        "--eval_strategy", "no", "--eval_on_start", "False", "--report_to", "none", "--disable_tqdm", "True",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments])
        patch.setenv("TRL_ENTROPY_CACHE", str(warm_start_dir.parent))
        build_trainer(*parse(arguments)).train()
    return run / "checkpoint-2"


def run(checkpoint, output, *options):
    main(["branch", "--checkpoint", str(checkpoint), "--output", str(output), *map(str, options)])
    return json.loads((output / "branch.json").read_text())


@pytest.mark.slow
def test_a_small_one_from_end_to_end(checkpoint, tmp_path, capsys, monkeypatch):
    result = run(checkpoint, tmp_path, *SMALL)
    output = capsys.readouterr().out
    assert "4 short trainings of 2 steps to make (0 on disk): 144 completions to train on, 384 to measure" in output
    assert "4/4: 4 prompts a step" in output and "| sqrt | 2 |" in output
    rows = {row["num_prompts"]: row for row in result["rows"]}
    assert rows[4]["learning_rate"] == pytest.approx(result["learning_rate"])
    assert rows[2]["learning_rate"] == pytest.approx(result["learning_rate"] / math.sqrt(2))
    for prompts, row in rows.items():
        gain, per_1000 = row["gain"]["value"], row["gain_per_1000_completions"]["value"]
        assert per_1000 == pytest.approx(1000 * gain / (4 * prompts)) and row["gain"]["stderr"] > 0
    assert set(result["noise_scale"]) == {"simple", "adam"} and (tmp_path / "branch.png").exists()
    # Each gain is the difference of the means on the same problems
    (folder,) = tmp_path.glob("branches-*")
    ends = [json.loads(path.read_text())["rewards"] for path in sorted(folder.glob("prompts2-*"))]
    starts = [json.loads(path.read_text())["rewards"] for path in sorted(folder.glob("start-*"))]
    found = [(sum(b) - sum(a)) / 64 / 2 for a, b in zip(starts, ends, strict=True)]
    assert rows[2]["gain"]["value"] == pytest.approx(sum(found) / 2)
    assert not list(tmp_path.glob("branch-*"))  # scratch folders

    trained = []
    real = DrGRPOTrainer.train
    monkeypatch.setattr(DrGRPOTrainer, "train", lambda self, *a: (trained.append(self.args), real(self, *a)))
    again = run(checkpoint, tmp_path, *SMALL)
    assert again["rows"] == result["rows"] and again["noise_scale"] == result["noise_scale"] and not trained
    more = run(checkpoint, tmp_path, *SMALL, "--learning_rate_rule", "constant", "sqrt")
    output = capsys.readouterr().out
    assert [(args.num_prompts_per_step, args.learning_rate) for args in trained] == [(2, result["learning_rate"])] * 2
    assert "(4 on disk)" in output and [fit["rule"] for fit in more["fits"]] == ["constant", "sqrt", "best"]
    assert [row for row in more["rows"] if row["rule"] == "sqrt"] == result["rows"]


RATES = {4: 1.5e-4, 16: 3e-4, 64: 6e-4}


def planted(rules=("sqrt",), num_seeds=3):
    """Branches that were trained already: a step gains 0.08 / (1 + 20/B) by sqrt, and 0.01 at a constant rate."""
    checkpoint = Mock(spec=Checkpoint, num_prompts_per_step=16, config={"num_generations": 8}, path=Path("run/c-1"))
    made = {}
    for seed in range(num_seeds):
        for prompts, rate in RATES.items():
            for rule, gain in (("sqrt", 0.08 / (1 + 20 / prompts)), ("constant", 0.01)):
                if rule in rules and not (rule == "constant" and prompts == 16):
                    share = round(1000 * (0.2 + 5 * gain * (0.9 + 0.1 * seed)))
                    rewards = [1.0] * share + [0.0] * (1000 - share) + [None]
                    made[Branch(prompts, rate if rule == "sqrt" else 3e-4, seed)] = {
                        "training": [0.5],
                        "rewards": rewards,
                    }
    plan = Plan(tuple(made), num_steps=5, num_completions=1001, noise_steps=0, seed=0)
    noise = {f"noise_scale/simple{end}": value for end, value in (("", 30.0), ("_lower", 10.0), ("_upper", math.inf))}
    found = Mock(spec=Branches, plan=plan, checkpoint=checkpoint, moments={"param_groups": [{"lr": 3e-4}]})
    found.rewards_at_start.return_value = [1.0] * 200 + [0.0] * 801
    found.trained.side_effect, found.noise.return_value, found.left.return_value = made.__getitem__, noise, []
    return found


def test_a_planted_critical_batch_is_in_table_and_figure(tmp_path):
    result = branch.compute(planted(), ["sqrt"])
    (fit,) = result["fits"]
    assert fit["critical_batch"]["value"] == pytest.approx(20, rel=0.02)
    low, high = fit["critical_batch"]["low"], fit["critical_batch"]["high"]
    assert low <= fit["critical_batch"]["value"] <= high and (low, high) == pytest.approx((20, 20), rel=0.05)
    assert fit["largest_gain"] == pytest.approx(0.08, rel=0.02)
    rows = {row["num_prompts"]: row for row in result["rows"]}
    assert rows[16]["gain"]["value"] == pytest.approx(0.08 / (1 + 20 / 16), rel=0.02)
    assert rows[64]["gain_per_1000_completions"]["value"] == pytest.approx(rows[64]["gain"]["value"] / 0.512)
    text = branch.table(result)
    found = f"critical batch by the rule sqrt: {fit['critical_batch']['value']:.3g} ["
    assert found in text and "noise scale (T14): 30 [10, inf] prompts" in text
    with saved_figure(tmp_path / "branch.png", (10, 4)) as figure:
        branch.draw(result, *figure.subplots(1, 2))
    assert (tmp_path / "branch.png").stat().st_size > 10_000


def test_several_rules_are_fitted_together_and_a_single_seed_has_no_interval():
    result = branch.compute(planted(("sqrt", "constant")), ["sqrt", "constant"])
    assert [fit["rule"] for fit in result["fits"]] == ["sqrt", "constant", "best"]
    assert [row["learning_rate"] for row in result["rows"][3:]] == [3e-4] * 3
    assert "critical batch at the best learning rate of each" in branch.table(result)
    alone = branch.table(branch.compute(planted(num_seeds=1), ["sqrt"]))
    assert "prompts fit best, without an interval: a single seed" in alone


@pytest.fixture(scope="module")
def branches(checkpoint, tmp_path_factory):
    plan = Plan((), num_steps=1, num_completions=64, noise_steps=0, seed=0)
    return Branches(Checkpoint.read(checkpoint), tmp_path_factory.mktemp("branches"), plan)


def test_a_branch_makes_the_step_of_the_checkpoints_moments(branches, checkpoint):
    """AdamW's update from the checkpoint's moments and the step's own gradient, by hand; also after another branch."""
    branches.trained(Branch(2, 0.0, 0))
    seen = {}

    class Look(branch_training.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen["gradient"] = {name: p.grad.clone() for name, p in model.named_parameters()}
            seen["before"] = {name: p.detach().clone() for name, p in model.named_parameters()}
            seen["rate"] = {group["lr"] for group in optimizer.param_groups}

    with branches._trainer(Branch(2, 1e-3, 5), 1) as (trainer, _):
        trainer.add_callback(Look())
        trainer.train()
        after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        step = {name: trainer.optimizer.state[p]["step"] for name, p in trainer.model.named_parameters()}
        args, names = trainer.args, list(after)
        decayed = {id(p) for p in trainer.optimizer.param_groups[0]["params"]}
        order = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        of_name = {id(p): name for name, p in trainer.model.named_parameters()}
    assert seen["rate"] == {1e-3} and set(map(float, step.values())) == {3.0} and args.per_device_train_batch_size == 8
    state, moved = moments_of(Checkpoint.read(checkpoint))["state"], 0.0
    for place, parameter in enumerate(order):
        name = of_name[id(parameter)]
        gradient, before = seen["gradient"][name].double(), seen["before"][name].double()
        first = 0.9 * state[place]["exp_avg"].double() + 0.1 * gradient
        second = args.adam_beta2 * state[place]["exp_avg_sq"].double() + (1 - args.adam_beta2) * gradient.square()
        scaled = first / (1 - 0.9**3) / ((second / (1 - args.adam_beta2**3)).sqrt() + args.adam_epsilon)
        expected = before * (1 - 1e-3 * args.weight_decay * (id(parameter) in decayed)) - 1e-3 * scaled
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=3e-7)
        moved = max(moved, float((after[name].double() - before).abs().max()))
    assert moved > 1e-4 and len(order) == len(names)


def test_the_start_is_the_checkpoint_on_the_same_problems_with_the_same_random_numbers(branches):
    """A branch of learning rate 0 gains nothing, with no scatter at all."""
    assert branches.trained(Branch(2, 0.0, 0))["rewards"] == branches.rewards_at_start(0)
    assert branches.rewards_at_start(1) != branches.rewards_at_start(0)


def test_a_branch_that_a_signal_stops_is_not_kept(branches, monkeypatch):
    """SIGTERM and one Ctrl-C end training after the step, as if it were over."""
    one, real = Branch(2, 1e-4, 7), DrGRPOTrainer.train

    def stopped(trainer):
        real(trainer)
        trainer.state.global_step -= 1

    monkeypatch.setattr(DrGRPOTrainer, "train", stopped)
    with pytest.raises(SystemExit, match="the same command goes on"):
        branches.trained(one)
    assert not branches._path(branches.name_of(one)).exists()


def test_micro_batches_hold_whole_groups_and_are_not_larger_than_the_runs(checkpoint):
    read = Checkpoint.read(checkpoint)  # 8 completions a micro-batch, 4 a group
    sizes = {number: division(read, number)["per_device_train_batch_size"] for number in (1, 2, 3, 4, 6)}
    assert sizes == {1: 4, 2: 8, 3: 4, 4: 8, 6: 8}


@pytest.mark.parametrize("options, message", [
    (("--prompts", "8"), r"--prompts is 8; a critical batch needs two different numbers"),
    (("--prompts", "0", "8"), r"of 1 or more"),
    (("--prompts", "4", "64"), r"--prompts asks for 64 prompts a step, and the run has 32 problems; lower it"),
    (("--steps", "0"), r"--steps is 0; use 1 or more"),
    (("--num-completions", "10"), r"--num-completions is 10; use 64 or more"),
])  # fmt: skip
def test_options_are_checked_before_anything_is_loaded(checkpoint, options, message, monkeypatch):
    monkeypatch.setattr("trl_entropy.experiments.branch.Branches", lambda *a: pytest.fail("loading"))
    with pytest.raises(SystemExit, match=message):
        main(["branch", "--checkpoint", str(checkpoint), *options])


@pytest.mark.parametrize("changed, message", [
    ({"curriculum": "pass_rate"}, "trained with curriculum='pass_rate', which a branch would not"),
    ({"token_control": "clip_cov"}, "trained with token_control='clip_cov'"),
    ({"num_iterations": 2}, "made several steps of each generation"),
])  # fmt: skip
def test_runs_that_a_branch_would_not_repeat_are_refused(checkpoint, changed, message, tmp_path):
    config = yaml.safe_load((checkpoint.parent / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | changed))
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    with pytest.raises(SystemExit, match=message):
        main(["branch", "--checkpoint", str(tmp_path / checkpoint.name), "--prompts", "2", "4"])
