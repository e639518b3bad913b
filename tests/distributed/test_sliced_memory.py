"""Under ZeRO-3 and FSDP2 no process holds more than a layer beyond its slices while the entropy probe scores."""

import pytest
from benchmarks import sliced_memory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("engine", ["zero3-cpu", "fsdp2-cpu"])
def test_at_most_one_layer_is_whole_on_a_device(engine, full):
    held = sliced_memory.measured(engine, num_processes=2, full=full, probes=["held_out"])["held_out"]
    own_slices = 0.5 * sliced_memory.LAYERS if full else 0.1  # a copy of theta before the step
    assert 0.2 < held["device"] < own_slices + 1
    whole = sliced_memory.LAYERS * (3 if full else 1)  # theta before and after, update; or the frozen base
    assert 0.9 < held["machine"] / whole < 1.3
