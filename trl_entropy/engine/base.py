"""`Engine`: when an update happens, and how one rank's share of the optimizer's state becomes whole tensors."""

import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.context import UpdateContext
from trl_entropy.engine.parameters import (
    evaluation_mode,
    swapped_parameters,
    trainable_parameters,
)
from trl_entropy.engine.strict_float32 import fp32_strict


class Engine(abc.ABC):
    """One way to train: tells when a step's gradient is complete and when it is made, and reads its ingredients.

    Built by [`build_engine`]. A subclass says in `theta`, `local_gradient`, `local_moment` what *this rank* holds of a
    quantity, by parameter name (a flat share under ZeRO, nothing where it holds none), and in `assemble` how shares
    become whole tensors; everything else follows.

    Args:
        accelerator: after `prepare`.
        model: as prepared (wrapped).
        optimizer: the torch optimizer that steps, out of its wrappers.
        max_grad_norm: of the clipping that is really applied; 0 is off.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self.accelerator = accelerator
        self.module: nn.Module = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.parameters = trainable_parameters(self.module)
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
        """Takes every hook out again."""

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
        self, params: Mapping[str, Float[Tensor, "..."]], dtype: torch.dtype | None = torch.float32
    ) -> Iterator[nn.Module]:
        """The unwrapped model with `params` in it and in evaluation mode, for scoring; afterwards all is as it was.

        Local, except that under ZeRO-3 *entering* is collective (frozen parameters are gathered): in `rank_symmetric`
        enter it first, and as often on every rank.

        Differentiate with `torch.autograd.grad`, by `trainable_parameters(model)` looked up inside: `backward` would
        leave its gradients on parameters that are gone afterwards.

        Args:
            params: `context.params_before`, `context.params_after`, or any other values of theta.
            dtype: everything in the model has it, autocast and TF32 are off: theta as float32 has it. `None`: the
                values are rounded into each parameter's own dtype and autocast stays as training has it, which gives
                the bf16 model that training runs.
        """
        precision = nullcontext() if dtype is None else fp32_strict(self.module)
        with evaluation_mode(self.module), swapped_parameters(self.module, params, dtype), precision:
            yield self.module

    # ---- what an engine can read

    @abc.abstractmethod
    def theta(self) -> dict[str, Tensor]:
        """What the optimizer updates, live: this rank's share."""

    @abc.abstractmethod
    def local_gradient(self) -> dict[str, Tensor]:
        """This rank's share of the reduced, accumulated, unclipped gradient, live."""

    @abc.abstractmethod
    def local_moment(self, key: str) -> dict[str, Tensor]:
        """This rank's share of a tensor in the optimizer's state, live; empty before the first step."""

    @abc.abstractmethod
    def assemble(self, shares: Mapping[str, Tensor], copy: bool = False) -> dict[str, Float[Tensor, "..."]]:
        """Whole float32 tensors from every rank's shares; zeros where no rank has any. Collective.

        Args:
            shares: by parameter name.
            copy: whether `shares` are live, so that the result must not alias them.
        """

    @abc.abstractmethod
    def grad_norm(self) -> float:
        """2-norm of the unclipped gradient as the engine computes it. Collective."""

    @abc.abstractmethod
    def param_groups(self) -> dict[str, dict[str, Any]]:
        """By parameter name, a copy of its group's settings (one per group, without `params`)."""

    @abc.abstractmethod
    def step_counts(self) -> dict[str, int]:
        """Steps made, for every tensor that has state and a gradient now. Local."""

    @abc.abstractmethod
    def add_to_theta(self, change: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Adds whole tensors, equal on all ranks, to theta and to the model that computes with it. Collective.

        The optimizer's state is left alone.
        """

    @property
    def has_float32_master(self) -> bool:
        """Whether theta is float32 or wider."""
        return all(torch.finfo(theta.dtype).bits >= 32 for theta in self.theta().values())

    def without_gradient(self) -> frozenset[str]:
        """Parameters that the optimizer will leave alone."""
        return frozenset()

    def step_skipped(self) -> bool:
        """Whether the last step was dropped."""
        return False

    # ---- the optimizer

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer that steps."""
        return type(self.optimizer).__name__

    def moments(self, key: str) -> dict[str, Float[Tensor, "..."]]:
        """A tensor of the optimizer's state as it is now: `exp_avg`, `exp_avg_sq`. Collective.

        Before the first step zeros, from which Adam starts.

        Raises:
            ValueError: if the optimizer keeps no such tensor.
        """
        states = self.optimizer.state.values()
        if any(states) and not any(key in state for state in states):
            known = sorted({name for state in states for name in state})
            raise ValueError(f"{self.optimizer_name} keeps {known}, no {key!r}; use an Adam optimizer, as adamw_torch")
        if not any(states) and not isinstance(self.optimizer, torch.optim.Adam):
            raise ValueError(
                f"before its first step nothing is known about the state of {self.optimizer_name}; "
                "only torch's Adam and AdamW are known to start from moments of zero"
            )
        return self.assemble(self.local_moment(key), copy=True)

    def num_steps_done(self) -> int:
        """Steps the optimizer has made; 0 before the first. Local.

        Raises:
            ValueError: if it keeps no count, or not one count.
        """
        states = self.optimizer.state.values()
        if any(states) and not any("step" in state for state in states):
            raise ValueError(f"{self.optimizer_name} counts no steps; use an Adam optimizer, as adamw_torch")
        counts = self.step_counts()
        if len(set(counts.values())) > 1:
            fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            raise ValueError(
                f"{fewest!r} has made {counts[fewest]} steps and {most!r} {counts[most]}: some steps gave it no "
                "gradient, and (T4) needs one t for all; freeze the parameters that are not always used"
            )
        return next(iter(counts.values()), 0)

    def check_adamw(self) -> None:
        """Raises `ValueError` unless the optimizer's rule is (T4) as it stands."""
        is_torchs = type(self.optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        reasons = [] if is_torchs else [f"it is {type(self.optimizer).__module__}.{self.optimizer_name}"]
        for group in self.optimizer.param_groups:
            reasons += [f"{flag}=True" for flag in ("amsgrad", "maximize") if group.get(flag)]
            if is_torchs and group["weight_decay"] and not group["decoupled_weight_decay"]:
                reasons.append("its weight decay is added to the gradient")
        if reasons:
            raise ValueError(
                f"the update is not that of AdamW, equation (T4): {', '.join(sorted(set(reasons)))}; "
                "use optim='adamw_torch' or 'adamw_torch_fused'"
            )


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrappers.

    Raises:
        TypeError: if there is none.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"the optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    return optimizer


def group_settings(groups: list[dict[str, Any]], names_by_group: list[list[str]]) -> dict[str, dict[str, Any]]:
    """By parameter name, a copy of its group's settings."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return {name: setting for setting, names in zip(settings, names_by_group, strict=True) for name in names}
