"""`UpdateContext`: what one optimizer step is made of, the same under every engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.engine.reader import EngineReader, GroupSettings
from trl_entropy.estimators.optimizer.rules import AdamWRule
from trl_entropy.estimators.optimizer.step_rule import StepRule

Option = TypeVar("Option")
_PHASES = {"before": "in `before_update`", "after": "in `after_update`", "closed": "after `after_update` returned"}


def _read_once(*phases: str) -> Callable[[Callable[[UpdateContext], object]], property]:
    """A property that is computed on first access, in one of `phases` only, and kept."""

    def decorate(read: Callable[[UpdateContext], object]) -> property:
        @functools.wraps(read)
        def get(self: UpdateContext) -> object:
            if read.__name__ not in self._values:
                self._require(read.__name__, phases)
                self._values[read.__name__] = read(self)
            return self._values[read.__name__]

        return property(get)

    return decorate


class Differences(Mapping[str, Tensor]):
    """This rank's shares of dtheta, each made when it is read, so that no further copy of theta's share is held."""

    def __init__(self, after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        self._after, self._before = after, before

    def __getitem__(self, name: str) -> Tensor:
        return wide(self._after[name].detach()) - wide(self._before[name])

    def __contains__(self, name: object) -> bool:
        return name in self._after

    def __iter__(self) -> Iterator[str]:
        return iter(self._after)

    def __len__(self) -> int:
        return len(self._after)


class UpdateContext:
    """Everything about one optimizer step, read when it is asked for and then kept.

    theta is what the optimizer updates: the float32 parameters, or under ZeRO with bf16 their float32 master
    (`has_float32_master`). Dictionaries are by the names of `accelerator.unwrap_model(model).named_parameters()`, the
    trainable ones only, and hold whole tensors of the parameter's shape, equal on all ranks, float32 (float64 for a
    float64 model). All probes get the same tensors: do not write into them. Under ZeRO-3 and FSDP2 they lie in the
    machine's main memory, and one comes to the device when it is read by name.

    *Collective* (every rank must read it, in the same order, and never inside `rank_symmetric`): `gradient`,
    `grad_norm`, `clip_factor`, `exp_avg`, `exp_avg_sq`, `params_before`, `params_after`, `update`. Everything else
    is local. Plain and DDP training communicate nothing for any of them, but code that relies on that hangs under
    ZeRO.

    What belongs to the state before the step must first be read in `before_update`, because the step overwrites it;
    what belongs to the state after it, in `after_update`. `params_before` can be read in both.

    Raises:
        RuntimeError: on reading something too early or too late.
    """

    def __init__(self, engine: EngineReader) -> None:
        self._engine = engine
        self._phase = "before"
        self._values: dict[str, object] = {}
        # Only what this rank holds of theta: under ZeRO a share, assembled if somebody asks.
        self._theta_before = {name: theta.detach().clone() for name, theta in engine.theta().items()}
        self._groups = engine.param_groups()
        self._correction: dict[str, Tensor] = {}

    # ---- before the step

    @_read_once("before")
    def gradient(self) -> Mapping[str, Float[Tensor, "..."]]:
        """g of (T4): averaged over ranks, summed over accumulation, before clipping. Collective.

        Zeros for the parameters in `without_gradient`.
        """
        return self._engine.assemble(self._engine.local_gradient(), copy=True)

    @_read_once("before")
    def without_gradient(self) -> frozenset[str]:
        """Parameters that got no gradient and that the optimizer therefore leaves as they are, decay included.

        Empty under ZeRO, which gives them a gradient of zero and steps them.
        """
        return self._engine.without_gradient()

    @_read_once("before")
    def grad_norm(self) -> float:
        """|g|, the 2-norm of the gradient of all parameters, before clipping. Collective."""
        return self._engine.grad_norm()

    @_read_once("before")
    def clip_factor(self) -> float:
        """
        c of (T4): min(1, max_norm / (|g| + 1e-6)), or 1 with clipping off; nan if |g| is. Collective.

        |g| is the engine's `grad_norm`, which under every ZeRO stage adds up the ranks' slices; max_norm is that of
        the training arguments, under DeepSpeed its own `gradient_clipping`.
        """
        max_norm, norm = self._engine.max_grad_norm, torch.tensor(self.grad_norm, dtype=torch.float32)
        return float(torch.clamp(max_norm / (norm + 1e-6), max=1.0)) if max_norm > 0 else 1.0

    @_read_once("before")
    def exp_avg(self) -> Mapping[str, Float[Tensor, "..."]]:
        """m of (T4) before the step; zeros before the first, which is what Adam starts from. Collective."""
        return self._engine.moments("exp_avg")

    @_read_once("before")
    def exp_avg_sq(self) -> Mapping[str, Float[Tensor, "..."]]:
        """v of (T4) before the step; zeros before the first: (T4) holds, but M of (T16) is undefined. Collective."""
        return self._engine.moments("exp_avg_sq")

    @_read_once("before")
    def optimizer_step(self) -> int:
        """t of (T4), this step included: 1 at the first. From the optimizer's state, so it survives a resume.

        Raises:
            ValueError: if the optimizer keeps no step count, or not the same one for all parameters with a gradient.
        """
        return self._engine.num_steps_done() + 1

    # ---- the settings of this step, readable at any time

    @property
    def rule(self) -> StepRule:
        """How the step is split (T5). Raises `ValueError` if that is not known of the optimizer."""
        if "rule" not in self._values:
            self._values["rule"] = self._engine.step_rule()
        return self._values["rule"]  # type: ignore[return-value]

    @property
    def step_of_rule(self) -> int:
        """The number of this step, 1 at the first; also 1 for a rule that does not depend on it."""
        return self.optimizer_step if self.rule.counts_steps else 1

    @property
    def options(self) -> Mapping[str, GroupSettings]:
        """By parameter name, the settings of its parameter group as they were for this step."""
        return self._groups

    def optimizer_state(self, keys: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """
        By parameter, those of these tensors of the optimizer's state before the step that are there by then; to be
        asked for first in `before_update`. Collective.
        """
        if type(self.rule) is AdamWRule:  # which is read from any engine
            moments = {key: getattr(self, key) for key in keys}
            return {name: {key: moments[key][name] for key in keys} for name in self._groups}
        if "own_state" not in self._values:
            self._require("optimizer_state", ("before",))
            self._values["own_state"] = self._engine.optimizer_state(self.rule.keys)
        own: dict[str, dict[str, Tensor]] = self._values["own_state"]  # type: ignore[assignment]
        return {name: {key: state[key] for key in keys if key in state} for name, state in own.items()}

    @property
    def learning_rate(self) -> dict[str, float]:
        """lr of (T4), by parameter name."""
        return self._option("lr", float)

    @property
    def weight_decay(self) -> dict[str, float]:
        """wd of (T4), by parameter name. HF puts biases and norms in a group without decay."""
        return self._option("weight_decay", float)

    @property
    def betas(self) -> dict[str, tuple[float, float]]:
        """(b1, b2) of (T4), by parameter name."""
        return self._option("betas", lambda betas: (float(betas[0]), float(betas[1])))

    @property
    def eps(self) -> dict[str, float]:
        """eps of (T4), by parameter name."""
        return self._option("eps", float)

    @property
    def has_float32_master(self) -> bool:
        """Whether theta is float32 (or wider). If not, the model was loaded in bf16 and its weights are theta."""
        return self._engine.has_float32_master

    def check_adamw(self) -> None:
        """Raises `ValueError` unless the optimizer's rule is (T4) as it stands."""
        self._engine.check_adamw()

    # ---- before and after

    @_read_once("before", "after")
    def params_before(self) -> Mapping[str, Float[Tensor, "..."]]:
        """theta before the step. Collective."""
        return self._engine.assemble(self._theta_before)

    @_read_once("after")
    def params_after(self) -> Mapping[str, Float[Tensor, "..."]]:
        """theta after the step. Collective."""
        return self._engine.assemble(self._engine.theta(), copy=True)

    @_read_once("after")
    def update(self) -> Mapping[str, Float[Tensor, "..."]]:
        """dtheta, the true change: `params_after - params_before` in float32, whatever the optimizer. Collective.

        float32 itself rounds theta + dtheta: an equation for dtheta agrees within a unit in the last place of theta.
        """
        return self._engine.assemble(Differences(self._engine.theta(), self._theta_before))

    @_read_once("after")
    def step_skipped(self) -> bool:
        """Whether the engine dropped the step, so that `update` is 0.

        DeepSpeed does if a gradient is not finite. Plain and DDP training make the step, and theta is nan.
        """
        return self._engine.step_skipped()

    # ---- this rank's shares, for what is measured when the step is over

    def shares_before(self) -> dict[str, Tensor]:
        """This rank's share of theta before the step, which may be kept: nothing writes into it. Local."""
        return self._theta_before

    def shares_of_moment(self, key: str) -> dict[str, Tensor]:
        """Copies of this rank's share of a moment before the step, none before the first. Local."""
        self._require(key, ("before",))
        return {name: share.detach().clone() for name, share in self._engine.local_moment(key).items()}

    # ---- changing the step

    @property
    def correction(self) -> Mapping[str, Float[Tensor, "..."]]:
        """What `correct` added to the optimizer's step; empty if nothing."""
        return self._correction

    def correct(self, change: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Changes the parameters without changing the optimizer's state, once, in `after_update`. Collective.

        From then on `update` and `params_after` are those of step and correction together.

        Args:
            change: by parameter name, all trainable ones, equal on all ranks.

        Raises:
            RuntimeError: at another time, or a second time.
            ValueError: if theta is narrower than float32, so that rounding would lose most of the change.
        """
        if self._phase != "after" or self._correction:
            raise RuntimeError("`correct` is called once for a step, in `after_update`")
        if not self.has_float32_master:
            raise ValueError(
                "a correction of the step needs float32 parameters, and these are of a narrower type: load the model "
                "with dtype='float32' (bf16=True computes in bf16 all the same), or use DeepSpeed"
            )
        self._engine.add_to_theta(change)
        self._correction = dict(change)
        for name in ("update", "params_after"):
            self._values.pop(name, None)

    # ---- bookkeeping

    def _option(self, key: str, convert: Callable[..., Option]) -> dict[str, Option]:
        for name, group in self._groups.items():
            if key not in group:
                raise ValueError(
                    f"{self._engine.optimizer_name} has no {key!r} (parameter {name!r}); use an Adam optimizer"
                )
        return {name: convert(group[key]) for name, group in self._groups.items()}

    def _require(self, name: str, phases: tuple[str, ...]) -> None:
        if self._phase not in phases:
            raise RuntimeError(
                f"`{name}` was first asked for {_PHASES[self._phase]}; "
                f"read it {' or '.join(_PHASES[phase] for phase in phases)}"
            )

    def _stepped(self) -> None:
        self._phase = "after"

    def _close(self) -> None:
        self._phase = "closed"
        self._theta_before, self._correction = {}, {}


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or wider if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
