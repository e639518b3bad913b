"""The step rules (T5) of the optimizers whose metric is diagonal and known, one parameter at a time."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trl_entropy.estimators.optimizer.adamw import (
    AdamWSettings,
    UpdateParts,
    adamw_update_parts,
    gradient_coefficient,
    live_preconditioner,
    second_moment,
)
from trl_entropy.estimators.optimizer.step_rule import Group, State, StepRule, state_or_zeros


class AdamWRule(StepRule):
    """(T4): `torch.optim.AdamW`, and `Adam` without weight decay."""

    keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    metric_keys: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def why_not(self, group: Group) -> str:
        flags = [f"{flag}=True" for flag in ("amsgrad", "maximize") if group.get(flag)]
        coupled = group["weight_decay"] and not group.get("decoupled_weight_decay")
        return ", ".join([*flags, *(["its weight decay is added to the gradient"] if coupled else [])])

    def advanced(self, state: State, clipped: Tensor, param: Tensor, step: int, group: Group) -> State:
        before = state_or_zeros(state, "exp_avg_sq", clipped)
        return {"exp_avg_sq": second_moment(clipped, before, settings_of(group).betas[1])}

    def metric(self, state: State, like: Tensor, step: int, group: Group) -> Tensor:
        settings = settings_of(group)
        return live_preconditioner(state_or_zeros(state, "exp_avg_sq", like), step, settings.betas[1], settings.eps)

    def coefficient(self, step: int, group: Group, clip_factor: float = 1.0) -> float:
        return gradient_coefficient(settings_of(group), step, clip_factor)

    def momentum(self, state: State, metric: Tensor, step: int, group: Group) -> Tensor:
        settings = settings_of(group)
        beta1 = settings.betas[0]
        return -settings.lr * beta1 / (1 - beta1**step) * metric * state_or_zeros(state, "exp_avg", metric)

    def decay(self, param: Tensor, metric: Tensor, step: int, group: Group) -> Tensor:
        settings = settings_of(group)
        return -settings.lr * settings.weight_decay * param

    def parts(
        self,
        state: State,
        gradient: Tensor,
        param: Tensor,
        step: int,
        group: Group,
        clip_factor: float = 1.0,
    ) -> UpdateParts:
        exp_avg, exp_avg_sq = (state_or_zeros(state, key, gradient) for key in self.keys)
        return adamw_update_parts(param, gradient, exp_avg, exp_avg_sq, step, settings_of(group), clip_factor)


class AdamRule(AdamWRule):
    """`torch.optim.Adam` with weight decay, which is added to the gradient before the moments."""

    def why_not(self, group: Group) -> str:
        flags = [f"{flag}=True" for flag in ("amsgrad", "maximize") if group.get(flag)]
        decoupled = group["weight_decay"] and group.get("decoupled_weight_decay")
        return ", ".join([*flags, *(["some groups decouple their weight decay"] if decoupled else [])])

    def advanced(self, state: State, clipped: Tensor, param: Tensor, step: int, group: Group) -> State:
        return super().advanced(state, clipped + group["weight_decay"] * param, param, step, group)

    decay = StepRule.decay
    parts = StepRule.parts


class RMSpropRule(StepRule):
    """`torch.optim.RMSprop`, centred or not, with momentum or without."""

    keys = ("square_avg", "grad_avg", "momentum_buffer")
    metric_keys = ("square_avg", "grad_avg")

    def why_not(self, group: Group) -> str:
        return "maximize=True" if group.get("maximize") else ""

    def advanced(self, state: State, clipped: Tensor, param: Tensor, step: int, group: Group) -> State:
        gradient, alpha = clipped + group["weight_decay"] * param, group["alpha"]
        square = state_or_zeros(state, "square_avg", clipped) * alpha + (1 - alpha) * gradient.square()
        mean = state_or_zeros(state, "grad_avg", clipped).lerp(gradient, 1 - alpha)
        return {"square_avg": square, "grad_avg": mean}

    def metric(self, state: State, like: Tensor, step: int, group: Group) -> Tensor:
        square = state_or_zeros(state, "square_avg", like)
        about = square - state_or_zeros(state, "grad_avg", like).square() if group["centered"] else square
        return about.sqrt().add(group["eps"]).reciprocal().where(square != 0, 0.0)

    def coefficient(self, step: int, group: Group, clip_factor: float = 1.0) -> float:
        return float(group["lr"]) * clip_factor

    def momentum(self, state: State, metric: Tensor, step: int, group: Group) -> Tensor:
        return -float(group["lr"]) * group["momentum"] * state_or_zeros(state, "momentum_buffer", metric)


class AdagradRule(StepRule):
    """`torch.optim.Adagrad`."""

    keys = metric_keys = ("sum",)

    def why_not(self, group: Group) -> str:
        return "maximize=True" if group.get("maximize") else ""

    def advanced(self, state: State, clipped: Tensor, param: Tensor, step: int, group: Group) -> State:
        gradient = clipped + group["weight_decay"] * param
        return {"sum": state_or_zeros(state, "sum", clipped) + gradient.square()}

    def metric(self, state: State, like: Tensor, step: int, group: Group) -> Tensor:
        total = state_or_zeros(state, "sum", like)
        return total.sqrt().add(group["eps"]).reciprocal().where(total != 0, 0.0)

    def coefficient(self, step: int, group: Group, clip_factor: float = 1.0) -> float:
        return float(group["lr"]) / (1 + (step - 1) * group["lr_decay"]) * clip_factor


class SGDRule(StepRule):
    """`torch.optim.SGD`, with momentum (Nesterov's too) or without: the metric is 1."""

    keys = ("momentum_buffer",)
    counts_steps = False

    def why_not(self, group: Group) -> str:
        flags = ["maximize=True"] if group.get("maximize") else []
        if group["momentum"] and group["dampening"]:
            flags.append("dampening, which its first step leaves out")
        return ", ".join(flags)

    def advanced(self, state: State, clipped: Tensor, param: Tensor, step: int, group: Group) -> State:
        return {}

    def metric(self, state: State, like: Tensor, step: int, group: Group) -> Tensor:
        return torch.ones_like(like)

    def coefficient(self, step: int, group: Group, clip_factor: float = 1.0) -> float:
        return float(group["lr"]) * (1 + group["momentum"] * bool(group["nesterov"])) * clip_factor

    def momentum(self, state: State, metric: Tensor, step: int, group: Group) -> Tensor:
        power = 2 if group["nesterov"] else 1
        return -float(group["lr"]) * group["momentum"] ** power * state_or_zeros(state, "momentum_buffer", metric)


class AdafactorRule(StepRule):
    """
    transformers' `Adafactor`, factored or not, with its learning rate given. Its limit on the size of the step (the
    root mean square of M g is at most `clip_threshold`) is a number of the whole parameter and part of M.
    """

    keys = metric_keys = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")

    def why_not(self, group: Group) -> str:
        flags = ("relative_step", "scale_parameter", "warmup_init")
        given = [f"{flag}=True" for flag in flags if group.get(flag)]
        return ", ".join([*given, *(["beta1, which keeps steps in the place of gradients"] if group["beta1"] else [])])

    def advanced(self, state: State, clipped: Tensor, param: Tensor, step: int, group: Group) -> State:
        kept = 1.0 - step ** group["decay_rate"]
        square = clipped.square() + group["eps"][0]
        new: dict[str, Tensor] = {}
        means = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2} if clipped.ndim > 1 else {"exp_avg_sq": None}
        for key, dim in means.items():
            value = square if dim is None else square.mean(dim=dim)
            new[key] = state_or_zeros(state, key, value) * kept + (1 - kept) * value
        size = (self._unlimited(new) * clipped).square().mean().sqrt()
        return new | {"limit": (size / group["clip_threshold"]).clamp(min=1.0)}

    def metric(self, state: State, like: Tensor, step: int, group: Group) -> Tensor:
        if not set(state) & {"exp_avg_sq_row", "exp_avg_sq"}:
            return torch.zeros_like(like)
        least = 2 * group["eps"][0]  # what a square of 0 leaves
        if "exp_avg_sq" in state:
            live = state["exp_avg_sq"] > least
        else:
            live = (state["exp_avg_sq_row"] > least).unsqueeze(-1) & (state["exp_avg_sq_col"] > least).unsqueeze(-2)
        found = self._unlimited(state).where(live, 0.0)
        return found / state["limit"] if "limit" in state else found

    def coefficient(self, step: int, group: Group, clip_factor: float = 1.0) -> float:
        return float(group["lr"]) * clip_factor

    def decay(self, param: Tensor, metric: Tensor, step: int, group: Group) -> Tensor:
        return -float(group["lr"]) * group["weight_decay"] * param

    @staticmethod
    def _unlimited(state: State) -> Tensor:
        if "exp_avg_sq" in state:
            return state["exp_avg_sq"].rsqrt()
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        return (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def settings_of(group: Group) -> AdamWSettings:
    """Adam's settings of a parameter group."""
    betas = float(group["betas"][0]), float(group["betas"][1])
    return AdamWSettings(float(group["lr"]), betas, float(group["eps"]), float(group["weight_decay"]))
