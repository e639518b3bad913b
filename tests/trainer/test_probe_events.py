"""What reaches a probe of one's own: which events, in which order, with what; and what is forgotten or kept."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from trl_entropy import Probe
from trl_entropy.engine import PastUpdate
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.set_aside import set_aside_after


class Listener(Probe):
    """Notes each event; keeps the update, so that it is still there when the next rollouts are drawn."""

    needs_loss_coefficients = True

    def __init__(self):
        super().__init__()
        self.events, self.drawn, self.moved, self.coefficients, self.resets = [], [], [], [], 0

    def check_model(self, args, model):
        self.events.append(f"check {type(model).__name__}")

    def reset(self):
        self.resets += 1

    def on_rollouts_drawn(self, args, state, control, *, metrics, drawn, record, engine, **kwargs):
        self.events.append("drawn")
        past = record and record.kept and PastUpdate.rebuilt(record.kept, engine)
        self.drawn.append((drawn, record and record.step, past))

    def on_no_more_rollouts(self, args, state, control, *, metrics, record, **kwargs):
        self.events.append(f"no more after {record.step}")

    def on_micro_batch(self, args, state, control, *, metrics, **kwargs):
        self.events.append("micro-batch")

    def on_rollouts(self, args, state, control, *, metrics, rollouts, record, **kwargs):
        self.events.append("rollouts")
        assert isinstance(record, StepRecord) and record.rollouts is rollouts

    def on_before_update(self, args, state, control, *, metrics, record, update, **kwargs):
        self.events.append("before")
        record.keep_update(update)
        self.coefficients.append((record.loss_coefficients, record.rollouts))

    def on_after_update(self, args, state, control, *, metrics, record, update, **kwargs):
        self.events.append("after")
        self.moved.append({name: value.clone() for name, value in update.update.items()})


def test_events_come_in_order_and_the_record_outlives_its_step(make_trainer):
    listener = Listener()
    trainer = make_trainer(callbacks=[listener], per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer.train()
    step = ["drawn", "micro-batch", "micro-batch", "rollouts", "before", "after"]
    # When the trainer is built, and again when training begins.
    checked = ["check Qwen2ForCausalLM"] * 2
    assert listener.events == [*checked, *step, *step, "no more after 2"]
    assert [number for _, number, _ in listener.drawn] == [None, 1]
    kept = listener.drawn[1][2].update
    assert kept.keys() == listener.moved[0].keys() and any(value.any() for value in kept.values())
    assert all(torch.equal(value, listener.moved[0][name]) for name, value in kept.items())
    # What was drawn is what the step's micro-batches hold, before they are shuffled.
    for (drawn, _, _), (_, rollouts) in zip(listener.drawn, listener.coefficients, strict=True):
        assert sorted(drawn.completion_ids.tolist()) == sorted(rollouts.completion_ids.tolist())


def test_loss_coefficients_are_the_losss_own_derivatives(make_trainer):
    """Dr-GRPO on policy: each token of a completion has A / (B L)."""
    listener = Listener()
    make_trainer(callbacks=[listener], max_steps=1).train()
    (coefficients, rollouts), *_ = listener.coefficients
    expected = rollouts.advantages.double().unsqueeze(1) * rollouts.loss_mask / (len(rollouts.rewards) * 12)
    assert expected.any() and torch.allclose(coefficients.policy, expected, rtol=1e-5, atol=1e-9)
    assert coefficients.kl is None


class Seldom(Listener):
    """Measures every second step."""

    def __init__(self):
        super().__init__()
        self.every = 2


def test_probes_of_different_cadence_share_what_is_recorded(make_trainer):
    """Neither gets rows of steps that the other alone, or none, wanted; each measured step is finished by the next."""
    always, seldom = Listener(), Seldom()
    attribution = {
        "entropy_probe": True,
        "entropy_probe_completions": "held_out",
        "entropy_probe_num_completions": 4,
        "entropy_attribution": "sequence",
    }
    make_trainer(callbacks=[seldom], max_steps=5, entropy_probe_every=3, **attribution).train()
    make_trainer(callbacks=[always, Seldom()], max_steps=4).train()
    for listener, num_measured in ((always, 4), (seldom, 2)):
        assert len(listener.coefficients) == num_measured
        assert all(len(found.policy) == 16 for found, _ in listener.coefficients)
    assert [step for _, step, _ in seldom.drawn] == [None, 1, 2, 3, 4]
    assert [bool(past) for _, _, past in seldom.drawn] == [False, False, True, False, True]


def test_seconds_are_those_of_the_step_and_of_all_its_events(make_trainer, monkeypatch):
    """Also on a device that has not done yet what it was given: neither training's work counts, nor another's."""
    clock, given = [100.0], [0.0]

    def synchronize(*args):
        clock[0] += given[0]
        given[0] = 0.0

    class Slow(Probe):
        name = "slow"

        def on_rollouts(self, args, state, control, *, metrics, **kwargs):
            given[0] += 4.0 + state.global_step

        def on_after_update(self, args, state, control, *, metrics, **kwargs):
            clock[0] += 8.0

    class Quick(Probe):
        name = "quick"

        def around_micro_batch(self, args, state, control, **kwargs):
            given[0] += 16.0  # of training
            return nullcontext()

        def on_rollouts(self, args, state, control, *, metrics, **kwargs):
            clock[0] += 1.0

    monkeypatch.setattr(torch.cpu, "synchronize", synchronize)
    monkeypatch.setattr("trl_entropy.probes.clock.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    trainer = make_trainer(callbacks=[Slow(), Quick()])
    trainer.train()
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert [(row["time/slow"], row["time/quick"]) for row in rows] == [(12.0, 1.0), (13.0, 1.0)]


def test_numbers_of_an_earlier_step_join_its_line(make_trainer):
    class Late(Probe):
        def on_rollouts(self, args, state, control, *, metrics, **kwargs):
            if state.global_step:
                trainer.record_metrics({"my/late": float(state.global_step)}, step=state.global_step)

        def on_step_end(self, args, state, control, **kwargs):  # before the step's line is written
            trainer.record_metrics({"my/early": float(state.global_step)}, step=state.global_step)

    trainer = make_trainer(callbacks=[Late()], max_steps=3)
    trainer.train()
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert [row["step"] for row in rows] == [1, 2, 3] and all("reward" in row for row in rows)
    assert [row.get("my/late") for row in rows] == [1.0, 2.0, None]
    assert [row.get("my/early") for row in rows] == [1.0, 2.0, 3.0]
    set_aside_after(RunDirectory(trainer.args.output_dir), 2)
    del rows[1]["my/late"]  # which came after the checkpoint of step 2, and comes again
    assert RunDirectory(trainer.args.output_dir).metrics() == rows[:2]


def test_a_failed_self_check_is_said_once_for_each_key(make_trainer, caplog):
    """With the likely causes; below the limit, nan, and numbers that are no checks are not."""

    class Checked(Probe):
        def on_rollouts(self, args, state, control, *, metrics, **kwargs):
            step = state.global_step + 1
            metrics |= {"entropy/attribution_rounding": -0.14, "entropy/noise_floor": 5.0}
            metrics["noise_scale/gradient_error"] = 0.32 if step == 3 else 0.009
            metrics["entropy/rollouts_gradient_error"] = float("nan")

    trainer = make_trainer(callbacks=[Checked()], max_steps=3)
    with caplog.at_level("WARNING", logger="trl_entropy"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "Likely causes: dropout" in record.getMessage()]
    first, second = said
    assert first.startswith("step 1: entropy/attribution_rounding is -0.14, and may be at most 0.01. ")
    assert second.startswith("step 3: noise_scale/gradient_error is 0.32, and may be at most 0.01. ")


class Counter(Probe):
    """Has a state."""

    num_steps = 0

    def on_rollouts(self, args, state, control, *, metrics, **kwargs):
        self.num_steps += 1

    def state_dict(self):
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state):
        self.num_steps = state["num_steps"]


def test_state_does_not_hang_on_the_place_in_the_list(make_trainer, tmp_path):
    """Another probe is turned on before it when the run is resumed."""
    settings = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 2}
    make_trainer(callbacks=[Counter()], max_steps=2, **settings).train()
    counter = Counter()
    more = {"effective_sample_size_probe": True, "additional_steps": 1, "resume_from_checkpoint": "latest"}
    trainer = make_trainer(callbacks=[Listener(), counter], **settings, **more)
    trainer.train(resume_from_checkpoint="latest")
    assert counter.num_steps == 3


def test_two_probes_of_one_state_name_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"two probes have the state_name 'Counter'.*Set another state_name"):
        make_trainer(callbacks=[Counter(), Counter(every=2)]).train()
    named = Counter()
    named.state_name = "other"
    trainer = make_trainer(callbacks=[Counter(), named], max_steps=1)
    trainer.train()
    assert set(trainer.probe_runner.state_dict()["probes"]) == {"Counter", "other"}


def test_training_again_after_an_exception_begins_the_step_anew(make_trainer):
    """Without it the first step would have the rows of both attempts."""

    class FailsOnce(Probe):
        has_failed = False

        def on_micro_batch(self, args, state, control, *, metrics, inputs, **kwargs):
            if not FailsOnce.has_failed and trainer.probe_runner.num_micro_batches == 1:
                FailsOnce.has_failed = True
                raise RuntimeError("out of luck")

        def on_rollouts(self, args, state, control, *, metrics, rollouts, **kwargs):
            metrics["my/num_rows"] = len(rollouts.rewards)

    listener = Listener()
    settings = {
        "effective_sample_size_probe": True,
        "entropy_probe": True,
        "entropy_probe_completions": "held_out",
        "entropy_probe_num_completions": 4,
    }
    trainer = make_trainer(
        callbacks=[listener, FailsOnce()],
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=1,
        **settings,
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    trainer.train()
    (row,) = RunDirectory(trainer.args.output_dir).metrics()
    assert FailsOnce.has_failed and listener.resets == 2
    assert row["my/num_rows"] == 16 and len(listener.coefficients[-1][0].policy) == 16
    assert row["ess/importance_weights"] == pytest.approx(16)  # 24 with those of the first attempt
    step = ["drawn", "micro-batch", "micro-batch", "rollouts", "before", "after"]
    assert listener.events[-7:] == [*step, "no more after 1"]
    (drawn, _, _), rollouts = listener.drawn[-1], listener.coefficients[-1][1]
    assert sorted(drawn.completion_ids.tolist()) == sorted(rollouts.completion_ids.tolist())  # of one generation
    assert row["reward"] == pytest.approx(rollouts.rewards.mean().item())  # not averaged with the first attempt's
