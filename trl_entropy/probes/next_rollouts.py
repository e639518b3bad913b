"""The entropy change of a step, measured on the completions of the step after it, which training draws anyway."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine import PastUpdate
from trl_entropy.probes import model_checks
from trl_entropy.probes.entropy_change import EntropyChangeProbe
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions

logger = logging.getLogger(__name__)


class NextRolloutsProbe(EntropyChangeProbe):
    """
    As [`EntropyChangeProbe`], on completions of the next step: nothing is generated for the probe
    (`entropy_probe_completions="next_rollouts"`).

    Step s's update is made from its own completions, and the policy that results draws those of step s+1, of other
    prompts. Given both policies they are independent of the update: a probe batch for step s, weighted back (T6) to
    the policy from before it. They are what training really draws: of agents, with tools, by vLLM.

    The numbers of step s are known when step s+1 begins, and are logged with step s. No completions follow the last
    step: it is measured on held-out prompts, as [`EntropyProbe`] does, if the dataset has them.

    Within a generation that several steps use, an earlier policy drew the completions, and the weights are by its
    log-probabilities, as training has them. With `resample_uninformative_groups` E is the first draw, before any group
    is replaced. With `curriculum` it has the prompts that the curriculum chose for the next step.

    Memory between two steps: a copy of what this rank holds of the trained parameters, and with attribution one of
    their first moment. Checkpoints hold them too.

    Args:
        every, batch_size, prediction, placebo, attribution, precision, change_of, reward_attribution: see
            [`EntropyChangeProbe`].
        num_completions: completions in E over all processes, in whole prompt groups.
    """

    def __init__(
        self,
        every: int = 1,
        num_completions: int = 32,
        batch_size: int | None = None,
        placebo: bool = False,
        attribution: str = "none",
        prediction: str = "trapezoid",
        precision: str = "auto",
        change_of: Sequence[str] | None = None,
        reward_attribution: bool = False,
    ) -> None:
        super().__init__(every, batch_size, prediction, placebo, attribution, precision, change_of, reward_attribution)
        self.num_completions = num_completions

    @classmethod
    def from_config(cls, args: ProbeChecks) -> NextRolloutsProbe:
        return cls(num_completions=args.num_entropy_completions(), **cls.shared_settings(args))

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        what = "entropy_probe_completions='next_rollouts'"
        args.check_next_rollouts(self.num_completions)
        model_checks.check_full_distribution(args, model, what)
        model_checks.check_own_completions(model, what)
        model_checks.check_drawn_without_dropout(model, what)
        super().check_model(args, model)

    # ---- events

    def on_before_update(self, args, state, control, *, metrics, update, record, **kwargs: Any) -> None:
        record.keep_update(update, parts=self.attribution is not None)

    def on_after_update(self, args, state, control, *, metrics, engine, record, files, **kwargs: Any) -> None:
        metrics |= self._covariances.logged(engine.accelerator)
        files.write_rollouts(record.step, record.rollouts)

    def on_rollouts_drawn(
        self, args, state, control, *, metrics, drawn: RolloutBatch, record, engine, files, **kwargs: Any
    ) -> None:
        if record is None or record.kept is None or not self.wants(record.step):
            return
        chosen = rows_of_first_groups(drawn.prompt_index, self.num_completions // engine.accelerator.num_processes)
        completions, past = Completions.of(drawn).rows(chosen), PastUpdate.rebuilt(record.kept, engine)
        prompts = "all prompts" if args.curriculum == "none" else f"all prompts, drawn by {args.curriculum}"
        metrics |= self.measure(args, past, record, completions, engine, files, True, prompts)

    def on_no_more_rollouts(
        self, args, state, control, *, metrics, record, engine, sampler, files, **kwargs: Any
    ) -> None:
        if record.kept is None or not self.wants(record.step):
            return
        try:
            sampler.check_alike()
            completions = sampler.draw(self.num_completions, "held_out", record.step, "model", True)
        except ValueError as error:
            if state.is_world_process_zero:
                logger.warning(
                    "step %d, the last one, has no entropy change: no step follows whose completions could be "
                    "measured on, and %s",
                    record.step,
                    error,
                )
            return
        metrics |= self.measure(
            args, PastUpdate.rebuilt(record.kept, engine), record, completions, engine, files, drawn_after=True
        )


def rows_of_first_groups(prompt_index: Int[Tensor, " B"], num_rows: int) -> Int[Tensor, " n"]:
    """
    The rows of the first prompt groups that have at least `num_rows` rows together, or all rows.

    Args:
        prompt_index: number of each row's group; the rows of a group are next to one another.
    """
    if num_rows >= len(prompt_index):
        return torch.arange(len(prompt_index), device=prompt_index.device)
    _, sizes = torch.unique_consecutive(prompt_index, return_counts=True)
    ends = sizes.cumsum(0)
    return torch.arange(int(ends[ends >= num_rows][0]), device=prompt_index.device)
