"""An estimate with its standard error, and the delta method, by which functions of sample means get theirs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.statistics.student_t import student_t_quantile


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error, the degrees of freedom of that error, and how many samples went in.

    `num_samples` counts what the estimator takes: completions, groups or steps. Nothing is clamped; a stderr that
    could not be estimated is nan.
    """

    value: float
    stderr: float
    dof: float
    num_samples: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The two-sided Student t interval, value -+ t stderr; (nan, nan) without a stderr or degrees of freedom."""
        margin = student_t_quantile(0.5 + confidence / 2, self.dof) * self.stderr
        return self.value - margin, self.value + margin

    def as_dict(self) -> dict[str, float]:
        """`value`, `stderr`, and `low`, `high` of the 95 % interval."""
        low, high = self.interval()
        return {"value": self.value, "stderr": self.stderr, "low": low, "high": high}


@dataclass(frozen=True)
class Linearization:
    """The value of a smooth function of sample means, and the influence of every completion on it.

    influence_i is B times the first-order change of the value when completion i gets 1/B more weight. Its mean is
    zero, and the error of the value is mean_i influence_i up to O(1/B). `without_each` gives, for the prompt of every
    completion, the values without each prompt. Sums, differences and multiples of linearizations on the *same*
    completions are paired, so that `(predicted - measured).estimate(prompt_index)` has the standard error of the
    paired difference.
    """

    value: Float[Tensor, ""]
    influence: Float[Tensor, "B"]
    without_each: Callable[[Int[Tensor, "B"]], Float[Tensor, "P"]]

    def __add__(self, other: "Linearization") -> "Linearization":
        return Linearization(
            self.value + other.value,
            self.influence + other.influence,
            lambda prompt_index: self.without_each(prompt_index) + other.without_each(prompt_index),
        )

    def __sub__(self, other: "Linearization") -> "Linearization":
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> "Linearization":
        return Linearization(
            factor * self.value, factor * self.influence, lambda prompts: factor * self.without_each(prompts)
        )

    def estimate(self, prompt_index: Int[Tensor, "B"]) -> Estimate:
        """The value with its standard error by the jackknife over prompts, and P - 1 degrees of freedom.

        stderr^2 = (P-1)/P sum_p (v_-p - mean)^2, v_-p the value without prompt p. Completions of one prompt may depend
        on one another, but prompts must be independent. It is not too small where a few long prompts determine a
        ratio, as that of the influences is. nan for P < 2, and where nothing is left without some prompt.
        """
        values = self.without_each(prompt_index)
        num_prompts, num_completions = len(values), len(self.influence)
        if num_prompts < 2:
            return Estimate(float(self.value), math.nan, float(num_prompts - 1), num_completions)
        variance = (num_prompts - 1) / num_prompts * (values - values.mean()).square().sum()
        return Estimate(float(self.value), math.sqrt(variance), float(num_prompts - 1), num_completions)


def cluster_sums(values: Float[Tensor, "B *K"], cluster_index: Int[Tensor, "B"]) -> Float[Tensor, "P *K"]:
    """The sum of the values over each distinct cluster index, in float64, clusters in increasing order."""
    clusters, position = cluster_index.unique(return_inverse=True)
    sums = values.new_zeros(len(clusters), *values.shape[1:], dtype=torch.float64)
    return sums.index_add(0, position, values.double())


def delta_method(
    function: Callable[[Float[Tensor, "K"]], Float[Tensor, ""]], statistics: Float[Tensor, "B K"]
) -> Linearization:
    """A smooth function of the means of K per-completion statistics, linearized at those means.

    influence_i = grad f(mean) . (statistics_i - mean). Bias of the value: O(1/B) for a nonlinear f.
    Source: A. W. van der Vaart, Asymptotic Statistics, chapters 3 and 20.
    """
    statistics = statistics.detach().double()
    with torch.enable_grad():
        means = statistics.mean(0).requires_grad_()
        value = function(means)
        (gradient,) = torch.autograd.grad(value, means)

    def without_each(prompt_index: Int[Tensor, "B"]) -> Float[Tensor, "P"]:
        sums = cluster_sums(statistics, prompt_index)
        left = len(statistics) - cluster_sums(torch.ones_like(statistics[:, :1]), prompt_index)
        return torch.vmap(function)((sums.sum(0) - sums) / left)

    return Linearization(value.detach(), (statistics - means.detach()) @ gradient, without_each)
