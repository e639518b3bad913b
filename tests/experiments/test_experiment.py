"""`trl-entropy experiment calibration`: its errors, the step it makes, its gradients, a small run from end to end."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from trl_entropy.config.command_line import parse
from trl_entropy.engine.optimizer_step import metric_of_step, predicted_update
from trl_entropy.estimators.control.token_control import token_covariances
from trl_entropy.estimators.entropy_change.delta_entropy import delta_linear
from trl_entropy.estimators.entropy_change.step_change import point_terms
from trl_entropy.experiment import main
from trl_entropy.experiments.calibration import LABELS
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.exchange_changes import LargeSet, true_changes
from trl_entropy.experiments.exchange_steps import (
    MEASURED,
    METHODS,
    TARGET_CHANGES,
    chosen_tokens,
    entropy_losses,
    loss_gradients,
    ranked_tokens,
    steps_of_methods,
)
from trl_entropy.experiments.redraws import pool_completions, redrawn_rows
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_products import entropy_gradient
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.train import build_trainer

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = [
    "--num-redraws",
    "40",
    "--num-prompts",
    "8",
    "--num-u-redraws",
    "6",
    "--u-prompts",
    "4",
    "--u-generations",
    "4",
]
SETTINGS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, warm_start_dir) -> Path:
    """Two steps of a small quickstart from the warm start, with the optimizer's state."""
    run = tmp_path_factory.mktemp("run")
    arguments = [
        "--config", str(CONFIG), "--output_dir", str(run), "--num_prompts_per_step", "8", "--num_generations", "4",
        "--per_device_train_batch_size", "32", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2",
        "--entropy_probe", "False", "--kl_every", "0", "--num_train_problems", "64", "--num_eval_problems", "8",
        "--eval_strategy", "no", "--eval_on_start", "False", "--report_to", "none", "--disable_tqdm", "True",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments])  # the run directory records it
        patch.setenv("TRL_ENTROPY_CACHE", str(warm_start_dir.parent))
        build_trainer(*parse(arguments)).train()
    return run / "checkpoint-2"


@pytest.fixture(scope="module")
def state(checkpoint, tmp_path_factory) -> FixedState:
    return FixedState(Checkpoint.read(checkpoint), tmp_path_factory.mktemp("state"), seed=0)


def test_the_settings_are_the_runs(checkpoint):
    read = Checkpoint.read(checkpoint)
    assert (read.task.task, read.task.num_train_problems, read.num_prompts_per_step) == ("word_problems", 64, 8)
    assert read.config["max_completion_length"] == 32 and read.step == "2"


def test_the_step_is_the_one_the_optimizer_makes(state):
    parameters = dict(state.model.named_parameters())
    saved = {name: (parameter.detach().clone(), parameter.grad.clone()) for name, parameter in parameters.items()}
    moments = copy.deepcopy(state.engine.optimizer.state_dict())
    torch.nn.utils.clip_grad_norm_(parameters.values(), state.args.max_grad_norm)
    state.engine.optimizer.step()
    try:
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), state.after[name], rtol=0, atol=2e-7)
        assert max(float(value.abs().max()) for value in state.update.values()) > 1e-5
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(saved[name][0])
            parameter.grad = saved[name][1]
        state.engine.optimizer.load_state_dict(moments)


def test_group_gradients_add_up_to_the_gradients_of_entropy_and_loss(state):
    """X against forward mode along the update, Y against differences of the loss's own terms along it."""
    rollouts = RolloutBatch.from_micro_batches([state.draw_rollouts(state.draw_problems(6, (7,)), 4, (7,))])
    x, y, _ = redrawn_rows(state, rollouts, torch.arange(24))
    completions = Completions.of(rollouts)
    direction = torch.cat([value.flatten() for value in state.update.values()]).double()
    with state.engine.scoring_model(state.before) as model:
        scores = score(model, completions, 1.0, 64, state.before, state.update, order=1)
    terms = point_terms(scores.entropy, scores.logps, scores.logps[0], completions.completion_mask)
    predicted = float(delta_linear(terms.terms, terms.tangents).value)
    assert float(x.double().mean(0) @ direction) == pytest.approx(predicted, rel=1e-4)
    weights = (rollouts.advantages / 32).double().unsqueeze(1)
    slope = -float((weights * scores.logps[1].double()).sum()) / 24
    assert float(y.double().mean(0) @ direction) == pytest.approx(slope, rel=1e-4)
    assert rollouts.advantages.view(6, 4).sum(1).abs().max() < 1e-6 < rollouts.advantages.abs().max()


