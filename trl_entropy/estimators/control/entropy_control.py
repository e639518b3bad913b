"""The smallest correction of a step that gives the entropy a wanted change, and which change to want at each step.

Of all steps that change the entropy by b to first order, d' = d + lambda M g is the nearest to the optimizer's step d
in the metric M^-1, with g = grad h, lambda = (b - g.d) / <g, g> and <x, y> = x'My (T19).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate, student_t_quantile

_LEAST_CROSS = 0.25  # smallest denominator, as a share of <g, g>, however noisy g is
_CERTAINTY = 0.999  # of the interval of the slope, two-sided
Vector = dict[str, Float[Tensor, "..."]]


class ControlProducts(NamedTuple):
    """The products that (T19) needs of the halves g_a, g_b of an estimate g = (g_a + g_b)/2, over all parameters.

    `change` is g.d in nats per token, `square` <g, g>, `cross` <g_a, g_b>, `step_square` d'M^-1 d over coordinates
    with M > 0, and `loss` <g_L, g> with the gradient g_L of the loss.
    """

    change: float
    square: float
    cross: float
    step_square: float
    loss: float

    @property
    def denominator(self) -> float:
        """<g, g> without its noise: the cross product of the independent halves, but at least a quarter of <g, g>."""
        return max(self.cross, _LEAST_CROSS * self.square)

    @property
    def noise_share(self) -> float:
        """The share of <g, g> that is noise of the estimate; 0/0: nan."""
        return 1 - self.cross / self.square if self.square else math.nan

    @property
    def price(self) -> float:
        """What a correction costs in loss per nat/token of entropy, to first order, <g_L, g> / <g, g>; 0/0: nan."""
        return self.loss / self.denominator if self.denominator else math.nan


def floored_metric(metric: Vector, floor: float) -> Vector:
    """M with sqrt(v_hat) + eps = 1/M at least `floor` times its mean over live coordinates (those with M > 0).

    Coordinates that hardly ever had a gradient have a huge M and would dominate <g, g> with their noise. `floor` = 0
    leaves M as it is.
    """
    if not floor:
        return metric
    sums = (torch.stack([(1 / m.double()).where(m > 0, 0.0).sum(), (m > 0).sum()]) for m in metric.values())
    inverse, count = sum(sums, torch.zeros((), dtype=torch.float64)).expand(2).tolist()
    if not count:
        return metric
    return {name: m.clamp(max=count / (floor * inverse)) for name, m in metric.items()}


def control_products(
    halves: tuple[Vector, Vector], step: Vector, metric: Vector, loss_gradient: Vector
) -> ControlProducts:
    """The products of (T19) in float64, from whole vectors by parameter name; `metric` is the diagonal of M."""
    g_a, g_b = halves
    sums = torch.zeros((), dtype=torch.float64)
    for name, m in metric.items():
        a, b, d, loss, m = (x.double() for x in (g_a[name], g_b[name], step[name], loss_gradient[name], m))
        g = (a + b) / 2
        inverse = torch.where(m > 0, 1 / m, 0.0)
        parts = (g * d, g * m * g, a * m * b, d * inverse * d, loss * m * g)
        sums = sums + torch.stack([part.sum() for part in parts])
    return ControlProducts(*sums.expand(5).tolist())


def crossed_change(
    halves: tuple[Vector, Vector], loss_a: Vector, loss_gradient: Vector, step: Vector, metric: Vector
) -> float:
    """(T19): g . d on the step's own completions, nats per token, without what each prompt does to itself.

    d contains -m g_L, with m = `metric` that of (T5) and the loss gradient g_L = L_a + L_b, whose halves are over the
    same prompts as g_a and g_b. In it g.m g_L is replaced by g_a.m L_b + g_b.m L_a. If the halves are independent this
    has the same expectation as for independent completions, given the rest of d and m.
    """
    g_a, g_b = halves
    change = torch.zeros((), dtype=torch.float64)
    for name, whole in loss_gradient.items():
        a, b, half, whole, d, m = (
            x.double() for x in (g_a[name], g_b[name], loss_a[name], whole, step[name], metric[name])
        )
        rest = (a + b) / 2 * (d + m * whole)
        change = change + (rest - m * (a * (whole - half) + b * half)).sum()
    return float(change)


@dataclass
class RunningHalves:
    """A running mean of grad h for each half: less noise, for a g that is in part a few steps old.

    `gradient_ema` is the weight of the past, in [0, 1); with 0 nothing is kept. As in Adam the mean is divided by
    the sum of its weights. The halves stay independent of each other, except that both depend on what earlier
    corrections did to theta.
    """

    gradient_ema: float
    sums: list[Vector] = field(default_factory=list)
    weight: float = 0.0

    def add(self, halves: tuple[Vector, Vector]) -> tuple[Vector, Vector]:
        """Add a step's halves, and return the running means of both. They are read only."""
        if not self.gradient_ema:
            return halves
        if not self.sums:
            self.sums = [{name: torch.zeros_like(value) for name, value in half.items()} for half in halves]
        self.weight = self.gradient_ema * self.weight + 1 - self.gradient_ema
        for total, half in zip(self.sums, halves, strict=True):
            for name, value in half.items():
                if total[name].device != value.device:  # a resumed run's sums come from a file, on the CPU
                    total[name] = total[name].to(value.device)
                total[name].lerp_(value, 1 - self.gradient_ema)
        first, second = ({name: value / self.weight for name, value in total.items()} for total in self.sums)
        return first, second

    def skip(self) -> None:
        """A step without halves: what is kept is a step older, and weighs less when the next ones are added."""
        self.weight = self.gradient_ema * self.weight
        for total in self.sums:
            for value in total.values():
                value.mul_(self.gradient_ema)


