"""One thread, no hub: set before torch is imported by any test."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["real_run"]

# A busy machine is no failure: hypothesis' deadline of 200 ms a case would make it one.
settings.register_profile("any pace", deadline=None)
settings.load_profile("any pace")


@pytest.fixture(scope="module", autouse=True)
def collector_passes_over_what_is_loaded():
    """Every training ends with a full collection (accelerate's `free_memory`): 0.4 s, nearly all for modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def torch_draws_the_same_in_any_order():
    """Tests run in random order (pytest-randomly, which seeds Python's and numpy's random numbers and not torch's)."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def warm_start_dir() -> Path:
    """The embedded model after its warm start; built once per machine (about 35 s) and cached."""
    from trl_entropy.models.warm_start import warm_start

    return warm_start()
