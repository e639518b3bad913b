"""The one place that knows how the optimizer's state is spread over ranks: plain, DDP, ZeRO-1 to ZeRO-3, FSDP2.

An [`Engine`] hands out one [`UpdateContext`] per optimizer step, the same under every kind of training: the gradient
before the step (rank-averaged, accumulated, unclipped), clip factor, moments, learning rates, and the true update
after it. It also puts other parameter values into the model for scoring, and ends all ranks together when one fails.

    engine = build_engine(accelerator, model_wrapped, optimizer, max_grad_norm=args.max_grad_norm)
    engine.register(wants=..., before_update=..., after_update=...)
    ...                          # after the backward of a step's last micro-batch:
    engine.gradients_ready()
    ...                          # after optimizer.step():
    engine.update_done()
    engine.close()
"""

from trl_entropy.engine.base import Engine
from trl_entropy.engine.build import build_engine
from trl_entropy.engine.context import UpdateContext
from trl_entropy.engine.parameters import (
    evaluation_mode,
    num_trainable,
    parameter_shape,
    snapshot_parameters,
    swapped_parameters,
    trainable_parameters,
)
from trl_entropy.engine.past_update import KeptUpdate, PastUpdate
from trl_entropy.engine.ranks import OtherRankFailed, ending_together, rank_symmetric
from trl_entropy.engine.reader import EngineReader

__all__ = [
    "Engine",
    "EngineReader",
    "KeptUpdate",
    "OtherRankFailed",
    "PastUpdate",
    "UpdateContext",
    "build_engine",
    "ending_together",
    "evaluation_mode",
    "num_trainable",
    "parameter_shape",
    "rank_symmetric",
    "snapshot_parameters",
    "swapped_parameters",
    "trainable_parameters",
]