@pytest.mark.slow
def test_calibration_from_end_to_end(checkpoint, tmp_path, capsys, monkeypatch):
    arguments = ["calibration", "--checkpoint", str(checkpoint), *SMALL, "--output", str(tmp_path)]
    main(arguments)
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "calibration.json").read_text())
    assert set(result["quantities"]) <= set(LABELS) and {"measured", "linear"} <= set(result["quantities"])
    for name, row in result["quantities"].items():
        assert LABELS[name] in output
        assert 0 <= row["covered_low"] <= row["covered"] <= row["covered_high"] <= 1
        assert row["stderr_ratio"] > 0 and row["scatter"] > 0
    rows = result["quantities"]
    assert rows["measured"]["num_redraws"] == 40 and rows["u_statistic_jackknife"]["num_redraws"] == 6
    assert rows["error_linear"]["scatter"] < rows["linear"]["scatter"] / 2  # the pairs cancel
    assert rows["error_trapezoid"]["scatter"] < rows["error_linear"]["scatter"]
    assert rows["error_linear"]["truth"] == pytest.approx(rows["linear"]["truth"] - rows["measured"]["truth"])
    assert result["environment"]["packages"]["torch"] and result["settings"]["seed"] == 0
    assert (tmp_path / "calibration.png").stat().st_size > 10_000

    monkeypatch.setattr(
        "trl_entropy.experiments.redraws.pool_completions", lambda *a: pytest.fail("the chunks are kept")
    )
    monkeypatch.setattr("trl_entropy.experiments.redraws.redrawn_rows", lambda *a: pytest.fail("they are kept"))
    main(arguments)
    assert json.loads((tmp_path / "calibration.json").read_text())["quantities"] == rows


def run_small(name, checkpoint, tmp_path, *options) -> dict:
    """One of the experiments at a checkpoint, from end to end."""
    arguments = [name, "--checkpoint", str(checkpoint), "--output", str(tmp_path), *map(str, options)]
    main(arguments)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    return json.loads((tmp_path / f"{name}.json").read_text())


@pytest.mark.slow
def test_linearity_from_end_to_end(checkpoint, tmp_path, capsys, monkeypatch):
    result = run_small("linearity", checkpoint, tmp_path, "--num-completions", 64)
    assert "eta*" in capsys.readouterr().out
    rows = {row["factor"]: row for row in result["rows"]}
    shortest = rows[1 / 16]
    assert shortest["linear"]["value"] == pytest.approx(shortest["measured"]["value"], rel=0.1)
    # What first order leaves over is of second order in the length, and second order's rest is smaller.
    ratio = rows[1.0]["error_linear"]["value"] / rows[0.5]["error_linear"]["value"]
    assert ratio == pytest.approx(4, rel=0.3)
    assert abs(rows[1.0]["error_second_order"]["value"]) < abs(rows[1.0]["error_linear"]["value"]) / 2
    assert result["log_log_slope"]["low"] < result["log_log_slope"]["value"] < result["log_log_slope"]["high"]
    curvature = 2 * (rows[1.0]["second_order"]["value"] - rows[1.0]["linear"]["value"])
    expected = 2 * abs(rows[1.0]["linear"]["value"] / curvature)
    assert result["end_of_linearity"]["value"] == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("trl_entropy.experiments.linearity.pool_completions", lambda *a: pytest.fail("it is kept"))
    assert run_small("linearity", checkpoint, tmp_path, "--num-completions", 64)["rows"] == result["rows"]


