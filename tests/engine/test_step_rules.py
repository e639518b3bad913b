"""Steps of other optimizers than AdamW are split as they are made, kept and rebuilt; others are refused by name."""

import pytest
import torch
from engine_toy import make_step
from transformers.optimization import Adafactor

from trl_entropy.engine import PastUpdate
from trl_entropy.engine.optimizer_step import (
    has_metric_before,
    metric_before,
    metric_of_step,
    preconditioner_before,
    predicted_update,
    read_before_step,
    update_parts,
)
from trl_entropy.engine.past_update import KeptUpdate
from trl_entropy.engine.step_rules import _RULES, register_step_rule, step_rule
from trl_entropy.estimators.optimizer.known import why_none
from trl_entropy.estimators.optimizer.step_rule import StepRule

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {"weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "sgd without momentum": (torch.optim.SGD, {}),
    "adafactor": (Adafactor, {"relative_step": False, "scale_parameter": False, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_parts_are_those_of_the_step_that_is_made(built, name):
    """Clipped, three steps; what was kept gives the same parts, also out of a checkpoint."""
    optimizer_class, settings = OPTIMIZERS[name]
    engine = built(optimizer_class, max_grad_norm=1e-2, **settings)
    for step in (1, 2, 3):
        known = {}

        def before(update, known=known, step=step):
            read_before_step(update)
            assert has_metric_before(update) == (step > 1 or "sgd" in name)
            known |= {"planned": predicted_update(update), "kept": KeptUpdate.of(update, parts=True)}
            known |= {"parts": dict(update_parts(update)), "metric": metric_of_step(update)}

        def after(update, known=known):
            kept = KeptUpdate.from_state(known["kept"].state_dict())
            for past in (PastUpdate.of(update, known["kept"], engine), PastUpdate.rebuilt(kept, engine)):
                parts, metric = dict(past.parts()), past.metric()
                for key, made in update.update.items():
                    torch.testing.assert_close(known["planned"][key], made, rtol=1e-3, atol=3e-7)
                    torch.testing.assert_close(sum(parts[key]), made, rtol=1e-3, atol=3e-7)
                    for one, other in zip(parts[key], known["parts"][key], strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-3, atol=3e-7)
                    torch.testing.assert_close(metric[key], known["metric"][key], rtol=1e-4, atol=1e-8)
                    share = -metric[key] * update.gradient[key]
                    torch.testing.assert_close(parts[key].gradient, share, rtol=1e-3, atol=3e-7)

        make_step(engine, before, after)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adagrad"])
def test_the_metric_before_the_step_is_that_after_the_last_one(built, name):
    optimizer_class, settings = OPTIMIZERS[name]
    engine, seen = built(optimizer_class, max_grad_norm=0.0, **settings), {}
    for step in (1, 2):

        def before(update, step=step):
            if step == 1:
                assert all((m == 0).all() for m in preconditioner_before(update).values())
                read_before_step(update)
                factor = next(iter(update.rule.coefficient(1, group) for group in update.options.values()))
                seen["after the first"] = {key: m / factor for key, m in metric_of_step(update).items()}
                return
            factor = next(iter(update.rule.coefficient(2, group) for group in update.options.values()))
            for key, m in metric_before(update).items():
                torch.testing.assert_close(m, factor * seen["after the first"][key])

        make_step(engine, before)


class SignOfMomentum(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})


class Scaled(torch.optim.Optimizer):
    """theta -= lr 3 g: what a user may have written."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(3 * group["lr"] * param.grad)


class ScaledRule(StepRule):
    counts_steps = False

    def advanced(self, state, clipped, param, step, group):
        return {}

    def metric(self, state, like, step, group):
        return torch.full_like(like, 3.0)

    def coefficient(self, step, group, clip_factor=1.0):
        return group["lr"] * clip_factor


def test_a_rule_of_ones_own(built, monkeypatch):
    monkeypatch.setattr("trl_entropy.engine.step_rules._RULES", dict(_RULES))
    engine = built(Scaled, max_grad_norm=1e-2)
    with pytest.raises(ValueError, match="no rule is known for it"):
        engine.step_rule()
    register_step_rule(Scaled, ScaledRule())
    planned = {}
    make_step(
        engine,
        lambda update: (read_before_step(update), planned.update(predicted_update(update))),
        lambda update: [torch.testing.assert_close(planned[key], made) for key, made in update.update.items()],
    )
    for wrong in ((ScaledRule(), Scaled), (Scaled, ScaledRule), (dict, ScaledRule())):
        with pytest.raises(TypeError, match="register_step_rule"):
            register_step_rule(*wrong)


def test_others_are_refused_by_name():
    param = [torch.nn.Parameter(torch.zeros(2))]
    for optimizer, text in (
        (SignOfMomentum(param), "SignOfMomentum cannot be split .T5.: no rule is known"),
        (torch.optim.Adam(param, amsgrad=True, weight_decay=0.1), "Adam cannot .*amsgrad=True"),
        (torch.optim.NAdam(param), "NAdam cannot"),
        (Adafactor(param), "relative_step=True"),
    ):
        with pytest.raises(ValueError, match=text):
            step_rule(optimizer)


def test_why_none_says_what_each_kind_lacks():
    reasons = {
        "lion_8bit": "sign", "ademamix_8bit": "quantised", "paged_adamw_32bit": "paged", "galore_adamw": "projection",
        "schedule_free_adamw": "average", "muon": "orthogonalised", "ademamix": "no rule",
    }  # fmt: skip
    assert all(word in why_none(name) for name, word in reasons.items())
