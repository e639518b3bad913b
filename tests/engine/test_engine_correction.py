"""A change of one's own after the optimizer's step: in theta and in what is read of it, never in the moments."""

import pytest
import torch
from engine_toy import make_step


def test_the_correction_is_in_theta_and_not_in_the_moments(built, model):
    """Two engines make the same steps; one is corrected after the first."""
    seen = {}

    def correct(context):
        before = context.update
        seen["change"] = {name: torch.full_like(value, 0.01) for name, value in before.items()}
        context.correct(seen["change"])
        assert context.correction.keys() == before.keys()
        for name, value in before.items():
            torch.testing.assert_close(context.update[name], value + 0.01, rtol=0, atol=1e-7)
            expected = context.params_before[name] + context.update[name]
            torch.testing.assert_close(context.params_after[name], expected, rtol=0, atol=1e-7)

    engine = built()
    start = {name: param.detach().clone() for name, param in engine.parameters.items()}
    make_step(engine)
    plain = {name: param.detach().clone() for name, param in engine.parameters.items()}
    moments = [state["exp_avg"].clone() for state in engine.optimizer.state.values()]
    for name, param in engine.parameters.items():
        param.data.copy_(start[name])
    engine.optimizer.state.clear()
    make_step(engine, after=correct)
    for name, param in engine.parameters.items():
        assert torch.equal(param, plain[name] + seen["change"][name])
    for expected, state in zip(moments, engine.optimizer.state.values(), strict=True):
        assert torch.equal(state["exp_avg"], expected)


def test_it_is_made_once_and_after_the_step(built):
    zeros = {}

    def before(context):
        zeros.update({name: torch.zeros_like(value) for name, value in context.params_before.items()})
        with pytest.raises(RuntimeError, match="once for a step, in `after_update`"):
            context.correct(zeros)

    def after(context):
        assert context.correction == {}
        context.correct(zeros)
        with pytest.raises(RuntimeError, match="once for a step"):
            context.correct(zeros)

    make_step(built(), before, after)


def test_narrow_parameters_are_refused(built, model):
    model.bfloat16()

    def after(context):
        with pytest.raises(ValueError, match="needs float32 parameters"):
            context.correct(context.update)

    make_step(built(max_grad_norm=0.0), after=after)
