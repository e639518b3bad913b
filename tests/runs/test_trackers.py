"""Trackers of `report_to` get numbers only."""

import math

import pytest
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from trl_entropy.runs.trackers import show_numbers_only, shown

LOGS = {"a": 1.0, "b": math.nan, "c": math.inf, "d": -math.inf, "e": None, "f": 0, "g": "text", "h": True}


def keeping(kind):
    """A tracker of this kind that sends nothing and keeps what it gets."""

    class Keeps(kind):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(logs)

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
