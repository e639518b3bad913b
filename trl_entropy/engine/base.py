"""`Engine`: a reader that also tells when an update happens, and puts parameters into the model for scoring."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.attention import scored_attention
from trl_entropy.engine.context import UpdateContext
from trl_entropy.engine.parameters import evaluation_mode, swapped_parameters
from trl_entropy.engine.reader import EngineReader
from trl_entropy.engine.strict_float32 import fp32_strict


class Engine(EngineReader):
    """One way to train: tells when a step's gradient is complete and when the step is made, and reads both.

    Built by [`build_engine`]; its arguments are those of [`EngineReader`].
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        super().__init__(accelerator, model, optimizer, max_grad_norm)
        self._wants: Callable[[], bool] = lambda: False
        self._before_update: Callable[[UpdateContext], None] = lambda context: None
        self._after_update: Callable[[UpdateContext], None] = lambda context: None
        self._context: UpdateContext | None = None

    # ---- events

    def register(
        self,
        wants: Callable[[], bool],
        before_update: Callable[[UpdateContext], None],
        after_update: Callable[[UpdateContext], None],
    ) -> None:
        """Sets the two functions that every wanted step calls, on all ranks.

        Args:
            wants: asked once per step, when its gradient is complete; must be cheap and answer the same on all ranks.
                If not wanted, the step costs nothing.
            before_update: called then, before clipping and before the optimizer.
            after_update: called with the same context when the optimizer has stepped.
        """
        self._wants, self._before_update, self._after_update = wants, before_update, after_update

    @abc.abstractmethod
    def gradients_ready(self) -> None:
        """To be called after the backward of a step's last micro-batch (`accelerator.sync_gradients`)."""

    @abc.abstractmethod
    def update_done(self) -> None:
        """To be called after `optimizer.step()`: transformers' `on_optimizer_step`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Removes every hook that this engine has set."""

    def _begin_update(self) -> None:
        if self._context is not None:
            raise RuntimeError("a second update began before the first was done: call update_done() after each step")
        if self._wants():
            self._context = UpdateContext(self)
            self._before_update(self._context)

    def _end_update(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context._stepped()
            self._after_update(context)
            context._close()

    # ---- scoring

    @contextmanager
    def scoring_model(
        self,
        params: Mapping[str, Float[Tensor, "..."]],
        dtype: torch.dtype | None = torch.float32,
        differentiated: bool = True,
    ) -> Iterator[nn.Module]:
        """The unwrapped model with `params` in it and in evaluation mode, for scoring; afterwards all is as it was.

        Local, except that under ZeRO-3 and FSDP2 *entering* is collective, because frozen parameters are gathered:
        inside `rank_symmetric` enter it before anything else, and equally often on every rank.

        Differentiate with `torch.autograd.grad`, by `trainable_parameters(model)` looked up inside: `backward` would
        leave its gradients on parameters that no longer exist afterwards.

        Args:
            params: `context.params_before`, `context.params_after`, or any other values of theta.
            dtype: the dtype of everything in the model, with autocast and TF32 off, so that theta is scored as it is,
                with an attention that takes it (`scored_attention`). `None` rounds the values to each parameter's own
                dtype and leaves autocast and attention as training has them, which gives the bf16 model that training
                runs.
            differentiated: whether a backward pass differentiates by the parameters inside. If not, as where only
                `score` is called, with these `params`, an engine that slices parameters lets the device hold one of
                them at a time.
        """
        with contextlib.ExitStack() as undo:
            undo.enter_context(evaluation_mode(self.module))
            undo.enter_context(swapped_parameters(self.module, params, dtype))
            if dtype is not None:
                undo.enter_context(fp32_strict(self.module))
                undo.enter_context(scored_attention(self.module))
            yield self.module
