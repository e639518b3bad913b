"""The entropy change of a step, measured on completions that are drawn for the purpose before it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine import KeptUpdate, PastUpdate
from trl_entropy.engine.optimizer_step import predicted_update
from trl_entropy.probes import model_checks
from trl_entropy.probes.clock import seconds
from trl_entropy.probes.entropy_change import EntropyChangeProbe
from trl_entropy.probes.next_rollouts import NextRolloutsProbe
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.rollout_entropy import RolloutEntropyProbe
from trl_entropy.rollouts.completions import Completions


class EntropyProbe(EntropyChangeProbe):
    """
    As [`EntropyChangeProbe`], on a probe batch E that is drawn before the step is made: the numbers are known with the
    step, the prediction to second order before it. [`from_config`] returns the probe for any source of completions.

    With dropout everything but (T11) is about the policy without it: E is drawn and scored in evaluation mode, and the
    update is the one that training made. The covariances are of training's own passes.

    Args:
        every, batch_size, prediction, placebo, attribution, precision, change_of, reward_attribution: see
            [`EntropyChangeProbe`].
        num_prompts: prompts in E over all processes, one completion each.
        second_order: predict to second order *before* the step, along the update that (T4) gives.
        source: `"held_out"` (training prompts that are not in this step) or `"eval"` (`eval_dataset`).
        sampler: `"model"` (the model's own `generate`, from its full distribution, whatever training samples from) or
            `"vllm"`, as training samples, corrected by vLLM's log-probabilities (T6).
        draw: called as `(step, rank) -> Completions` in place of sampling from the policy; must return equally many
            rows on every rank.
    """

    def __init__(
        self,
        every: int = 1,
        num_prompts: int = 64,
        batch_size: int | None = None,
        second_order: bool = False,
        placebo: bool = False,
        source: str = "held_out",
        sampler: str = "model",
        draw: Callable[[int, int], Completions] | None = None,
        attribution: str = "none",
        prediction: str = "trapezoid",
        precision: str = "auto",
        change_of: Sequence[str] | None = None,
        reward_attribution: bool = False,
    ) -> None:
        super().__init__(every, batch_size, prediction, placebo, attribution, precision, change_of, reward_attribution)
        self.num_prompts, self.source = num_prompts, source
        self.second_order, self.sampler, self.draw = second_order, sampler, draw

    @classmethod
    def from_config(cls, args: ProbeChecks) -> Probe:
        if args.entropy_probe_completions == "rollouts":
            return RolloutEntropyProbe.from_config(args)
        if args.entropy_probe_completions == "next_rollouts":
            return NextRolloutsProbe.from_config(args)
        return cls(
            num_prompts=args.num_entropy_completions(),
            second_order=args.entropy_second_order,
            source=args.entropy_probe_completions,
            sampler=args.entropy_probe_sampler,
            **cls.shared_settings(args),
        )

    @property
    def splits_steps(self) -> bool:
        return self.second_order or super().splits_steps

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        if self.draw is None and self.sampler == "vllm":
            model_checks.check_full_distribution(args, model, "entropy_probe_sampler='vllm'")
        super().check_model(args, model)

    # ---- events

    def on_before_update(self, args, state, control, *, metrics, update, engine, sampler, **kwargs: Any) -> None:
        step, rank, device = state.global_step + 1, engine.accelerator.process_index, engine.accelerator.device
        start = seconds(device)
        draw = self.draw or (lambda step, _: sampler.draw(self.num_prompts, self.source, step, self.sampler, True))
        self._drawn = draw(step, rank)
        metrics["time/entropy_draw"] = seconds(device) - start
        self._second_order = None
        if self.second_order:
            self._completions = self._drawn
            scores = self._score(engine, args, update.params_before, predicted_update(update), order=2)
            self._second_order = self._terms(scores, scores, engine.accelerator)
        self._kept = None
        if self.attribution is not None:
            self._kept = KeptUpdate.of(update, parts=True)

    def on_after_update(self, args, state, control, *, metrics, update, engine, record, files, **kwargs: Any) -> None:
        past = PastUpdate.of(update, self._kept, engine)
        self._kept = None
        metrics |= self.measure(args, past, record, self._drawn, engine, files)
        metrics |= self._covariances.logged(engine.accelerator)
        files.write_rollouts(record.step, record.rollouts)
