"""docs/optimizers.md says of each optimizer what a run of it finds."""

import pytest
from optimizer_table import OPTIMIZERS, SETTINGS, TABLE, optimizer_row

from trl_entropy.estimators.optimizer.known import SPLIT


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_table_is_what_is_found(optim):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes", reason="it is not among what the tests install: its wheel has CUDA")
    row = optimizer_row(optim)
    assert "wrong" not in row and row in TABLE.read_text(encoding="utf-8").splitlines()
    assert ("refused" in row) == (optim not in SPLIT)


def test_every_optimizer_with_a_rule_has_a_row():
    rows = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): row[1:] for row in rows if row[0].removeprefix("| ") in OPTIMIZERS}
    assert set(SPLIT) - {"adamw_8bit"} <= set(found) == set(OPTIMIZERS)  # a second name of adamw_bnb_8bit
    assert all(len(row) == len(SETTINGS) for row in found.values())
