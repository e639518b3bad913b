"""The precision of a probe's derivatives: a choice, with an error that is measured before it is made."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from trl_entropy.engine import Engine, tf32
from trl_entropy.estimators.statistics.estimate import Linearization
from trl_entropy.gradients.scores import Params, TokenScores, score
from trl_entropy.rollouts.completions import Completions

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "float32", "tf32")
NOISE_LIMIT = 0.1  # largest noise of TF32 that "auto" accepts, in standard errors of the first-order change


@dataclass
class DerivativePrecision:
    """
    Whether tangents and gradients are computed with products in TF32. Scores that are not differentiated, and so all
    measured differences, are float32 whatever the choice; so is the second order.

    With `"auto"` the first step that is measured computes the first-order change in both precisions, on the same
    completions. TF32 is taken if its noise is below [`NOISE_LIMIT`] of that change's standard error. The noise is the
    root of d^2 + s^2, with d the difference of the two and s its own standard error over prompts: d alone can be small
    by chance. Where the device has no TF32 nothing is measured, and all is float32.

    Attributes:
        wanted: `"auto"`, `"float32"` or `"tf32"`.
        chosen: what "auto" has chosen; None before that.
    """

    wanted: str = "float32"
    chosen: str | None = None
    has_warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.wanted not in PRECISIONS:
            raise ValueError(f"precision is {self.wanted!r}; use one of {', '.join(PRECISIONS)}.")

    def is_undecided(self, device: torch.device) -> bool:
        """Whether the next first-order change is to be compared with that in float32."""
        return self.wanted == "auto" and self.chosen is None and tf32.is_available(device)

    def products(self, device: torch.device) -> AbstractContextManager[None]:
        """A context for what is differentiated, to be entered with `engine.scoring_model`."""
        return tf32.products() if self._is_low(device) else nullcontext()

    def score(
        self,
        model: nn.Module,
        completions: Completions,
        temperature: float,
        batch_size: int | None,
        params: Params,
        direction: Params | None,
        order: int,
    ) -> TokenScores:
        """As [`~trl_entropy.gradients.scores.score`], with the first derivative in this precision."""
        given = model, completions, temperature, batch_size, params
        if order != 1 or not self._is_low(next(iter(params.values())).device):
            return score(*given, direction, order)
        with tf32.products():
            slopes = score(*given, direction, order)
        values = score(*given)
        return TokenScores((*values.entropy, *slopes.entropy[1:]), (*values.logps, *slopes.logps[1:]), values.experts)

    def decide(
        self,
        change_with: Callable[[DerivativePrecision], Linearization],
        prompt_index: Int[Tensor, " B"],
        accelerator: Accelerator,
    ) -> float | None:
        """
        Choose, and say so once; not yet where the step changes nothing, as the first of a warm-up. Collective.

        Args:
            change_with: the first-order change computed with a given precision, on the completions of all processes.
            prompt_index: of these.

        Returns:
            The noise of TF32 in standard errors of the first-order change: nan if there is no standard error, None if
            nothing was chosen.
        """
        exact, rounded = (change_with(DerivativePrecision(wanted)) for wanted in ("float32", "tf32"))
        moved, own = (rounded - exact).estimate(prompt_index), exact.estimate(prompt_index)
        size, stderr = torch.tensor([[math.hypot(moved.value, moved.stderr)], [own.stderr]], dtype=torch.float64)
        relative = (size / stderr).where(stderr != 0, -1.0).to(accelerator.device)
        noise = float(accelerator.gather(relative)[0])  # one process decides for all
        if noise < 0:
            return None
        self.chosen = "tf32" if noise < NOISE_LIMIT else "float32"
        if accelerator.is_main_process:
            logger.info(
                "entropy probe: the noise of TF32 is %.2g standard errors of the first-order change (limit %g), so "
                "that derivatives are computed in %s",
                noise, NOISE_LIMIT, "TF32" if self.chosen == "tf32" else "float32",
            )  # fmt: skip
        return noise

    def warn_if_without_effect(self, device: torch.device) -> None:
        """Say so, once, where TF32 is asked for and the device has none."""
        if self.wanted == "tf32" and not tf32.is_available(device) and not self.has_warned:
            self.has_warned = True
            logger.warning("probe_precision='tf32' has no effect on %s, which has no TF32: all is float32", device)

    def _is_low(self, device: torch.device) -> bool:
        chosen = self.chosen if self.wanted == "auto" else self.wanted
        return chosen == "tf32" and tf32.is_available(device)


def computes_below_float32(engine: Engine) -> bool:
    """Whether training computes below float32: under autocast, or with parameters of a narrower dtype."""
    narrow = any(param.is_floating_point() and param.itemsize < 4 for param in engine.module.parameters())
    return narrow or engine.accelerator.mixed_precision != "no"
