"""Failing together, one process at a time; `tests/distributed` has whole groups."""

import itertools
import threading

import pytest
import torch.distributed as dist
from test_engine_refusals import fake_accelerator

from trl_entropy.engine import OtherRankFailed, ending_together, rank_symmetric
from trl_entropy.engine import ranks as symmetry


def test_one_process_raises_the_original(accelerate_to) -> None:
    accelerator = accelerate_to()
    with pytest.raises(KeyError, match="seven"), rank_symmetric(accelerator, "counting"):
        raise KeyError("seven")

    @rank_symmetric(accelerator, "counting")
    def count() -> int:
        return 7

    assert count() == 7


GLOO = RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("errors", "raised"),
    [
        ([(1, KeyError("seven")), (0, GLOO)], [(KeyError, "seven"), (OtherRankFailed, "rank 1 failed: KeyError: 's")]),
        ([(0, ValueError("no")), (1, ValueError("no"))], [(ValueError, "no"), (ValueError, "no")]),
        ([(0, GLOO), (1, ValueError("no"))], [(RuntimeError, "Conn"), (OtherRankFailed, "rank 0 failed: Runtime")]),
    ],
    ids=["one leaves", "both alike", "apart"],
)
def test_first_failure_is_what_the_others_say(monkeypatch, errors: list, raised: list) -> None:
    """The ranks of a group one after another, in the order in which they fail."""
    store = dist.HashStore()
    monkeypatch.setattr(symmetry, "_get_default_store", lambda: store)
    monkeypatch.setattr(symmetry, "_num_sections", itertools.repeat(0))
    for (rank, error), (kind, message) in zip(errors, raised, strict=True):
        accelerator = fake_accelerator(num_processes=2, process_index=rank)
        with pytest.raises(kind, match=message), ending_together(accelerator):
            raise error


def test_a_section_without_failure_leaves_no_thread(monkeypatch) -> None:
    monkeypatch.setattr(symmetry, "_get_default_store", dist.HashStore)
    before = threading.active_count()
    with ending_together(fake_accelerator(num_processes=2, process_index=0)):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