def test_conditioning_from_end_to_end(checkpoint, tmp_path):
    rows = {row["rule"]: row for row in run_small(
        "conditioning", checkpoint, tmp_path, "--num-completions", 64)["rows"]}  # fmt: skip
    for row in rows.values():
        assert sum(row[f"share_{name}"] for name in ("momentum", "weight_decay", "gradient")) == pytest.approx(1)
        equal_lr, equal_length = row["equal_lr"], row["equal_length"]
        assert equal_length["scale"] * row["length"] == pytest.approx(rows["AdamW"]["length"])
        scaled = equal_length["scale"] * equal_lr["linear"]["value"]
        assert equal_length["linear"]["value"] == pytest.approx(scaled, rel=0.05)
    assert rows["SGD"]["share_gradient"] == 1 and rows["AdamW"]["share_momentum"] != 0
    assert rows["AdamW"]["equal_lr"]["measured"] == rows["AdamW"]["equal_length"]["measured"]


def test_influence_from_end_to_end(checkpoint, state, tmp_path):
    result = run_small("influence", checkpoint, tmp_path, "--num-completions", 12, "--check", 4)
    assert set(result["process_seconds"]) == {"forward_backward", "sequence", "token"}
    assert result["row_sum_error"] < 1e-5 and len(result["completions"]) == 32
    held, free = result["check"]["held"], result["check"]["free"]
    assert held["correlation"] > 0.99 and held["slope"] == pytest.approx(1, abs=0.05)
    # At the third step M is half made of this gradient: free, it turns with each completion, and (T9) holds it.
    assert abs(free["slope"] - 1) > 2 * abs(held["slope"] - 1)
    # One column: what the whole step does to the log-probability of a probe completion.
    matrices = torch.load(result["matrices"], weights_only=True)
    probe = pool_completions(state, 12, 0, 0)
    metric = metric_of_step(state.context)
    gradient_step = {name: -metric[name] * gradient for name, gradient in state.context.gradient.items()}
    with state.engine.scoring_model(state.before) as model:
        logps = score(model, probe, 1.0, 12, state.before, gradient_step, order=1).logps[1]
    torch.testing.assert_close(matrices[1].sum(0), logps.sum(1), rtol=1e-3, atol=1e-4 * float(logps.abs().max()))


def own_rollouts(state, seeds) -> dict:
    """TRL's batch of a step of six groups of four."""
    return state.draw_rollouts(state.draw_problems(6, seeds), 4, seeds)


def test_each_methods_gradient_is_that_of_trls_loss(state, monkeypatch):
    """With its entropy bonus; and with the chosen tokens' advantages at zero."""
    batch = own_rollouts(state, (8,))
    rollouts = RolloutBatch.from_micro_batches([batch])
    gradients, counts = loss_gradients(state, rollouts, state.update, 3, 16)
    with state.engine.scoring_model(state.before) as model:
        scores = score(model, Completions.of(rollouts), 1.0, 16)
    logps, mask = scores.logps[0], rollouts.loss_mask.bool()
    chosen = chosen_tokens(logps, rollouts, 3)
    advantages = rollouts.advantages[:, None].expand(logps.shape)
    losses = entropy_losses(state, Completions.of(rollouts), advantages, state.update, 16)
    chosen |= ranked_tokens(scores, losses, rollouts, chosen)
    assert chosen.keys() == counts.keys()
    for name, values in {"largest_cov": token_covariances(logps, advantages, mask), "attribution": losses}.items():
        left_out = chosen[f"{name} 0.1"]
        assert int(left_out.sum()) == counts["clip_cov 0.1"] and not (left_out & ~mask).any()
        assert values[left_out].min() >= values[mask & ~left_out].max()
    tokens = int(rollouts.completion_mask.sum())
    assert counts["clip_cov 0.1"] == counts["random 0.1"] == int(0.1 * tokens) >= counts["random_positive 0.1"] > 0
    trainer, parameters = state.trainer, dict(state.model.named_parameters())
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 1)
    monkeypatch.setattr(trainer, "_entropy_bonus_enabled", True)
    for method, gradient in gradients.items():
        kind, number = method.split() if " " in method else (method, "0")
        monkeypatch.setattr(trainer, "entropy_coef", float(number) if kind == "bonus" else 0.0)
        kept = rollouts.advantages[:, None].where(~chosen[method], 0.0) if method in chosen else rollouts.advantages
        loss = trainer.compute_loss(state.model, batch | {"advantages": kept})
        found = torch.autograd.grad(loss, list(parameters.values()))
        for name, expected in zip(parameters, found, strict=True):
            torch.testing.assert_close(gradient[name], expected, rtol=1e-3, atol=1e-6, msg=f"{method} {name}")
    positive = rollouts.advantages[:, None].expand(logps.shape)[chosen["random_positive 0.1"]]
    assert (positive > 0).all() and not torch.equal(chosen["random 0.1"], chosen["clip_cov 0.1"])


