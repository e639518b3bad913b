"""The entropy control in training: steps follow it, moments do not see it, off is off, resumed, refused by name."""

import logging

import pytest
import torch
from datasets import Dataset
from first_fast import first_fast
from peft import LoraConfig

from trl_entropy import DrGRPOConfig
from trl_entropy.control import EntropyControl
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.gradients.loss_coefficients import LossCoefficientRecorder
from trl_entropy.gradients.scores import score
from trl_entropy.probes import Probe
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.directory import RunDirectory

CONTROL = {"entropy_control": "hold", "entropy_control_per_step": 0.01, "entropy_control_num_completions": 16}


def of(source):
    """The control on completions of this source; the size of a batch that is not drawn is as by default."""
    own = {"entropy_control_completions": "rollouts", "entropy_control_num_completions": 128}
    return CONTROL | (own if source == "rollouts" else {})


@pytest.fixture(scope="module")
def problems():
    return Dataset.from_dict(
        {"prompt": [f"{name} has {i} apples." for name in ("Ann", "Ben", "Cem", "Dia") for i in range(12)]}
    )


def trained(make_trainer, problems, callbacks=None, **settings):
    trainer = make_trainer(dataset=problems, callbacks=callbacks, **({"lr_scheduler_type": "constant"} | settings))
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return trainer, RunDirectory(trainer.args.output_dir).metrics()


def flat(trainer):
    return torch.cat([param.detach().flatten() for param in trainer.model.parameters()])


def moments(trainer):
    return [state["exp_avg"] for state in trainer.optimizer.state.values()]


@pytest.mark.parametrize("source", first_fast(["probe", "rollouts"]))
def test_steps_make_the_change_that_is_asked(make_trainer, problems, source):
    """Measured by the entropy probe, on 32 completions of its own or the 16 of the next step; 5 steps."""
    drawn = {"entropy_probe_completions": "held_out", "entropy_probe_num_completions": 32}
    _, rows = trained(
        make_trainer, problems, max_steps=5, entropy_probe=True, learning_rate=3e-4, entropy_attribution="sequence",
        **(of(source) | {"entropy_control_per_step": -0.01} | (drawn if source == "probe" else {})),
    )  # fmt: skip
    for row in rows:
        assert row["entropy_control/target_change"] == -0.01 and row["entropy_control/active"] == 1
        if row["entropy_control/infeasible"] == 0:
            assert row["entropy_control/delta_predicted"] == pytest.approx(-0.01)
        assert 0 < row["entropy_control/relative_size"] <= 1 + 1e-6
        assert abs(row["entropy/attribution_rounding"]) < 1e-3  # float32 parameters: small steps, rounded twice
    assert sum(row["entropy/delta_entropy_control"] for row in rows) < -0.03
    predicted = sum(row["entropy_control/delta_predicted"] for row in rows)
    measured = sum(row["entropy/delta_measured"] for row in rows)
    alone = sum(row["entropy_control/delta_optimizer"] for row in rows)
    assert measured == pytest.approx(predicted, rel=0.6) and abs(alone) < 0.5 * abs(predicted)


class Watch(Probe):
    """Keeps a step's completions and the parameters that it starts from."""

    def on_rollouts(self, args, state, control, *, rollouts, model, **kwargs):
        self.rollouts = Completions.of(rollouts)
        self.params = {name: param.detach().clone() for name, param in model.named_parameters()}


DROPOUT = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    "settings, pooled",
    first_fast(
        [({}, True), ({"num_iterations": 2}, False), ({"peft_config": DROPOUT, "disable_dropout": False}, False)]
    ),
    ids=["fresh", "used twice", "dropout"],
)
def test_the_entropy_is_that_of_probe_batch_and_fresh_rollouts(make_trainer, problems, settings, pooled):
    watch = Watch()
    trainer, rows = trained(make_trainer, problems, callbacks=[watch], max_steps=1, **settings, **CONTROL)
    control = trainer.probe_runner.named_probes()["EntropyControl"]
    trainer.model.load_state_dict(watch.params, strict=False)
    total = count = 0.0
    for completions in [control._completions, *([watch.rollouts] if pooled else [])]:
        entropy = score(trainer.model, completions, 1.0, 64).entropy[0]
        total += float(entropy[completions.completion_mask.bool()].double().sum())
        count += int(completions.completion_mask.sum())
    assert rows[0]["entropy_control/entropy"] == pytest.approx(total / count, rel=1e-6)
    # A prompt of the one batch is none of the other, whatever their numbers: errors are clustered by prompt.
    num_own = len(watch.rollouts.prompt_index.unique()) if pooled else 0
    assert rows[0]["entropy_control/num_prompts"] == len(control._completions.prompt_index.unique()) + num_own
    assert control._completions.prompt_index.min() == watch.rollouts.prompt_index.min() == 0


def test_the_moments_never_see_it(make_trainer, problems):
    """After one step they are those of plain training; theta is not."""
    (plain, _), (controlled, _) = (
        trained(make_trainer, problems, max_steps=1, **settings) for settings in ({}, CONTROL)
    )
    assert all(torch.equal(one, two) for one, two in zip(moments(plain), moments(controlled), strict=True))
    assert not torch.equal(flat(plain), flat(controlled))


