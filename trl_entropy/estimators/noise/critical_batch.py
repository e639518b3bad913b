"""The critical batch: at how many prompts of a step more of them stop paying, from gains at several sizes."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trl_entropy.estimators.statistics.pooled import PooledParts, sum_over_prompts
from trl_entropy.estimators.statistics.student_t import student_t_quantile

# Values of B_crit that are tried: 0, a geometric series about the middle batch size, and infinity. Neighbours differ
# by 0.4 %, so that the estimate and the ends of its interval are right to that.
_WIDTH, _POINTS = 8.0, 4001


class CriticalBatch(NamedTuple):
    """
    B_crit of (T25) in prompts with its 95 % interval; `largest_gain` is dR_max, the gain of a step without noise.

    0: the gain does not depend on the number of prompts; infinite: it is proportional to it at these numbers. nan
    where there is no gain; an interval of nan: no B_crit at all agrees with the gains, or one seed tells no errors.
    """

    value: float
    low: float
    high: float
    largest_gain: float

    def gain(self, num_prompts: float) -> float:
        """dR(B) of a step of so many prompts, in the unit of the gains; nan where B_crit is infinite or nan."""
        return self.largest_gain / (1 + self.value / num_prompts)


def fit_critical_batch(
    gains: Float[Tensor, "S P"], num_prompts: Float[Tensor, "P"], confidence: float = 0.95
) -> CriticalBatch:
    """
    (T25): dR(B) = dR_max / (1 + B_crit/B) fitted to the gains of a step at P numbers of prompts B, by least squares.

    `gains` are those of S seeds, which are independent; gains of one seed need not be. The interval holds the B_crit
    that a t-test does not reject. With f the form at that B_crit, its test takes the contrast c of the P gains that is
    orthogonal to f and along f's derivative, whose expectation is 0 for any dR_max, so that mean_s c.g_s over its
    standard error is Student's t with S - 1 degrees of freedom, whatever the covariance of one seed's gains. As
    Fieller's it has no end where the data set it none. A bootstrap over few seeds covers less (see the test).
    Form: S. McCandlish et al. (2018, arXiv:1812.06162), equation 2.7.
    """
    gains, num_prompts = gains.double(), num_prompts.double()
    middle = num_prompts.log().mean().exp()
    tried = middle * torch.linspace(-_WIDTH, _WIDTH, _POINTS, dtype=torch.float64).exp()
    tried = torch.cat([tried.new_zeros(1), tried, tried.new_full((1,), math.inf)])
    share = 1 / (1 + middle / tried)  # 0 for B_crit = 0, 1 for an infinite one
    scale = num_prompts / ((1 - share)[:, None] * num_prompts + share[:, None] * middle)  # the form, 1 at the middle
    slope = scale.square() * (num_prompts - middle) / num_prompts
    along = scale @ gains.mean(0)
    explained = (along.square() / scale.square().sum(1)).where(along > 0, -math.inf)
    best = int(explained.argmax())
    if not math.isfinite(float(explained[best])):
        return CriticalBatch(*[math.nan] * 4)
    contrast = slope - scale * ((scale * slope).sum(1) / scale.square().sum(1))[:, None]
    kept = tried[_not_rejected(contrast @ gains.T, confidence)]
    low, high = (float(kept[0]), float(kept[-1])) if len(kept) else (math.nan, math.nan)
    at_middle = float(along[best] / scale[best].square().sum())
    largest = at_middle / float(1 - share[best]) if float(share[best]) < 1 else math.inf
    return CriticalBatch(float(tried[best]), low, high, largest)


def _not_rejected(values: Float[Tensor, "K S"], confidence: float) -> Bool[Tensor, "K"]:
    """Which of K numbers of a series a t-test over the seeds cannot tell from 0; none where there is one seed."""
    num_seeds, means = values.shape[1], values.mean(1)
    if num_seeds < 2:
        return torch.zeros(len(values), dtype=torch.bool)
    errors = values.std(1) / math.sqrt(num_seeds)
    kept = means.abs() <= student_t_quantile(0.5 + confidence / 2, num_seeds - 1) * errors
    through_0 = means[:-1].sign() != means[1:].sign()  # between two points, however small the errors are
    return kept | torch.nn.functional.pad(through_0, (0, 1)) | torch.nn.functional.pad(through_0, (1, 0))


def fit_at_best_rate(
    gains: Float[Tensor, "S C"], num_prompts: Float[Tensor, "C"], rates: Float[Tensor, "C"], confidence: float = 0.95
) -> CriticalBatch:
    """
    (T25): B_crit of steps at the best learning rate of each B, from gains at several learning rates of several B.

    Each seed's gains of C pairs of B and rate eta are fitted by a eta - (b + c/B) eta^2, to second order what a step
    of a fixed preconditioner gains; at its best eta that is (a^2 / 4b) / (1 + B_crit/B) with B_crit = c/b, the ratio
    of the means over seeds with Fieller's interval. `rates` are in units of any one rate. At least two B and two rates
    of one of them are needed (else nan); an infinite value: no curvature without noise was seen.
    """
    columns = torch.stack([rates, -rates.square(), -rates.square() / num_prompts], dim=1).double()
    if len(columns) < 3 or int(torch.linalg.matrix_rank(columns)) < 3:
        return CriticalBatch(*[math.nan] * 4)
    found = torch.linalg.lstsq(columns, gains.double().T).solution.T
    linear, curvature, noise = found.mean(0).tolist()
    if linear <= 0:
        return CriticalBatch(*[math.nan] * 4)
    bounds = math.nan, math.nan
    if len(gains) > 1:
        unit = torch.eye(3, dtype=torch.float64)
        bounds = PooledParts.of_step(sum_over_prompts(found)).ratio_interval(unit[2], unit[1], confidence)
    value = max(noise, 0.0) / curvature if curvature > 0 else math.inf
    largest = linear**2 / (4 * curvature) if curvature > 0 else math.inf
    low, high = (bound if math.isnan(bound) else max(bound, 0.0) for bound in bounds)
    return CriticalBatch(value, low, high, largest)
