"""The closed form against torch.optim.AdamW itself, and its parts against their sum."""

import pytest
import torch

from trl_entropy.estimators.optimizer.adamw import (
    AdamWSettings,
    adamw_moments,
    adamw_update,
    adamw_update_parts,
    gradient_coefficient,
    gradient_metric,
    live_preconditioner,
    preconditioner,
    update_parts_after,
)

BETAS, EPS = (0.9, 0.98), 1e-3  # an eps that shows


def run_torch(dtype, lrs=(0.1, 0.02, 0.05), max_norm=1.0):
    """Three clipped steps of torch's AdamW on two groups, with and without decay; what went in and what came out."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=dtype)) for _ in range(2)]
    groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(params, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=lrs[0], betas=BETAS, eps=EPS)
    for step, lr in enumerate(lrs, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for param in params:
            param.grad = torch.randn(3, 2, generator=generator, dtype=dtype)
        grads, before = (
            [t.clone() for t in tensors] for tensors in ([p.grad for p in params], [p.detach() for p in params])
        )
        moments = [
            [optimizer.state[p][key].clone() if step > 1 else torch.zeros_like(p.detach()) for p in params]
            for key in ("exp_avg", "exp_avg_sq")
        ]
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        clip_factor = min(1.0, max_norm / (float(norm) + 1e-6))
        optimizer.step()
        for i, param in enumerate(params):
            settings = AdamWSettings(lr, BETAS, EPS, groups[i]["weight_decay"])
            inputs = (before[i], grads[i], moments[0][i], moments[1][i], step, settings, clip_factor)
            yield inputs, param.detach() - before[i], optimizer.state[param]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-7)])
def test_update_is_that_of_torch(dtype, tolerance):
    for inputs, change, _ in run_torch(dtype):
        torch.testing.assert_close(adamw_update(*inputs), change, rtol=0, atol=tolerance)
        assert inputs[-1] < 0.9  # clipping is at work


def test_moments_are_those_of_torch():
    for inputs, _, state in run_torch(torch.float64):
        exp_avg, exp_avg_sq = adamw_moments(*inputs[1:4], BETAS, inputs[-1])
        torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=1e-13, atol=1e-15)


def test_parts_against_their_equations():
    """(T5), with M at its value in (T4): the one with this step's gradient in it."""
    for inputs, change, state in run_torch(torch.float64):
        param, grad, exp_avg, _, step, settings, clip_factor = inputs
        v_hat = state["exp_avg_sq"] / (1 - BETAS[1] ** step)
        metric = 1 / (v_hat.sqrt() + EPS)
        torch.testing.assert_close(preconditioner(state["exp_avg_sq"], step, BETAS[1], EPS), metric)
        parts = adamw_update_parts(*inputs)
        correction = settings.lr / (1 - BETAS[0] ** step)
        torch.testing.assert_close(parts.momentum, -correction * BETAS[0] * metric * exp_avg)
        torch.testing.assert_close(parts.weight_decay, -settings.lr * settings.weight_decay * param)
        torch.testing.assert_close(parts.gradient, -correction * 0.1 * clip_factor * metric * grad)
        torch.testing.assert_close(sum(parts), change, rtol=0, atol=1e-14)


def test_shares_of_completions_add_up_to_the_gradient_part():
    *_, (inputs, _, state) = run_torch(torch.float64)
    _, grad, *_, step, settings, clip_factor = inputs
    shares = torch.rand(5, 1, 1, dtype=torch.float64) * torch.ones(5, 3, 2, dtype=torch.float64)
    shares = shares + (grad - shares.sum(0)) / 5
    metric = preconditioner(state["exp_avg_sq"], step, BETAS[1], EPS)
    updates = -gradient_coefficient(settings, step, clip_factor) * metric * shares
    torch.testing.assert_close(updates.sum(0), adamw_update_parts(*inputs).gradient)


def test_before_the_first_step_there_is_no_metric():
    assert preconditioner(torch.zeros(2), 0, 0.999, 1e-8).isnan().all()


def test_arguments_are_left_alone():
    for inputs, *_ in run_torch(torch.float64):
        copies = [t.clone() for t in inputs[:4]]
        adamw_update(*inputs)
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, inputs, strict=False))


def test_coordinates_that_never_moved_have_no_metric():
    """1/eps is left out, a broken moment is not; nothing that moves is touched."""
    exp_avg_sq = torch.tensor([0.0, 1e-30, 0.5, float("nan")], dtype=torch.float64)
    live, plain = live_preconditioner(exp_avg_sq, 2, 0.9, EPS), preconditioner(exp_avg_sq, 2, 0.9, EPS)
    assert float(live[0]) == 0.0
    assert float(plain[0]) == 1 / EPS
    assert torch.equal(live[1:3], plain[1:3])
    assert live[3].isnan()


def test_gradient_metric_is_what_multiplies_the_gradient():
    """-metric g is the gradient part of (T5); 0 where nothing ever had a gradient, which changes no update."""
    generator = torch.Generator().manual_seed(1)
    param, grad, exp_avg = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3))
    exp_avg_sq = torch.rand(4, generator=generator, dtype=torch.float64)
    for quantity in (grad, exp_avg, exp_avg_sq):
        quantity[0] = 0.0
    settings = AdamWSettings(0.05, BETAS, EPS, 0.1)
    parts = adamw_update_parts(param, grad, exp_avg, exp_avg_sq, 3, settings, clip_factor=0.7)
    metric = gradient_metric(grad, exp_avg_sq, 3, settings, clip_factor=0.7)
    torch.testing.assert_close(-metric * grad, parts.gradient, rtol=1e-12, atol=0)
    assert metric[0] == 0 and bool((metric[1:] > 0).all())


@pytest.mark.parametrize("step", [1, 5])
def test_parts_after_the_step_are_those_before_it(step):
    generator = torch.Generator().manual_seed(2)
    param, grad, exp_avg = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    exp_avg_sq = torch.rand(6, generator=generator, dtype=torch.float64)
    settings, clip = AdamWSettings(0.05, BETAS, EPS, 0.1), 0.6
    exp_avg_after, exp_avg_sq_after = adamw_moments(grad, exp_avg, exp_avg_sq, BETAS, clip)
    expected = adamw_update_parts(param, grad, exp_avg, exp_avg_sq, step, settings, clip)
    found = update_parts_after(param, exp_avg, exp_avg_after, exp_avg_sq_after, step, settings)
    for name in ("momentum", "weight_decay", "gradient"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0)
