"""Each rule's parts are the step that torch's, or transformers', own optimizer makes, over steps in float64."""

import pytest
import torch
from blockwise_adamw import BlockwiseAdamW
from transformers.optimization import Adafactor

from trl_entropy.estimators.optimizer.quantised import QuantisedAdamWRule
from trl_entropy.estimators.optimizer.rules import (
    AdafactorRule,
    AdagradRule,
    AdamRule,
    AdamWRule,
    RMSpropRule,
    SGDRule,
)

CASES = {
    "adamw in 8 bits": (QuantisedAdamWRule(), BlockwiseAdamW, {"weight_decay": 0.1}),
    "adamw": (AdamWRule(), torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam": (AdamRule(), torch.optim.Adam, {"weight_decay": 0.1}),
    "rmsprop": (RMSpropRule(), torch.optim.RMSprop, {"weight_decay": 0.1}),
    "rmsprop with momentum": (RMSpropRule(), torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1}),
    "rmsprop, centred": (RMSpropRule(), torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "adagrad": (AdagradRule(), torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
    "adagrad, not from 0": (AdagradRule(), torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    "sgd": (SGDRule(), torch.optim.SGD, {"weight_decay": 0.1}),
    "sgd with momentum": (SGDRule(), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "sgd, Nesterov's": (SGDRule(), torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adafactor": (
        AdafactorRule(),
        Adafactor,
        {"relative_step": False, "scale_parameter": False, "weight_decay": 0.1},
    ),
    "adafactor, limited": (
        AdafactorRule(),
        Adafactor,
        {"relative_step": False, "scale_parameter": False, "clip_threshold": 0.1},
    ),
}
CLIP, STEPS = 0.3, 4


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def state_of(optimizer, param, keys):
    found = optimizer.state.get(param, {})
    return {key: found[key].clone() for key in keys if torch.is_tensor(found.get(key))}


def steps_of(case, shapes=((3, 4), (5,))):
    """(rule, state, gradient, theta, step, group, dtheta) of each parameter and step; gradients before clipping."""
    rule, optimizer_class, settings = case
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    optimizer = optimizer_class(params, lr=0.05, **settings)
    for step in range(1, STEPS + 1):
        known = []
        for param in params:
            gradient = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = CLIP * gradient
            known.append((state_of(optimizer, param, rule.keys), gradient, param.detach().clone()))
        optimizer.step()
        group = optimizer.param_groups[0]
        for param, (state, gradient, before) in zip(params, known, strict=True):
            yield rule, state, gradient, before, step, group, param.detach() - before


def test_parts_sum_to_the_step(case):
    for rule, state, gradient, theta, step, group, made in steps_of(case):
        assert not rule.why_not(group)
        parts = rule.parts(state, gradient, theta, step, group, CLIP)
        torch.testing.assert_close(sum(parts), made, rtol=1e-6, atol=1e-12)
        assert (parts.weight_decay != 0).any() == bool(group["weight_decay"])


def test_the_gradient_part_is_the_metric_times_the_gradient_and_momentum_does_not_see_it(case):
    """With M held, a share of the gradient has that share of the gradient's part: what attribution relies on."""
    for rule, state, gradient, theta, step, group, _ in steps_of(case):
        parts = rule.parts(state, gradient, theta, step, group, CLIP)
        metric = rule.metric(rule.advanced(state, CLIP * gradient, theta, step, group), gradient, step, group)
        assert metric.shape == gradient.shape and (metric > 0).all()
        torch.testing.assert_close(parts.gradient, -rule.coefficient(step, group, CLIP) * metric * gradient)
        nothing = rule.momentum(state, metric, step, group) + rule.decay(theta, metric, step, group)
        torch.testing.assert_close(parts.momentum + parts.weight_decay, nothing)


def test_the_state_that_the_metric_reads_is_what_the_optimizer_holds_after_the_step(case):
    rule, optimizer_class, settings = case
    param = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = optimizer_class([param], lr=0.05, **settings)
    for step in (1, 2, 3):
        param.grad = torch.arange(12.0, dtype=torch.float64).view(3, 4) / step - 4
        known = rule.advanced(
            state_of(optimizer, param, rule.keys), param.grad.clone(), param.detach(), step, optimizer.param_groups[0]
        )
        optimizer.step()
        held = state_of(optimizer, param, rule.keys)
        for key in set(known) & set(held):
            torch.testing.assert_close(known[key], held[key], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "adamw in 8 bits", "adam", "rmsprop", "adagrad", "adafactor"])
def test_where_no_gradient_has_been_the_metric_is_zero(name):
    rule, optimizer_class, settings = CASES[name]
    param = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    group = optimizer_class([param], lr=0.05, **settings).param_groups[0]
    gradient = torch.ones(3, 4, dtype=torch.float64)
    gradient[1] = 0
    after = rule.advanced({}, gradient, param.detach(), 1, group)
    metric = rule.metric(after, gradient, 1, group)
    assert (metric[1] == 0).all() and (metric[[0, 2]] > 0).all()


def test_settings_that_break_a_rule_are_named():
    param = [torch.nn.Parameter(torch.zeros(2))]
    broken = {
        "amsgrad=True": (AdamWRule(), torch.optim.AdamW(param, amsgrad=True)),
        "added to the gradient": (AdamWRule(), torch.optim.Adam(param, weight_decay=0.1)),
        "decouple": (AdamRule(), torch.optim.AdamW(param)),
        "maximize=True": (AdagradRule(), torch.optim.Adagrad(param, maximize=True)),
        "dampening": (SGDRule(), torch.optim.SGD(param, momentum=0.9, dampening=0.1)),
        "relative_step=True": (AdafactorRule(), Adafactor(param)),
        "beta1": (AdafactorRule(), Adafactor(param, lr=1.0, relative_step=False, scale_parameter=False, beta1=0.9)),
    }
    for text, (rule, optimizer) in broken.items():
        assert text in rule.why_not(optimizer.param_groups[0])


def test_blocks_of_256_numbers_have_their_own_scales():
    case = (QuantisedAdamWRule(), BlockwiseAdamW, {"weight_decay": 0.1})
    for rule, state, gradient, theta, step, group, made in steps_of(case, shapes=((20, 30),)):
        torch.testing.assert_close(
            sum(rule.parts(state, gradient, theta, step, group, CLIP)), made, rtol=1e-6, atol=1e-12
        )
        assert step == 1 or (len(state["absmax1"]) == 3 and state["state1"].dtype == torch.uint8)