@pytest.mark.parametrize("source", first_fast(["probe", "rollouts"]))
def test_report_leaves_training_bit_identical(make_trainer, problems, source):
    (plain, _), (reported, rows) = (
        trained(make_trainer, problems, max_steps=3, beta=0.1, **settings)
        for settings in (
            {},
            of(source) | {"entropy_control": "report", "entropy_control_per_step": None},
        )
    )
    assert torch.equal(flat(plain), flat(reported))
    assert all(
        row["entropy_control/active"] == 0 and row["entropy_control/correction_coefficient"] != 0 for row in rows
    )
    before, later = ([row["entropy_control/entropy"] for row in part] for part in (rows[:-1], rows[1:]))
    realised = [row["entropy_control/realised_previous"] for row in rows[1:]]
    assert realised == [two - one for one, two in zip(before, later, strict=True)] and all(realised)
    assert rows[-1]["entropy_control/price"] is not None and rows[-1]["entropy_control/noise_share"] > 0


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(make_trainer, problems, tmp_path):
    points = []
    for name, stops in (("straight", [4]), ("resumed", [2, 4])):
        for stop in stops:
            trainer, rows = trained(
                make_trainer, problems, max_steps=stop, output_dir=str(tmp_path / name), save_strategy="steps",
                save_steps=2, entropy_control="hold", entropy_control_target=6.0, entropy_control_num_completions=16,
                resume_from_checkpoint="latest" if stop > stops[0] else None,
            )  # fmt: skip
        points.append(
            (flat(trainer), [{k: v for k, v in row.items() if k.startswith("entropy_control")} for row in rows])
        )
    assert torch.equal(points[0][0], points[1][0]) and points[0][1] == points[1][1]
    assert "entropy_control/slope" in points[0][1][-1]


FLOOR = {"entropy_control": "floor", "entropy_control_target": 9.0, "entropy_control_num_completions": 16}


def test_a_floor_is_let_go(make_trainer, problems):
    """After two steps of rewards that reach the level; then steps are the optimizer's own, and nothing is drawn."""
    settings = {**FLOOR, "entropy_control_release": 0.01, "entropy_control_release_steps": 3}
    _, rows = trained(make_trainer, problems, max_steps=4, **settings)
    assert [row["entropy_control/released"] for row in rows] == [0, 0, 1, 1]
    corrected = [row.get("entropy_control/correction_coefficient", 0.0) for row in rows]
    assert corrected[0] > 0 and corrected[1] > 0 and corrected[2:] == [0, 0]
    assert "entropy_control/entropy" not in rows[2]


@pytest.mark.parametrize("source", first_fast(["rollouts", "probe"]))
def test_what_has_let_go_trains_as_without(make_trainer, problems, source):
    (plain, _), (let_go, rows) = (
        trained(make_trainer, problems, max_steps=2, **settings)
        for settings in (
            {},
            {**of(source), "entropy_control": "floor", "entropy_control_release": -1.0,
             "entropy_control_release_steps": 1},
        )
    )  # fmt: skip
    assert torch.equal(flat(plain), flat(let_go))
    assert [row["entropy_control/released"] for row in rows] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_release_is_resumed(make_trainer, problems, tmp_path, stop):
    """Before, at and after the step in which it lets go."""
    points = []
    for name, stops in (("straight", [4]), ("resumed", [stop, 4])):
        for end in stops:
            trainer, rows = trained(
                make_trainer, problems, max_steps=end, output_dir=str(tmp_path / name), save_strategy="steps",
                save_steps=1, resume_from_checkpoint="latest" if end > stops[0] else None, **FLOOR,
                entropy_control_release=0.01, entropy_control_release_steps=3,
            )  # fmt: skip
        logged = [{k: v for k, v in row.items() if k.startswith("entropy_control")} for row in rows]
        points.append((flat(trainer), logged))
    assert torch.equal(points[0][0], points[1][0]) and points[0][1] == points[1][1]
    assert [row["entropy_control/released"] for row in points[0][1]] == [0, 0, 1, 1]


def test_composes_with_lora_losses_and_off_policy_steps(make_trainer, problems):

    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    settings = {"loss_type": "dapo", "num_iterations": 2, "beta": 0.04, "gradient_accumulation_steps": 2}
    _, rows = trained(
        make_trainer, problems, peft_config=peft_config, max_steps=3, learning_rate=3e-3, **settings, **CONTROL
    )
    assert all(row["entropy_control/correction_coefficient"] > 0 for row in rows)


