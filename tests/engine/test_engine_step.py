"""One optimizer step in one process: phases, clipping, optimizers of all kinds."""

import pytest
import torch
from engine_toy import Tied, loss_of, make_step

from trl_entropy.engine import UpdateContext


def test_unwanted_steps_make_no_context(built) -> None:
    def never(context: UpdateContext) -> None:
        raise AssertionError("called for a step that nobody wanted")

    engine = built()
    make_step(engine, never, never, wanted=False)
    make_step(engine, wanted=True)


def test_wants_is_asked_once_per_step(built) -> None:
    engine, asked = built(), []
    engine.register(
        wants=lambda: bool(asked.append(1)), before_update=lambda context: None, after_update=lambda context: None
    )
    for _ in range(3):
        loss_of(engine.module).backward()
        engine.gradients_ready()
        engine.update_done()
    assert len(asked) == 3


def test_gradient_survives_clipping(built) -> None:
    engine, seen = built(max_grad_norm=0.01), {}

    def before(context: UpdateContext) -> None:
        seen.update(gradient=context.gradient, norm=context.grad_norm, factor=context.clip_factor)

    def after(context: UpdateContext) -> None:
        for name, param in engine.parameters.items():
            torch.testing.assert_close(param.grad, seen["gradient"][name] * seen["factor"], rtol=1e-6, atol=0)
        assert context.gradient is seen["gradient"]  # read before, so still there

    make_step(engine, before, after)
    total = sum(float(g.double().square().sum()) for g in seen["gradient"].values()) ** 0.5
    assert seen["norm"] == pytest.approx(total, rel=1e-6)
    assert seen["factor"] == pytest.approx(0.01 / (total + 1e-6), rel=1e-6)


@pytest.mark.parametrize("name", ["gradient", "grad_norm", "clip_factor", "exp_avg", "exp_avg_sq", "optimizer_step"])
def test_state_before_the_step_cannot_be_read_after_it(built, name: str) -> None:
    def after(context: UpdateContext) -> None:
        with pytest.raises(RuntimeError, match=rf"`{name}.*in `after_update`; read it in `before_update`"):
            getattr(context, name)

    make_step(built(), after=after)


@pytest.mark.parametrize("name", ["update", "params_after", "step_skipped"])
def test_state_after_the_step_cannot_be_read_before_it(built, name: str) -> None:
    contexts = []

    def before(context: UpdateContext) -> None:
        contexts.append(context)
        with pytest.raises(RuntimeError, match=rf"`{name}` was first asked for in `before_update`"):
            getattr(context, name)

    make_step(built(), before)
    with pytest.raises(RuntimeError, match="after `after_update` returned; read it in `after_update`"):
        getattr(contexts[0], name)


def test_what_was_read_outlives_the_step(built) -> None:
    kept = []
    make_step(built(), kept.append, lambda context: context.update)
    context = kept[0]
    assert set(context.update) == {"embedding.weight", "norm.weight", "norm.bias"}
    assert context.learning_rate["norm.bias"] == 0.1
    with pytest.raises(RuntimeError, match="params_before"):
        assert context.params_before


def test_a_second_step_may_not_begin_before_the_first_is_done(built) -> None:
    engine = built()
    engine.register(wants=lambda: True, before_update=lambda context: None, after_update=lambda context: None)
    loss_of(engine.module).backward()
    engine.gradients_ready()
    with pytest.raises(RuntimeError, match="update_done"):
        engine.gradients_ready()


def test_settings_are_those_of_the_step(built) -> None:
    """The scheduler moves the learning rate before the after-update work of a later callback."""
    engine, kept = built(), []
    make_step(engine, kept.append)
    engine.optimizer.param_groups[0]["lr"] = 0.05
    assert set(kept[0].learning_rate.values()) == {0.1}
    assert kept[0].options["norm.bias"]["amsgrad"] is False


def test_float64_stays_float64(built, model: Tied) -> None:
    model.double()

    def after(context: UpdateContext) -> None:
        assert {value.dtype for value in context.update.values()} == {torch.float64}

    make_step(built(), lambda context: context.gradient, after)


