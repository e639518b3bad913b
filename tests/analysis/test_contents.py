"""A sentence on what a run holds, and how to have what it lacks."""

import pytest

from trl_entropy.analysis.contents import PARTS, describe, steps_text
from trl_entropy.analysis.run import load_run


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_a_full_and_of_an_empty_run(part, real_run, tmp_path):
    held, lacking = describe(load_run(real_run), part), describe(load_run(tmp_path), part)
    assert held.startswith("three-steps holds ") and "step" in held and held.endswith(("3.", "1 to 3."))
    assert f"{tmp_path.name} holds no {PARTS[part].name}, so there is nothing to show." in lacking
    assert lacking.endswith(f"{PARTS[part].remedy}.")


def test_steps_in_words():
    assert steps_text([4]) == "step 4" and steps_text([1, 2, 3, 7]) == "steps 1 to 3, 7"
    assert steps_text(range(1, 20, 2), most=3) == "steps 1, 3, 5, ..."
