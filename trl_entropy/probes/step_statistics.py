"""Entropy, KL and importance ratios of a step, summed over micro-batches and ranks from what its loss computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.attribution.turns import sums_by_category, turn_index
from trl_entropy.estimators.statistics.histogram import LogRatioHistogram
from trl_entropy.runs.change_metrics import TURNS

_QUANTILES = {"ratio/median": 0.5, "ratio/p90": 0.9, "ratio/p99": 0.99}


@dataclass
class StepStatistics:
    """
    Sums over the tokens of one optimizer step; ranks exchange only sums, counts, extrema and histograms.

    Every step has an instance of its own. All sums are float64.
    """

    device: torch.device
    sums: dict[str, Tensor] = field(default_factory=dict)
    log_ratios: LogRatioHistogram | None = None

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64, device=self.device)) + value

    def add_tokens(
        self,
        per_token_logps: Float[Tensor, "B T"],
        token_entropy: Float[Tensor, "B T"],
        log_ratio: Float[Tensor, "B T"] | None,
        mask: Int[Tensor, "B T"],
    ) -> None:
        """
        Add a micro-batch.

        Args:
            per_token_logps: log pi of the sampled tokens, nats.
            token_entropy: entropy of the next-token distribution, nats.
            log_ratio: log pi - log pi_old, nats; None on policy, where it is zero by definition.
            mask: 1 for the tokens that the loss counts.
        """
        self._add("tokens", mask.sum())
        self._add("entropy", (token_entropy.double() * mask).sum())
        self._add("surprisal", -(per_token_logps.double() * mask).sum())
        log_ratio = torch.zeros_like(per_token_logps) if log_ratio is None else log_ratio
        self._add("ratio", (log_ratio.double().exp() * mask).sum())
        histogram = self.log_ratios or LogRatioHistogram.empty(self.device)
        self.log_ratios = histogram.update(log_ratio, mask)

    def add_turns(self, token_entropy: Float[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> None:
        """Add a micro-batch's entropies by turn; `mask` is 1 for the policy's tokens, 0 between its turns."""
        index = turn_index(mask, len(TURNS) - 1)
        self._add("turns", sums_by_category(token_entropy, index, mask, len(TURNS)))

    def add_kl(
        self,
        per_token_logps: Float[Tensor, "B T"],
        start_per_token_logps: Float[Tensor, "B T"],
        mask: Int[Tensor, "B T"],
    ) -> None:
        """Add a micro-batch's KL to the start policy: exp(d) - d - 1, d = log pi_start - log pi (as TRL's `kl`)."""
        difference = start_per_token_logps.double() - per_token_logps.double()
        self._add("kl", ((torch.expm1(difference) - difference) * mask).sum())

    def add_chosen(self, chosen: Bool[Tensor, "B T"], covariances: Float[Tensor, "B T"]) -> None:
        """Add the tokens of a micro-batch that `token_control` has chosen, and their covariances."""
        self._add("chosen", chosen.sum())
        self._add("covariance", covariances.where(chosen, 0.0).sum())

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The step's metrics, equal on all ranks. Collective: every rank calls it once per step."""
        by_turn = self.sums.pop("turns", None)
        names = sorted(self.sums)
        totals = accelerator.reduce(torch.stack([self.sums[name] for name in names]), reduction="sum").tolist()
        total = dict(zip(names, totals, strict=True))
        tokens = total["tokens"] or math.nan  # without any token every mean is nan, and logged as such
        metrics = {
            "entropy/policy": total["entropy"] / tokens,
            "entropy/surprisal": total["surprisal"] / tokens,
            "ratio/mean": total["ratio"] / tokens,
        }
        if by_turn is not None:
            metrics |= means_logged("entropy/", TURNS, accelerator.reduce(by_turn, reduction="sum"))
        if "kl" in total:
            metrics["kl"] = total["kl"] / tokens
        if "chosen" in total:
            metrics["token_control/num_tokens"] = int(total["chosen"])
            if total["chosen"]:
                metrics["token_control/mean_covariance"] = total["covariance"] / total["chosen"]
        return metrics | self._ratio_quantiles(accelerator)

    def _ratio_quantiles(self, accelerator: Accelerator) -> dict[str, float]:
        histogram = _reduce_histogram(self.log_ratios or LogRatioHistogram.empty(self.device), accelerator)
        quantiles = {name: math.exp(histogram.quantile(q)) for name, q in _QUANTILES.items()}
        return {**quantiles, "ratio/max": math.exp(histogram.maximum.item())}


def means_logged(prefix: str, names: Sequence[str], sums: Float[Tensor, "2 C"]) -> dict[str, float]:
    """The mean of each category that has a token, from the sums of [`sums_by_category`] over all ranks."""
    return {
        f"{prefix}{name}": total / count for name, total, count in zip(names, *sums.tolist(), strict=True) if count
    }


def _reduce_histogram(histogram: LogRatioHistogram, accelerator: Accelerator) -> LogRatioHistogram:
    if accelerator.num_processes == 1:
        return histogram
    extrema = accelerator.gather(torch.stack([histogram.maximum, histogram.minimum]).unsqueeze(0))
    return LogRatioHistogram(
        counts=accelerator.reduce(histogram.counts, reduction="sum"),
        total=accelerator.reduce(histogram.total, reduction="sum"),
        maximum=extrema[:, 0].amax(),
        minimum=extrema[:, 1].amin(),
    )
