"""What readers need for intervals: the number of prompts behind each standard error, and the sum of the parts."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from trl_entropy.runs.change_metrics import OUTCOMES_BY_PROBABILITY
from trl_entropy.runs.directory import RunDirectory


def test_the_number_of_prompts_behind_each_error_is_logged(real_run):
    for row in RunDirectory(real_run).metrics():
        name = f"step_{row['step']:06d}.safetensors"
        batch, fisher = (load_file(real_run / "probes" / probe / name) for probe in ("entropy", "fisher"))
        prompts = np.unique(batch["prompt_index"])
        assert row["entropy/num_prompts"] == len(prompts)
        halves = [row[f"entropy/half_{half}_num_prompts"] for half in "ab"]
        assert halves == [(prompts % 2 == parity).sum() for parity in (0, 1)]
        assert row["fisher/num_prompts"] == len(np.unique(fisher["prompt_index"]))
        assert row["entropy_control/num_prompts"] == 8 + 4  # its own completions, each of a prompt, and the step's


def test_the_parts_of_the_change_add_up_to_that_of_all(real_run):
    row = RunDirectory(real_run).metrics()[-1]
    parts = [row[f"entropy/mean_delta_{name}"] for name in OUTCOMES_BY_PROBABILITY]
    assert sum(parts) == pytest.approx(row["entropy/mean_delta_all"])
    assert row["entropy/mean_delta_all_low"] < row["entropy/mean_delta_all"] < row["entropy/mean_delta_all_high"]
