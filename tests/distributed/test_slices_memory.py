"""What a process holds beyond its slices while a probe works, under ZeRO-3, and what doctor says of it."""

import pytest
from benchmarks.sliced_memory import measured


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_holds_a_layer_or_two_of_eight_and_what_doctor_says():
    """Most of it is activations here: of wider layers, in which weights outweigh them, it is less than a half."""
    found = measured("zero3-cpu", 2, False, ["held_out", "held_out, second order"], hidden=256)
    for probe, most in (("held_out", 1.3), ("held_out, second order", 2.4)):
        held = found[probe]
        assert 0.3 < held["device"] < most
        assert held["planned device"] == pytest.approx(held["device"], rel=0.2)
        assert held["planned machine"] == pytest.approx(held["machine"], rel=0.01)