def test_each_methods_step_and_the_entropy_that_its_budget_keeps(state):
    """The state's own rollouts again; g of a probe batch whose halves are equal, so that it has no noise."""
    rows = pool_completions(state, 8, 0, 1).rows(torch.arange(8).repeat_interleave(2))
    probe = replace(rows, prompt_index=torch.arange(16))
    made = steps_of_methods(state, state.rollouts, probe, 0, 32)
    assert list(made) == list(METHODS)
    before = {name: parameter.grad.clone() for name, parameter in state.model.named_parameters()}
    planned = predicted_update(state.context)
    with state.engine.scoring_model(state.before) as model:
        scores = score(model, probe, 1.0, 16, state.before)
        h = float(scores.entropy[0].double().sum() / probe.completion_mask.sum())
        g = entropy_gradient(model, probe, 1.0, 16, h, float(probe.completion_mask.sum()))

    def change(step) -> float:
        return sum(float((g[name].double() * d.double()).sum()) for name, d in step.update.items())

    whole = change(made["none"])
    for name, update in planned.items():
        torch.testing.assert_close(made["none"].update[name], update, rtol=1e-2, atol=1e-7)
        assert torch.equal(made["lower_lr 0.5"].update[name], 0.5 * made["none"].update[name])
        assert torch.equal(state.engine.parameters[name].grad, before[name])
    assert made["none"].departure == 0 and made["lower_lr 0.5"].departure == pytest.approx(0.5)
    # With the gradient that it is asked of, attribution keeps more than as many other tokens.
    others = [change(made[f"{name} 0.1"]) for name in ("largest_cov", "centred_cov", "clip_cov", "random")]
    assert change(made["attribution 0.1"]) > max(others)
    for method, share in TARGET_CHANGES.items():
        assert not made[method].infeasible and 0 < made[method].departure < 1
        assert change(made[method]) == pytest.approx(share * whole, abs=1e-4 * abs(whole))


def test_changes_in_blocks_are_those_of_forward_mode_and_of_short_steps(state):
    large = LargeSet(state, 128, 0, 64)
    completions, short = Completions.of(large.rollouts), {n: d / 16 for n, d in state.update.items()}
    with state.engine.scoring_model(state.before) as model:
        scores = score(model, completions, 1.0, 64, state.before, short, order=1)
    terms = point_terms(scores.entropy, scores.logps, scores.logps[0], completions.completion_mask)
    entropy, reward = large.products([short])[0].sum(1).tolist()
    tokens = float(large.summary[1].sum())
    assert entropy / tokens == pytest.approx(float(delta_linear(terms.terms, terms.tangents).value), rel=1e-4)
    expected = float((large.advantages * scores.logps[1].double().sum(1)).mean())
    assert reward / 128 == pytest.approx(expected, rel=1e-4)
    true = true_changes(large.summary, large.moved(short), 128)
    assert [float(change.value) for change in true] == pytest.approx([entropy / tokens, reward / 128], rel=0.1)
    prompts = {tuple(row) for row in large.rollouts.prompt_ids.tolist()}
    assert len(prompts) <= 32 and len(set(state.trainer.eval_dataset["prompt"])) > 1000


