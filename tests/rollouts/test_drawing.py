"""Completions that are drawn for a probe."""

import torch

from trl_entropy.rollouts.drawing import pack_completions


def test_a_log_probability_that_the_sampler_does_not_know_is_nan():
    """vLLM's nan, which TRL makes None."""
    packed = pack_completions([[1], [2, 3]], [[4, 5], [6]], 0, 0, "cpu", [[-1.0, None], [-2.0]])
    expected = torch.tensor([[-1.0, torch.nan], [-2.0, 0.0]])
    torch.testing.assert_close(packed.sampling_logps, expected, equal_nan=True)
