"""Trackers of `report_to` get numbers only, and those of an earlier step with its number."""

import math

import pytest
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from trl_entropy.runs.trackers import add_later, show_numbers_only, shown

LOGS = {"a": 1.0, "b": math.nan, "c": math.inf, "d": -math.inf, "e": None, "f": 0, "g": "text", "h": True}


def keeping(kind):
    """A tracker of this kind that sends nothing and keeps what it gets."""

    class Keeps(kind):
        def __init__(self):
            self.logs, self.steps = [], []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(logs)
            self.steps.append(state and state.global_step)

        def __del__(self):
            pass

    return Keeps()


def test_what_is_no_number_is_left_out_and_the_rest_stays():
    assert shown(LOGS) == {"a": 1.0, "f": 0, "g": "text", "h": True}


@pytest.mark.parametrize("kind", [WandbCallback, MLflowCallback, TrackioCallback, TensorBoardCallback])
def test_every_tracker_and_nobody_else_is_spared_them(kind):
    tracker, own, given = keeping(kind), keeping(TrainerCallback), dict(LOGS)
    for _ in range(2):  # it is called before each log line
        show_numbers_only([tracker, own])
    for callback in (tracker, own):
        callback.on_log(None, None, None, logs=given, model=None)
    assert tracker.logs == [shown(LOGS)]
    assert own.logs[0] is given and given.keys() == LOGS.keys()  # nothing is taken from what the others get
    tracker.on_log(None, None, None)
    assert tracker.logs[-1] is None


def test_numbers_of_an_earlier_step_have_its_number():
    """TensorBoard's callback is left out: `tensorboard.add_later` writes them under tags of their own."""
    state, trainer = TrainerState(global_step=7), Trainer.__new__(Trainer)
    trainer.args, trainer.state, trainer.control, trainer.model = None, state, TrainerControl(), None
    kinds = [WandbCallback, MLflowCallback, TrackioCallback, TensorBoardCallback, TrainerCallback]
    callbacks = [keeping(kind) for kind in kinds]
    add_later(callbacks, trainer, 6, {"a": 1.0, "b": math.nan})
    assert [callback.steps for callback in callbacks] == [[6], [6], [6], [], []]
    assert callbacks[0].logs == [{"a": 1.0}] and state.global_step == 7
