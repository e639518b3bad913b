"""Completions that are drawn for a probe."""

import numpy as np
import torch

from trl_entropy.rollouts.drawing import own_randomness, pack_completions


def test_a_log_probability_that_the_sampler_does_not_know_is_nan():
    """vLLM's nan, which TRL makes None."""
    packed = pack_completions([[1], [2, 3]], [[4, 5], [6]], 0, 0, "cpu", [[-1.0, None], [-2.0]])
    expected = torch.tensor([[-1.0, torch.nan], [-2.0, 0.0]])
    torch.testing.assert_close(packed.sampling_logps, expected, equal_nan=True)


def test_a_draw_of_its_own_leaves_the_random_states_of_training():
    """Torch's, and numpy's, from which vLLM takes its seeds on a GPU."""
    drawn = []
    for _ in range(2):
        before = torch.get_rng_state(), np.random.get_state()
        with own_randomness((1, 2), torch.device("cpu")):
            drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1][1])
        np.random.rand(5), torch.rand(5)  # training goes on
    assert drawn[0] == drawn[1]
    with own_randomness((1, 3), torch.device("cpu")):
        assert np.random.rand(3).tolist() != drawn[0][1]
