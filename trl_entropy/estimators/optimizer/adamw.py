"""The update of one AdamW step from gradient and moments, as a whole and in named parts, one parameter at a time."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class AdamWSettings:
    """The settings of one parameter group at one step; names and meanings of `torch.optim.AdamW`."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class UpdateParts(NamedTuple):
    """(T5): the parts of an update; their sum is the update. Units: those of the parameter."""

    momentum: Float[Tensor, "*shape"]
    weight_decay: Float[Tensor, "*shape"]
    gradient: Float[Tensor, "*shape"]


def adamw_moments(
    grad: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    betas: tuple[float, float],
    clip_factor: float = 1.0,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """(T4): the moments after the step, m' = b1 m + (1-b1) c g and v' = b2 v + (1-b2) c^2 g^2.

    `grad` is averaged over ranks and accumulation steps, and not clipped; `clip_factor` c is the factor that the
    engine applied. The arguments are not changed.
    """
    clipped = grad * clip_factor
    return exp_avg.lerp(clipped, 1 - betas[0]), second_moment(clipped, exp_avg_sq, betas[1])


def preconditioner(
    exp_avg_sq: Float[Tensor, "*shape"], step: int, beta2: float, eps: float
) -> Float[Tensor, "*shape"]:
    """M, the diagonal of the optimizer metric: 1 / (sqrt(v_hat) + eps) with v_hat = v / (1 - b2^t).

    `step` counts the updates in v: t after the step (T5), t - 1 before it (T16, T17). At 0 there is no M (nan).
    """
    return (exp_avg_sq / torch.tensor(1 - beta2**step, dtype=exp_avg_sq.dtype)).sqrt().add(eps).reciprocal()


def live_preconditioner(
    exp_avg_sq: Float[Tensor, "*shape"], step: int, beta2: float, eps: float
) -> Float[Tensor, "*shape"]:
    """(T13): `preconditioner`, but 0 where `exp_avg_sq` is 0: without any gradient so far 1/eps has no meaning.

    With `exp_avg_sq` from after the step this does not change the momentum and gradient parts, since both are 0 there
    (up to an underflow of squares). The zeros are the coordinates left out, as M > 0 elsewhere. A nan stays a nan.
    """
    return preconditioner(exp_avg_sq, step, beta2, eps).where(exp_avg_sq != 0, 0.0)


def gradient_coefficient(settings: AdamWSettings, step: int, clip_factor: float = 1.0) -> float:
    """(T5), (T9): lr c (1-b1) / (1-b1^t), by which -M g enters the update; `step` = t counts this step."""
    return settings.lr * clip_factor * (1 - settings.betas[0]) / (1 - settings.betas[0] ** step)


def adamw_update_parts(
    param: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    step: int,
    settings: AdamWSettings,
    clip_factor: float = 1.0,
) -> UpdateParts:
    """(T5): momentum -lr b1/(1-b1^t) M m, weight decay -lr wd theta, gradient -lr c (1-b1)/(1-b1^t) M g.

    All arguments are those *before* the step; `step` = t counts this step, so that it is 1 at the first. M is that of
    (T4), this step's gradient included. For the share g_i of one completion M must be held fixed: use `preconditioner`
    and `gradient_coefficient` for that.
    """
    beta1, beta2 = settings.betas
    exp_avg_sq_after = second_moment(grad * clip_factor, exp_avg_sq, beta2)
    metric = preconditioner(exp_avg_sq_after, step, beta2, settings.eps)
    return UpdateParts(
        momentum=-settings.lr * beta1 / (1 - beta1**step) * metric * exp_avg,
        weight_decay=-settings.lr * settings.weight_decay * param,
        gradient=-gradient_coefficient(settings, step, clip_factor) * metric * grad,
    )


def update_parts_after(
    param: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_after: Float[Tensor, "*shape"],
    exp_avg_sq_after: Float[Tensor, "*shape"],
    step: int,
    settings: AdamWSettings,
) -> UpdateParts:
    """(T5) as `adamw_update_parts`, from what the optimizer holds once the step is made.

    `param` and `exp_avg` are from before the step, the others from after it. The clipped gradient is what the first
    moment gained, (1-b1) c g = m' - b1 m, to within the rounding of m'.
    """
    beta1, beta2 = settings.betas
    metric = live_preconditioner(exp_avg_sq_after, step, beta2, settings.eps)
    scale = -settings.lr / (1 - beta1**step)
    return UpdateParts(
        momentum=scale * beta1 * metric * exp_avg,
        weight_decay=-settings.lr * settings.weight_decay * param,
        gradient=scale * metric * (exp_avg_after - beta1 * exp_avg),
    )


def adamw_update(
    param: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    step: int,
    settings: AdamWSettings,
    clip_factor: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """(T4): dtheta = -lr [ (m'/(1-b1^t)) / (sqrt(v'/(1-b2^t)) + eps) + wd theta ], arguments as in (T5).

    It agrees with the change that `torch.optim.AdamW` (amsgrad off) makes up to rounding. As float32 rounds
    theta + dtheta, the two may differ by a unit in the last place of theta.
    """
    return sum(adamw_update_parts(param, grad, exp_avg, exp_avg_sq, step, settings, clip_factor))


def gradient_metric(
    grad: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    step: int,
    settings: AdamWSettings,
    clip_factor: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """(T5), (T9): lr c (1-b1)/(1-b1^t) M of (T4), by which the share -g_i of each completion enters the update.

    M includes this step's `grad`; arguments as in `adamw_update_parts`. It is 0 where there never was a gradient, see
    `live_preconditioner`.
    """
    exp_avg_sq_after = second_moment(grad * clip_factor, exp_avg_sq, settings.betas[1])
    metric = live_preconditioner(exp_avg_sq_after, step, settings.betas[1], settings.eps)
    return gradient_coefficient(settings, step, clip_factor) * metric


def second_moment(
    clipped: Float[Tensor, "*shape"], exp_avg_sq: Float[Tensor, "*shape"], beta2: float
) -> Float[Tensor, "*shape"]:
    """v' = b2 v + (1-b2) (c g)^2."""
    return exp_avg_sq * beta2 + (1 - beta2) * clipped.square()
