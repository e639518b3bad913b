from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from engine_toy import Tied

from trl_entropy.engine import Engine, build_engine


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


@pytest.fixture
def accelerate_to() -> Iterator:
    """accelerate_to(**kwargs): an Accelerator on the CPU; its process-wide state is gone afterwards."""

    def build(**kwargs) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **kwargs)

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def built(accelerate_to, model: Tied):
    """built(optimizer class, **settings): an engine on a plain model, with its optimizer."""

    def build(optimizer_class: type = torch.optim.AdamW, max_grad_norm: float = 1.0, **settings) -> Engine:
        accelerator = accelerate_to()
        params = [param for param in model.parameters() if param.requires_grad]
        prepared = accelerator.prepare(model, optimizer_class(params, **{"lr": 0.1, **settings}))
        return build_engine(accelerator, *prepared, max_grad_norm=max_grad_norm)

    return build