@pytest.mark.slow
def test_exchange_from_end_to_end(checkpoint, tmp_path, capsys, monkeypatch):
    options = ("--num-redraws", 4, "--num-completions", 128, "--num-measured", 2, "--num-probe", 16)
    result = run_small("exchange", checkpoint, tmp_path, *options)
    output = capsys.readouterr().out
    rows, true = ({row["method"]: row for row in result[key]} for key in ("rows", "true_rows"))
    assert list(rows) == list(METHODS) and list(true) == list(MEASURED)
    for quantity in ("entropy", "reward"):
        none, half = rows["none"][quantity], rows["lower_lr 0.5"][quantity]
        assert half["value"] == pytest.approx(none["value"] / 2)
        assert rows["lower_lr 0.5"][f"{quantity}_difference"]["stderr"] == pytest.approx(none["stderr"] / 2)
        for method, row in true.items():
            beyond = row[f"{quantity}_correction"]["value"]
            assert row[quantity]["value"] == pytest.approx(rows[method][quantity]["value"] + beyond) and beyond
        # What is beyond first order is of second order in the length.
        beyond = [true[method][f"{quantity}_correction"]["value"] for method in ("none", "lower_lr 0.5")]
        assert beyond[0] / beyond[1] == pytest.approx(4, rel=0.5)
    assert rows["lower_lr 0.5"]["exchange"]["value"] == pytest.approx(rows["none"]["reward_per_entropy"]["value"])
    assert all(method in output for method in METHODS) and "| none |" in output
    monkeypatch.setattr("trl_entropy.experiments.exchange.steps_of_methods", lambda *a: pytest.fail("they are kept"))
    assert run_small("exchange", checkpoint, tmp_path, *options)["rows"] == result["rows"]


@pytest.mark.parametrize("option, message", [
    (("--num-probe", "60"), "64 problems, a redraw takes 8 of them and --num-probe 60 others; lower --num-probe"),
    (("--num-completions", "200"), "--num-completions is 200; use a multiple of 128"),
])  # fmt: skip
def test_exchange_asks_for_what_the_run_has(checkpoint, option, message, monkeypatch):
    monkeypatch.setattr("trl_entropy.experiments.command.FixedState", lambda *a: pytest.fail("loading"))
    with pytest.raises(SystemExit, match=message):
        main(["exchange", "--checkpoint", str(checkpoint), *option])


def fake(directory: Path, *, without=(), extra=(), environment=None, **config) -> Path:
    """The files of a checkpoint, empty."""
    path = directory / "checkpoint-5"
    path.mkdir()
    for name in {"model.safetensors", "optimizer.pt", *extra} - set(without):
        (path / name).touch()
    if "config.yaml" not in without:
        (directory / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"task": "word_problems"} | config))
    if environment:
        (directory / "environment.json").write_text(json.dumps(environment))
    return path


@pytest.mark.parametrize("settings, message", [
    ({"without": ["optimizer.pt"]}, "has no optimizer.pt; train with save_only_model=False"),
    ({"without": ["model.safetensors"]}, "has no model.safetensors"),
    ({"without": ["config.yaml"]}, "has no config.yaml; the checkpoint must be in the directory of its run"),
    ({"extra": ["adapter_config.json"]}, "holds a LoRA adapter"),
    ({"reward_funcs": ["mine.py:right"]}, "functions of one's own: .*mine.py:right. They must be imported"),
    ({"top_entropy_quantile": 0.2}, "ran with top_entropy_quantile=0.2"),
    ({"loss_type": "grpo"}, "ran with loss_type='grpo'"),
    ({"beta": 0.04}, "ran with beta=0.04"),
])  # fmt: skip
def test_errors_name_what_is_missing(tmp_path, settings, message, monkeypatch):
    monkeypatch.setattr("trl_entropy.experiments.command.FixedState", lambda *a: pytest.fail("loading"))
    with pytest.raises(SystemExit, match=message):
        main(["calibration", "--checkpoint", str(fake(tmp_path, **settings))])
    assert not (tmp_path / "experiments").exists()


def test_a_run_that_does_not_say_its_task_is_refused(tmp_path):
    path = fake(tmp_path, environment={"command": ["my_script.py"]})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del config["task"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        Checkpoint.read(path)
    command = ["trl-entropy", "train", "--config", str(tmp_path / "gone.yaml")]
    (tmp_path / "environment.json").write_text(json.dumps({"command": command}))
    with pytest.raises(ValueError, match=r"gone\.yaml.*what the run was trained on"):
        Checkpoint.read(path)
    (tmp_path / "environment.json").write_text(json.dumps({"command": ["train.py", "--task", "gsm8k"]}))
    assert Checkpoint.read(path).task.task == "gsm8k"


def test_options_and_names_are_checked(tmp_path):
    for arguments, message in (
        (["calibrate"], "no experiment 'calibrate'"),
        (["calibration", "--checkpoint", str(tmp_path / "nothing")], "is not a folder"),
        (["calibration", "--checkpoint", str(tmp_path), "--u-prompts", "3"], "--u-prompts is 3; use 4 or more"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