def test_parameters_without_gradient(built, model: Tied) -> None:
    """AdamW passes them by, decay included; their gradient is zero and their update too."""
    engine = built(weight_decay=0.1)
    engine.register(wants=lambda: True, before_update=lambda context: None, after_update=lambda context: None)
    contexts = []

    def before(context: UpdateContext) -> None:
        contexts.append(context)
        assert context.without_gradient == {"norm.bias"}
        assert not context.gradient["norm.bias"].any()
        assert context.optimizer_step == 1

    engine._before_update = before
    engine._after_update = lambda context: context.update
    loss_of(model).backward()
    model.norm.bias.grad = None
    engine.gradients_ready()
    engine.optimizer.step()
    engine.update_done()
    assert not contexts[0].update["norm.bias"].any()
    # The next step gives it a gradient: now one t for all does not exist.
    engine._before_update = lambda context: context.optimizer_step
    loss_of(model).backward()
    with pytest.raises(ValueError, match=r"'norm.bias' has made 0 steps and 'embedding.weight' 1"):
        engine.gradients_ready()


def test_a_gradient_that_is_not_finite_is_said(built, model: Tied) -> None:
    engine, seen = built(), {}

    def before(context: UpdateContext) -> None:
        seen.update(norm=context.grad_norm, factor=context.clip_factor)

    engine.register(wants=lambda: True, before_update=before, after_update=lambda context: None)
    loss_of(model).backward()
    model.norm.bias.grad[0] = torch.nan
    engine.gradients_ready()
    assert seen["norm"] != seen["norm"]
    assert seen["factor"] != seen["factor"]


# ---- other optimizers


@pytest.mark.parametrize(
    ("optimizer", "settings", "reason"),
    [
        (torch.optim.AdamW, {}, None),
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True"),
        (torch.optim.AdamW, {"maximize": True}, "maximize=True"),
        (torch.optim.Adam, {"weight_decay": 0.1}, "its weight decay is added to the gradient"),
        (torch.optim.Adam, {}, None),
        (torch.optim.SGD, {}, "it is torch.optim.sgd.SGD"),
        (torch.optim.NAdam, {}, "it is torch.optim.nadam.NAdam"),
    ],
)
def test_check_adamw(built, optimizer: type, settings: dict, reason: str | None) -> None:
    engine = built(optimizer, **settings)
    if reason is None:
        engine.check_adamw()
    else:
        with pytest.raises(ValueError, match=f"equation .T4.: {reason}"):
            engine.check_adamw()


@pytest.mark.parametrize(
    ("optimizer", "settings", "name", "message"),
    [
        (torch.optim.SGD, {}, "betas", "SGD has no 'betas'"),
        (torch.optim.SGD, {}, "exp_avg", "before its first step nothing is known about the state of SGD"),
        (torch.optim.Adamax, {}, "exp_avg", "before its first step nothing is known about the state of Adamax"),
        (torch.optim.SGD, {"momentum": 0.9}, "exp_avg", "SGD keeps .'momentum_buffer'., no 'exp_avg'"),
        (torch.optim.SGD, {"momentum": 0.9}, "optimizer_step", "SGD counts no steps"),
        (torch.optim.Adamax, {}, "exp_avg_sq", "Adamax keeps .* no 'exp_avg_sq'"),
    ],
)
def test_what_an_optimizer_has_not_is_said(built, optimizer: type, settings: dict, name: str, message: str) -> None:
    engine = built(optimizer, **settings)
    if "before its first" not in message:
        make_step(engine, wanted=False)

    def before(context: UpdateContext) -> None:
        with pytest.raises(ValueError, match=message):
            getattr(context, name)

    make_step(engine, before, lambda context: context.update)  # the update itself needs no Adam


def test_moments_can_be_read_at_any_time(built) -> None:
    engine = built()
    assert not any(value.any() for value in engine.moments("exp_avg").values())
    make_step(engine, wanted=False)
    moments = engine.moments("exp_avg_sq")
    state = engine.optimizer.state
    assert all(torch.equal(moments[name], state[p]["exp_avg_sq"]) for name, p in engine.parameters.items())
    kept = moments["norm.bias"].clone()
    make_step(engine, wanted=False)
    assert torch.equal(moments["norm.bias"], kept)  # a copy
