"""Which step rule (T5) an optimizer has, and why another has none."""

from __future__ import annotations

import torch

from trl_entropy.estimators.optimizer.known import why_none
from trl_entropy.estimators.optimizer.quantised import QuantisedAdamWRule
from trl_entropy.estimators.optimizer.rules import (
    AdafactorRule,
    AdagradRule,
    AdamRule,
    AdamWRule,
    RMSpropRule,
    SGDRule,
)
from trl_entropy.estimators.optimizer.step_rule import StepRule

# By module and class, so that transformers is not imported to know its own; the first that holds is taken.
_RULES: dict[str, tuple[StepRule, ...]] = {
    "torch.optim.adamw.AdamW": (AdamWRule(),),
    "torch.optim.adam.Adam": (AdamWRule(), AdamRule()),
    "torch.optim.rmsprop.RMSprop": (RMSpropRule(),),
    "torch.optim.adagrad.Adagrad": (AdagradRule(),),
    "torch.optim.sgd.SGD": (SGDRule(),),
    "transformers.optimization.Adafactor": (AdafactorRule(),),
    "bitsandbytes.optim.adamw.AdamW": (QuantisedAdamWRule(),),
    "bitsandbytes.optim.adamw.AdamW8bit": (QuantisedAdamWRule(),),
}
_USE = "use optim='adamw_torch_fused', or describe its step by a StepRule and register_step_rule"


def register_step_rule(optimizer: type[torch.optim.Optimizer], rule: StepRule) -> None:
    """
    Have probes split the steps of an optimizer of your own by `rule`.

    A rule that is registered for a class of torch or transformers takes the place of the one known for it. It does
    not hold for subclasses, which may step otherwise.

    Raises:
        TypeError: if `optimizer` is no class of optimizers, or `rule` no [`~trl_entropy.StepRule`].
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise TypeError(f"register_step_rule takes a subclass of torch.optim.Optimizer first, not {optimizer!r}")
    if not isinstance(rule, StepRule):
        raise TypeError(f"register_step_rule takes a StepRule second, an instance of a subclass, not {rule!r}")
    _RULES[_name(optimizer)] = (rule,)


def step_rule(optimizer: torch.optim.Optimizer) -> StepRule:
    """
    The rule of an optimizer's steps with the settings of all its groups.

    Raises:
        ValueError: if none is known or none holds, with the reason.
    """
    kind, reasons = type(optimizer), []
    for rule in _RULES.get(_name(kind), ()):
        reasons = sorted({reason for group in optimizer.param_groups if (reason := rule.why_not(group))})
        if not reasons:
            return rule
    reason = ", ".join(reasons) or why_none(kind.__name__)
    raise ValueError(f"the steps of {kind.__module__}.{kind.__name__} cannot be split (T5): {reason}; {_USE}")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