def test_it_switches_itself_off_where_predictions_fail(make_trainer, problems, caplog):
    trainer = make_trainer(dataset=problems, max_steps=2, lr_scheduler_type="constant", **CONTROL)
    control = trainer.probe_runner.named_probes()["EntropyControl"]
    for _ in range(20):
        control.prediction_check.add(0.01, Estimate(-0.01, 0.001, 30.0, 16))
    control.load_state_dict(control.state_dict() | {"before": [1e-9, 0.0, 9.0, 0.001, 30.0, 16]})
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        trainer.train()
    (message,) = (record.getMessage() for record in caplog.records if "entropy_control" in record.getMessage())
    assert "off from step 1 on" in message and "entropy_control_num_completions" in message
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert [row["entropy_control/active"] for row in rows] == [0, 0]
    assert rows[0]["entropy_control/delta_predicted"] == rows[0]["entropy_control/delta_optimizer"]


@pytest.mark.parametrize("cap, shares", [(1e-6, False), (1e6, True)], ids=["withheld", "made"])
def test_a_change_that_the_cap_withholds_depends_on_no_error_of_the_entropy(make_trainer, problems, cap, shares):
    settings = {"entropy_control": "hold", "entropy_control_target": 6.0, "entropy_control_num_completions": 16}
    trainer = make_trainer(dataset=problems, max_steps=1, **settings)
    control = trainer.probe_runner.named_probes()["EntropyControl"]
    control.cap, control.set_point.max_change = cap, 100.0
    trainer.train()
    (row,) = RunDirectory(trainer.args.output_dir).metrics()
    predicted, shared, entropy = control._before
    assert row["entropy_control/infeasible"] == (not shares) and entropy.stderr > 0
    gains = control.set_point.gain + control.set_point.integral_gain
    assert shared == pytest.approx(gains * entropy.stderr**2 if shares else 0.0)
    assert predicted == row["entropy_control/delta_predicted"]


@pytest.mark.parametrize("mode, resumed_as", [("hold", "hold"), ("hold", "report"), ("report", "hold")])
@pytest.mark.parametrize("was_active", [True, False])
def test_what_has_switched_itself_off_stays_off_when_it_is_resumed(mode, resumed_as, was_active):
    """A report has switched nothing off: a run that goes on with "hold" after it is corrected."""
    first, second = EntropyControl(mode=mode), EntropyControl(mode=resumed_as)
    first.active = first.active and was_active
    second.load_state_dict(first.state_dict())
    assert second.active == (resumed_as == "hold" and (was_active or mode == "report"))


def test_a_step_that_was_dropped_leaves_nothing_to_the_next(tmp_path):
    """Under DeepSpeed a gradient that is not finite makes no step; its coefficients must not join the next one's."""
    recorder, mask = LossCoefficientRecorder(), torch.ones(2, 3, dtype=torch.long)
    args = DrGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for factor in (float("nan"), 3.0):
        logps = torch.zeros(2, 3, requires_grad=True)
        recorder.watch({}, logps, torch.zeros(2, 3))
        (factor * logps).sum().backward()
        if factor != 3.0:
            recorder.forget()
    assert (recorder.of_step(mask, args, 1).policy == -3).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"entropy_control": "keep"}, "entropy_control is 'keep'; use one of"),
        ({"entropy_control_completions": "probes"}, "entropy_control_completions is 'probes'; use one of"),
        ({"entropy_control_per_step": None}, "either entropy_control_target or entropy_control_per_step"),
        ({"entropy_control_target": 0.3}, "either entropy_control_target or entropy_control_per_step"),
        ({"optim": "lion_32bit"}, "optim='adamw_torch_fused'.*sign of momentum"),
        ({"entropy_control_gain": 0.0}, "entropy_control_gain"),
        ({"entropy_control_num_completions": 5}, "entropy_control_num_completions to a multiple of 2"),
        ({"fisher_probe": True, "fisher_num_sequences": 12}, "fisher_probe=False"),
        ({"entropy_control_release": 0.5}, "entropy_control is 'hold'.*Set entropy_control='floor'"),
        (
            {"entropy_control": "floor", "entropy_control_release": 0.5, "entropy_control_release_steps": 0},
            "entropy_control_release_steps is 0; use 1 or more",
        ),
        ({**of("rollouts"), "num_iterations": 2}, "num_iterations=1"),
        ({**of("rollouts"), "top_k": 5}, "top_k=5"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, message, tmp_path):
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "num_generations": 4}
    with pytest.raises(ValueError, match=message):
        DrGRPOConfig(**(defaults | {"per_device_train_batch_size": 16} | CONTROL | settings))


def test_parameters_that_would_lose_the_correction_are_refused_at_construction(make_trainer, monkeypatch):
    narrow = {"model_init_kwargs": {"dtype": "bfloat16"}, "entropy_control_num_completions": 8}
    wanted = {"entropy_control_target": 3.0, **narrow}
    with pytest.raises(ValueError, match=r"is torch.bfloat16, whose rounding would lose.*Load the model with dtype"):
        make_trainer(entropy_control="hold", **wanted)
    make_trainer(entropy_control="report", **wanted)  # which corrects nothing
    monkeypatch.setattr("trl_entropy.control.entropy_control.upcasts_when_sharding", lambda mixed: True)
    make_trainer(entropy_control="hold", **wanted)  # FSDP2 makes float32 of them when training begins
