"""`EngineReader`: what can be read of a step, and how each rank's share of the optimizer's state becomes whole."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.parameters import trainable_parameters
from trl_entropy.engine.step_rules import step_rule
from trl_entropy.estimators.optimizer.rules import AdamWRule
from trl_entropy.estimators.optimizer.step_rule import StepRule

# Of one parameter group, without its parameters. Values are what torch lets them be: numbers, pairs, flags.
GroupSettings = dict[str, Any]


class EngineReader(abc.ABC):
    """Reads gradient, moments, parameters and settings of the optimizer, by parameter name, under one way to train.

    A subclass says in `theta`, `local_gradient` and `local_moment` what *this rank* holds of a quantity (under ZeRO a
    flat share, or nothing), and in `assemble` how the shares become whole tensors; everything else follows from these.

    Args:
        accelerator: after `prepare`.
        model: as prepared (wrapped).
        optimizer: the torch optimizer that steps, without accelerate's and DeepSpeed's wrappers.
        max_grad_norm: of the clipping that is really applied; 0 means no clipping.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self.accelerator = accelerator
        self.module: nn.Module = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.parameters = trainable_parameters(self.module)

    # ---- what each way to train reads by itself

    @abc.abstractmethod
    def theta(self) -> dict[str, Tensor]:
        """This rank's share of the parameters that the optimizer updates: the live tensors, no copies."""

    @abc.abstractmethod
    def local_gradient(self) -> dict[str, Tensor]:
        """This rank's share of the reduced, accumulated, unclipped gradient: the live tensors, no copies."""

    @abc.abstractmethod
    def local_moment(self, key: str) -> dict[str, Tensor]:
        """This rank's share of a tensor in the optimizer's state, live; empty before the first step."""

    @abc.abstractmethod
    def assemble(self, shares: Mapping[str, Tensor], copy: bool = False) -> Mapping[str, Float[Tensor, "..."]]:
        """Whole float32 tensors from every rank's shares; zeros where no rank has a share. Collective.

        Where parameters are sliced (ZeRO-3, FSDP2) the tensors lie in main memory, once on each machine, and come to
        the device when they are read.

        Args:
            shares: by parameter name.
            copy: whether `shares` are live, so that the result must not share memory with them.
        """

    @abc.abstractmethod
    def grad_norm(self) -> float:
        """2-norm of the unclipped gradient as the engine computes it. Collective."""

    @abc.abstractmethod
    def param_groups(self) -> dict[str, GroupSettings]:
        """By parameter name, a copy of its group's settings (one for each group, without `params`)."""

    @abc.abstractmethod
    def step_counts(self) -> dict[str, int]:
        """By parameter name, the steps made, for every tensor that has state and a gradient now. Local."""

    @abc.abstractmethod
    def add_to_theta(self, change: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Adds whole tensors, equal on all ranks, to theta and to the model that computes with it. Collective.

        The optimizer's state stays as it is.
        """

    @property
    def has_float32_master(self) -> bool:
        """Whether theta is float32 or wider."""
        return all(torch.finfo(theta.dtype).bits >= 32 for theta in self.theta().values())

    def without_gradient(self) -> frozenset[str]:
        """Parameters that the optimizer's next step will not change."""
        return frozenset()

    def step_skipped(self) -> bool:
        """Whether the last step was dropped."""
        return False

    # ---- vectors over the parameters

    def dot(self, a: Mapping[str, Float[Tensor, "..."]], b: Mapping[str, Float[Tensor, "..."]]) -> float:
        """Inner product of two vectors over the trainable parameters, in float64. Collective.

        Today every rank holds whole tensors, so that none communicates; an engine that hands out shares adds the
        ranks' sums here.

        Args:
            a: by parameter name; the sum is taken in its order.
            b: by parameter name; must have all the names of `a`.
        """
        return float(sum((a[name].double() * b[name].double()).sum() for name in a))

    # ---- the optimizer

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer that steps."""
        return type(self.optimizer).__name__

    def moments(self, key: str) -> Mapping[str, Float[Tensor, "..."]]:
        """A tensor of the optimizer's state as it is now: `exp_avg`, `exp_avg_sq`. Collective.

        Before the first step it is zeros, from which Adam starts.

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

    @property
    def holds_whole_state(self) -> bool:
        """Whether every process has the optimizer's whole state, as in plain and DDP training."""
        return False

    def step_rule(self) -> StepRule:
        """
        How the optimizer's step is split (T5).

        Raises:
            ValueError: if that is not known, or needs more of the optimizer's state than this process has.
        """
        rule = step_rule(self.optimizer)
        if type(rule) is not AdamWRule and not self.holds_whole_state:
            raise ValueError(
                f"the state of {self.optimizer_name} is spread over processes, where only AdamW's steps can be split; "
                "use optim='adamw_torch_fused', or one process or DDP"
            )
        return rule

    def optimizer_state(self, keys: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """By parameter, copies of those of its tensors of these names that the optimizer has by now. Local."""
        raise NotImplementedError(f"{type(self).__name__} does not hold the optimizer's whole state")

    def num_steps_done(self) -> int:
        """Steps that the optimizer has made; 0 before the first. Local.

        Raises:
            ValueError: if the optimizer counts no steps, or not the same number for all parameters.
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
        """Raises `ValueError` unless the optimizer's rule is exactly equation (T4), that of AdamW."""
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


def unwrapped_optimizer(optimizer: object) -> object:
    """What is inside accelerate's wrappers: torch's optimizer or DeepSpeed's; None before there is one."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def torch_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrappers.

    Raises:
        TypeError: if there is none.
    """
    optimizer = unwrapped_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"the optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    return optimizer


def group_settings(groups: list[GroupSettings], names_by_group: list[list[str]]) -> dict[str, GroupSettings]:
    """By parameter name, a copy of its group's settings."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return {name: setting for setting, names in zip(settings, names_by_group, strict=True) for name in names}


def names_by_group(module: nn.Module, groups: list[list[nn.Parameter]]) -> list[list[str]]:
    """Names of the trainable parameters in each parameter group.

    Raises:
        ValueError: if a trainable parameter is in no group, so that no step would ever change it.
    """
    name_of = {id(param): name for name, param in trainable_parameters(module).items()}
    names = [[name_of[id(param)] for param in group if id(param) in name_of] for group in groups]
    if homeless := set(name_of.values()).difference(*names):
        raise ValueError(
            f"{len(homeless)} trainable parameters are in no parameter group of the optimizer, the first is "
            f"{min(homeless)!r}; freeze them (requires_grad_(False)) or let the optimizer have them"
        )
    return names
