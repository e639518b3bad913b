"""What a step did to the log-probabilities of the completions that it was trained on."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine import Engine, UpdateContext, rank_symmetric
from trl_entropy.estimators.attribution.likelihood import outcome_sums
from trl_entropy.estimators.entropy_change.whole_distribution import distribution_sums
from trl_entropy.gradients.scores import Params, TokenScores, score
from trl_entropy.probes import model_checks
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.change_metrics import RELATIVE_OUTCOMES


class LikelihoodProbe(Probe):
    """
    Scores the step's own completions before and after the step, in float32, and logs the mean change of the
    log-probability of a token in completions whose advantage is above 0 and below 0, in nats per token, and the share
    of the former whose log-probability fell.

    The numbers describe these completions, on which the step was trained, exactly; they estimate nothing for others,
    and so have no standard error. Completions of an advantage above 0 can become less likely by what they share with
    those below it (arXiv:2410.08847 for DPO, arXiv:2505.18830 for GRPO).

    The file of a step has the log-probability and the entropy at each token, before and after: the page shows their
    changes.

    Args:
        every: cadence in steps.
        batch_size: completions scored at a time, at most; None: as many as memory allows.
        distribution: also write what published formulas need of each token's whole distribution before the step
            (`distribution_sums`), from a third forward pass at half the temperature.
    """

    name = "likelihood"

    def __init__(self, every: int = 1, batch_size: int | None = None, distribution: bool = False) -> None:
        super().__init__(every)
        self.batch_size, self.distribution = batch_size, distribution

    @classmethod
    def from_config(cls, args: ProbeChecks) -> LikelihoodProbe:
        return cls(args.likelihood_probe_every, args.probe_batch_size, args.likelihood_probe_distribution)

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        model_checks.check_scoring(model, "likelihood_probe", derivatives=False)

    def on_after_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, record: StepRecord, files, **kwargs: Any
    ) -> None:
        completions = Completions.of(record.rollouts)
        before, after = (
            self._score(engine, completions, args.temperature, params)
            for params in (update.params_before, update.params_after)
        )
        changes = (after.logps[0].double() - before.logps[0].double()).where(completions.loss_mask.bool(), 0.0).sum(1)
        of_outcomes = outcome_sums(changes, completions.loss_mask.sum(1).double(), record.rollouts.raw_advantages)
        metrics |= _by_outcome(of_outcomes, engine.accelerator)
        files.write_rollouts(record.step, record.rollouts)
        scores = {
            f"{name}_{when}": getattr(end, name)[0]
            for name in ("logps", "entropy")
            for when, end in (("before", before), ("after", after))
        }
        if self.distribution:
            at_half = self._score(engine, completions, args.temperature / 2, update.params_before)
            sums = distribution_sums(before.logps[0], before.entropy[0], at_half.logps[0], at_half.entropy[0])
            own = completions.loss_mask.bool()
            scores |= {f"{name}_before": values.where(own, 0.0) for name, values in sums._asdict().items()}
        masks = {name: getattr(completions, name) for name in ("completion_mask", "loss_mask", "prompt_index")}
        files.write(self.name, record.step, masks | scores)

    def _score(self, engine: Engine, completions: Completions, temperature: float, params: Params) -> TokenScores:
        with (
            rank_symmetric(engine.accelerator, "scoring the likelihood probe's completions"),
            engine.scoring_model(params, differentiated=False) as model,
        ):
            return score(model, completions, temperature, self.batch_size, params)


def _by_outcome(sums: Float[Tensor, "3 2"], accelerator: Accelerator) -> dict[str, float]:
    """The metrics, from this rank's sums; none of what no completion is. Collective."""
    names = [f"likelihood/delta_{outcome}" for outcome in RELATIVE_OUTCOMES] + ["likelihood/falling_above_mean"]
    reduced = accelerator.reduce(sums, reduction="sum").tolist()
    return {name: part / whole for name, (part, whole) in zip(names, reduced, strict=True) if whole}
