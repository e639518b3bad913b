"""Training, probes, controls, resuming and evaluation on an emulated device; planted faults are found there."""

import contextlib
import re

import pytest
import torch

from tests.devices.emulated import DEVICE, EmulatedDevice, MixedDevices
from tests.devices.planting import plant
from tests.devices.replayed import (
    CLIP_COV,
    HELD_OUT,
    JOINED,
    NEXT_ROLLOUTS,
    StopAfter,
    adapter,
    smallest_model,
    train,
)
from trl_entropy import DrGRPOTrainer, Probe
from trl_entropy.control.token_control import TokenControl
from trl_entropy.estimators.attribution.shares import bin_index, category_sums
from trl_entropy.evaluation.plan import PROFILES, settings_of
from trl_entropy.evaluation.sampling import Sampler
from trl_entropy.gradients import scores
from trl_entropy.gradients.group_products import MicroBatchNorms
from trl_entropy.models.embedded import build_tokenizer
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts import drawing

STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def train_and_resume(folder, callbacks=(), **settings):
    """Two steps with an interruption after the first."""
    train(folder, use_cpu=False, model=smallest_model(), callbacks=[StopAfter(1), *callbacks], **STEPS, **settings)
    return train(
        folder, use_cpu=False, model=smallest_model(), callbacks=callbacks, resume="latest", **STEPS, **settings
    )


def check(tmp_path, settings, lora):
    """Nothing is mixed on the device, and the numbers are those of the CPU without an interruption."""
    settings = settings | {"lora": adapter() if lora else None}
    expected, rows = train(tmp_path / "cpu", use_cpu=True, model=smallest_model(), max_steps=2, **settings)
    with EmulatedDevice() as device:
        found, rows_there = train_and_resume(tmp_path / "device", **settings)
    assert device.copies and device.reads  # the run was on it
    assert torch.equal(found, expected)
    assert [row.keys() for row in rows_there] == [row.keys() for row in rows]
    return device


def test_probes_and_controls_keep_to_the_device(tmp_path):
    check(tmp_path, JOINED["held-out completions"], lora=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOINED)
def test_full_fine_tuning_keeps_to_the_device(name, tmp_path):
    check(tmp_path, JOINED[name], lora=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOINED)
def test_generated_completions_keep_to_the_device(name, tmp_path):
    """With the model's own sampling, recomputed activations and an evaluation after each step."""
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    more |= {"eval_strategy": "steps", "eval_steps": 1, "trainer": DrGRPOTrainer}
    with EmulatedDevice():
        train_and_resume(tmp_path, lora=adapter(), **(JOINED[name] | more))


def drawn_on_device():
    """Rows of an evaluation's sampler with its model on the device."""
    tokenizer, model = build_tokenizer(), smallest_model().eval().to(DEVICE)
    task = {"task": "word_problems", "seed": 0, "max_completion_length": 4, "temperature": 0.7, "reward_funcs": []}
    settings = settings_of(task, PROFILES["quick"], num_samples=1)
    return list(
        Sampler(model, tokenizer, settings, 8).draw([{"prompt": "Ann has 3 apples."}, {"prompt": "Ben"}], greedy=False)
    )


def test_evaluation_keeps_to_the_device():
    with EmulatedDevice():
        rows = drawn_on_device()
    assert sorted(place for place, _ in rows) == [0, 1]


# ---- planted faults


class IndexInHook(Probe):
    """A probe of a user, whose hook selects rows of a gradient by an index on the CPU."""

    name = "index_in_hook"

    @contextlib.contextmanager
    def around_micro_batch(self, args, state, control, *, inputs, model, **kwargs):
        parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)

        def read(gradient):
            gradient.index_select(0, torch.arange(2))

        hook = parameter.register_hook(read)
        yield
        hook.remove()


SHARES = "trl_entropy/estimators/attribution/shares.py"
# What is planted: the function, its text and what stands there instead; which operation is refused then, and where.
PLANTED = {
    "zeros without a device, in an estimator": (
        (category_sums, "contributions.new_zeros(", "torch.zeros("),
        ("index_add", SHARES),
    ),
    "a list of numbers without a device": ((bin_index, ", device=values.device", ""), ("bucketize", SHARES)),
    "a number without a device, to which a hook adds": (
        (MicroBatchNorms.micro_batch, ", device=next(self._model.parameters()).device", ""),
        ("add_", "trl_entropy/gradients/group_products.py"),
    ),
    "what a generator of the CPU draws": (
        (TokenControl._chosen_of_all, ".to(everywhere.device)", ""),
        ("where", "trl_entropy/estimators/control/token_control.py"),
    ),
    "a mask": (
        (scores._join, ".where(mask, 0.0)", ".where(mask.cpu(), 0.0)"),
        ("where", "trl_entropy/gradients/scores.py"),
    ),
    "a resumed state": (
        (StepRecord.from_state.__func__, 'send_to_device(state["rollouts"], device)', 'dict(state["rollouts"])'),
        ("embedding", "trl_entropy/gradients/scores.py"),
    ),
    "an index in a hook": (None, ("index_select", "tests/devices/test_training_on_a_device.py")),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> str:
    """What is found in one run with all of the planted faults."""
    settings = NEXT_ROLLOUTS | CLIP_COV | {"entropy_attribution": "token"}
    settings |= {"noise_scale_probe": True, "noise_scale_from": "micro_batches"}
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(MixedDevices) as raised:
        for fault in (fault for fault, _ in PLANTED.values() if fault is not None):
            plant(monkeypatch, *fault)
        with EmulatedDevice():
            train_and_resume(tmp_path_factory.mktemp("planted"), [IndexInHook(every=1)], lora=adapter(), **settings)
    return str(raised.value)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_found_where_it_is(name, found):
    operation, file = PLANTED[name][1]
    assert re.search(rf"^{operation} of tensors on the device .* {re.escape(file)}:\d+", found, re.MULTILINE), found


@pytest.mark.slow
def test_a_probe_that_leaves_the_devices_random_state_changed_changes_training(tmp_path, monkeypatch):
    def weights(name, **settings):
        with EmulatedDevice():
            return train(tmp_path / name, False, model=smallest_model(), trainer=DrGRPOTrainer, **settings)[0]

    off = weights("off")
    assert torch.equal(weights("on", **HELD_OUT), off)
    plant(monkeypatch, drawing.own_randomness, '[device] if device.type == "cuda" else []', "[]")
    assert not torch.equal(weights("on, planted", **HELD_OUT), off)
