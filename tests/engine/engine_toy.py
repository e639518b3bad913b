"""A model of a few numbers, and one training step of it as a trainer makes it."""

import torch
from torch import nn

from trl_entropy.engine import Engine


class Tied(nn.Module):
    """An embedding tied to the head, a frozen layer, a buffer: what a language model has, in a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((4,), 0.7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.frozen(self.embedding(ids)) * self.scale))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(IDS).float().log_softmax(-1)[..., 0].mean()


def make_step(engine: Engine, before=lambda context: None, after=lambda context: None, wanted: bool = True) -> None:
    engine.register(wants=lambda: wanted, before_update=before, after_update=after)
    loss_of(engine.module).backward()
    engine.gradients_ready()
    if engine.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.max_grad_norm)
    engine.optimizer.step()
    engine.update_done()
    engine.optimizer.zero_grad()
