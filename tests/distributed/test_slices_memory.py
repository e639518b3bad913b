"""What a process holds beyond its slices while a probe works, under ZeRO-3, and what doctor says of it."""

import pytest
from benchmarks.sliced_memory import measured


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_holds_about_one_layer_of_eight_and_what_doctor_says():
    """Most of it is activations here: of wider layers, in which weights outweigh them, it is less than a half."""
    held = measured("zero3-cpu", 2, False, ["held_out"], hidden=256)["held_out"]
    assert 0.3 < held["device"] < 1.3
    assert held["planned device"] == pytest.approx(held["device"], rel=0.2)
    assert held["planned machine"] == pytest.approx(held["machine"], rel=0.01)
