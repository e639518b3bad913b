"""What a probe logs of a step's changes, for many quantities at once: one pass over the prompts' sums.

The numbers are those of [`step_change.step_changes`] and of `Linearization.estimate`, which take a quantity and a
change at a time and are what the tests compare with; here the replicates of the jackknife of all are rows of a tensor.
"""

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.delta_entropy import ratio_curvature, ratio_slope
from trl_entropy.estimators.entropy_change.step_change import PointTerms
from trl_entropy.estimators.statistics.estimate import Estimate

_Key = tuple[str, str]  # a kind of number, and which change it is of


class StepEstimates(NamedTuple):
    """The changes of one quantity by one step, each with the jackknife's error over prompts.

    `start` is the quantity before the step; `changes` are named as by `step_changes`; `errors` are the paired
    differences predicted - measured; `halves` the changes on every second prompt and on the others, or nothing with
    fewer than 4 prompts.
    """

    start: Estimate
    changes: dict[str, Estimate]
    errors: dict[str, Estimate]
    halves: tuple[dict[str, Estimate], ...]


def step_estimates(
    before: PointTerms, after: PointTerms, prompt_index: Int[Tensor, "B"], planned: PointTerms | None = None
) -> list[StepEstimates]:
    """(T7), (T8), (T10) of all quantities, in nats per token or in units of the quantity.

    Arguments as for `step_changes`; the terms of Q quantities are (B, Q). Those of one may be (B,).
    """
    points = [point for point in (before, after, planned) if point is not None]
    columns = torch.stack([column for point in points for part in point if part is not None for column in part], dim=1)
    columns = columns.view(*columns.shape[:2], -1)
    position = prompt_index.unique(return_inverse=True)[1]
    sizes = position.bincount()
    sums = columns.new_zeros(len(sizes), *columns.shape[1:]).index_add(0, position, columns)
    parts = [(sums, sizes)]
    if len(sizes) >= 4:
        parts += [(sums[parity::2], sizes[parity::2]) for parity in (0, 1)]
    found = [_estimates(*part, before, after, planned) for part in parts]
    return [_of_one(*(part[quantity] for part in found)) for quantity in range(columns.shape[2])]


def _of_one(whole: dict[_Key, Estimate], *halves: dict[_Key, Estimate]) -> StepEstimates:
    changes, errors = _of_kind(whole, "change"), _of_kind(whole, "error")
    return StepEstimates(whole["start", ""], changes, errors, tuple(_of_kind(half, "change") for half in halves))


def _of_kind(estimates: dict[_Key, Estimate], kind: str) -> dict[str, Estimate]:
    return {name: one for (its, name), one in estimates.items() if its == kind}


def _estimates(
    sums: Float[Tensor, "P K Q"],
    sizes: Int[Tensor, "P"],
    before: PointTerms,
    after: PointTerms,
    planned: PointTerms | None,
) -> list[dict[_Key, Estimate]]:
    """For each quantity its numbers by name, from the sums of a prompt's completions and their number."""
    total, size = sums.sum(0), sizes.sum()
    without = (total - sums) / (size - sizes)[:, None, None]
    means = torch.cat([(total / size)[None], without]).movedim(1, 0)
    values = _numbers(means, before, after, planned)
    table, num_prompts = torch.stack(list(values.values())), len(sizes)
    replicates = table[:, 1:]
    spread = (replicates - replicates.mean(1, keepdim=True)).square().sum(1)
    stderr = ((num_prompts - 1) / num_prompts * spread).sqrt()  # of one prompt 0 * nan
    *read, count = torch.cat([table[:, 0].flatten(), stderr.flatten(), size[None]]).tolist()
    found: list[dict[_Key, Estimate]] = [{} for _ in range(table.shape[2])]
    for place, (key, quantity) in enumerate(itertools.product(values, range(table.shape[2]))):
        stated = read[len(read) // 2 + place]
        found[quantity][key] = Estimate(read[place], stated, float(num_prompts - 1), int(count))
    return found


def _numbers(
    means: Float[Tensor, "K R Q"], before: PointTerms, after: PointTerms, planned: PointTerms | None
) -> dict[_Key, Float[Tensor, "R Q"]]:
    """The functions of means that `step_changes` linearizes, and the differences of the predictions and the first."""
    widths = [2 * sum(part is not None for part in point) for point in (before, after, planned or ())]
    first, second, plan = means.split(widths)
    start = first[0] / first[1]
    changes = {"measured": second[0] / second[1] - start}
    if len(first) > 2:
        changes["linear"] = ratio_slope(first)
    if len(first) > 2 and len(second) > 2:
        changes["trapezoid"] = (ratio_slope(first) + ratio_slope(second)) / 2
    if len(plan) == 6:
        changes["second_order"] = ratio_slope(plan) + ratio_curvature(plan) / 2
    numbers = {("start", ""): start} | {("change", name): change for name, change in changes.items()}
    measured = changes.pop("measured")
    return numbers | {("error", name): change - measured for name, change in changes.items()}