class Correction(NamedTuple):
    """lambda of (T19), the net change predicted with it in nats per token, whether the cap bound, and |c| / |d|."""

    multiplier: float
    predicted: float
    infeasible: bool
    relative_size: float


def correction(products: ControlProducts, target_change: float, floor: bool, cap: float) -> Correction:
    """(T19): lambda = (b - g.d) / <g, g>, with the noise-free denominator; `floor`: never below 0.

    `cap` bounds |lambda M g| by cap |d|, both in the metric M^-1; where it limits the correction the change is
    infeasible. The prediction uses the noise-free <g, g>, since the noise in the correction changes no entropy on
    average. If <g, g> = 0 there is no correction.
    """
    if products.denominator <= 0:
        short = target_change > products.change if floor else target_change != products.change
        return Correction(0.0, products.change, short, 0.0)
    wanted = (target_change - products.change) / products.denominator
    wanted = max(0.0, wanted) if floor else wanted
    length, step_length = math.sqrt(products.square), math.sqrt(products.step_square)
    most = cap * step_length / length
    multiplier = max(-most, min(most, wanted))
    size = abs(multiplier) * length / step_length if step_length else math.nan
    return Correction(multiplier, products.change + multiplier * products.denominator, multiplier != wanted, size)


@dataclass
class SetPoint:
    """The change that each step is to make so that the entropy goes to `target`; nats per token.

    b = clip(gain (target - h) - bias, +-max_change), where `bias` is a running mean, with weight `integral_gain`, of
    how much more the entropy changed than predicted. This is integral action: a constant error of the prediction
    leaves no offset from the target. There is no windup, since a change that the clip or the cap withheld is not
    in the prediction either.
    """

    target: float
    gain: float
    integral_gain: float = 0.1
    max_change: float = 0.02
    bias: float = 0.0

    def target_change(self, entropy: float) -> float:
        """b for a step that begins at this entropy."""
        wanted = self.gain * (self.target - entropy) - self.bias
        return max(-self.max_change, min(self.max_change, wanted))

    def sensitivity(self, entropy: float) -> float:
        """How much b falls per nat/token by which h was overestimated, now and one step ago; 0 where b is clipped."""
        return self.gain + self.integral_gain if abs(self.target_change(entropy)) < self.max_change else 0.0

    def learn(self, predicted: float, realised: float) -> None:
        """Update the bias with the change predicted for a step, correction included, and the change that it made."""
        self.bias += self.integral_gain * (realised - predicted - self.bias)


@dataclass
class PredictionCheck:
    """Whether the net changes are those predicted: slope of realised on predicted over the last steps, through 0.

    The realised change is the difference of two estimates of the entropy. A set-point asks for a change that depends
    on the first of them, so that prediction and realised change share its error; their covariance is known and is
    subtracted. The standard error of the slope is that of the entropies, or the scatter of the pairs where that is
    larger, since the noise of grad h changes the entropy too. The check has failed if the slope is below 1/2 or above
    2 with 99.9 % confidence, a high level because it is checked at every step; Student's t, n - 1 degrees of freedom.
    """

    window: int = 20
    pairs: list[tuple[float, float, float, float]] = field(default_factory=list)

    def add(self, predicted: float, realised: Estimate, shared: float = 0.0) -> None:
        """Add one step; `shared` is the covariance of the two errors. Only the last `window` steps are kept."""
        self.pairs = [*self.pairs, (predicted, realised.value, realised.stderr, shared)][-self.window :]

    def slope(self) -> tuple[float, float]:
        """Slope and its standard error; 0/0: nan."""
        squares = sum(p * p for p, _, _, _ in self.pairs)
        if squares == 0:
            return math.nan, math.nan
        slope = sum(p * value - shared for p, value, _, shared in self.pairs) / squares
        known = sum((p * stderr) ** 2 for p, _, stderr, _ in self.pairs)
        scatter = sum((p * value - shared - slope * p * p) ** 2 for p, value, _, shared in self.pairs)
        few = len(self.pairs) / (len(self.pairs) - 1) if len(self.pairs) > 1 else 1.0
        return slope, math.sqrt(max(known, few * scatter)) / squares

    def margin(self, confidence: float = 0.95) -> float:
        """Half the length of the slope's interval; nan for fewer than two pairs."""
        return student_t_quantile(0.5 + confidence / 2, len(self.pairs) - 1.0) * self.slope()[1]

    @property
    def failed(self) -> bool:
        """Whether a full window contradicts the predictions."""
        slope, margin = self.slope()[0], self.margin(_CERTAINTY)
        if len(self.pairs) < self.window or math.isnan(slope):
            return False
        return slope + margin < 0.5 or slope - margin > 2.0


def difference(later: Estimate, earlier: Estimate) -> Estimate:
    """The change between two independent estimates."""
    stderr = math.hypot(later.stderr, earlier.stderr)
    dof = min(later.dof, earlier.dof)
    return Estimate(later.value - earlier.value, stderr, dof, later.num_samples)


def mean_of(halves: tuple[Vector, Vector]) -> Vector:
    """(g_a + g_b)/2."""
    a, b = halves
    return {name: (a[name] + b[name]) / 2 for name in a}
