"""docs/optimizers.md says of each optimizer what a run of it finds."""

import pytest
from optimizer_table import OPTIMIZERS, SETTINGS, TABLE, optimizer_row

from trl_entropy.estimators.optimizer.known import SPLIT


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_table_is_what_is_found(optim):
    row = optimizer_row(optim)
    assert "wrong" not in row and row in TABLE.read_text(encoding="utf-8").splitlines()
    assert ("refused" in row) == (optim not in SPLIT)


def test_every_optimizer_with_a_rule_has_a_row():
    rows = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): row[1:] for row in rows if row[0].removeprefix("| ") in OPTIMIZERS}
    assert set(SPLIT) <= set(found) == set(OPTIMIZERS)
    assert all(len(row) == len(SETTINGS) for row in found.values())
