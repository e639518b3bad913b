"""The example of docs/learn.md, by hand there, is what the package's estimators say of the same policy."""

from pathlib import Path

import pytest
import torch
from torch.func import jvp
from two_tokens import (
    BETAS,
    COMPLETIONS,
    EPS,
    FIRST_GRADIENT,
    LR,
    THETA,
    TRAINED,
    exact,
    exact_slope,
    numbers,
    page,
    step,
    token,
)

from trl_entropy.estimators.entropy_change.step_change import point_terms, step_changes
from trl_entropy.estimators.optimizer.adamw import AdamWSettings, adamw_update_parts

DOCS = Path(__file__).parents[2] / "docs"


def scores(theta, completions):
    """Entropy and log-probability of each token, by autograd's own arithmetic."""
    rows = []
    for text in completions:
        logits = torch.stack([theta, (2 if text[0] == "a" else 0) * theta])
        p = torch.sigmoid(logits)
        chosen = torch.tensor([one == "a" for one in text])
        rows.append(torch.stack([-(p * p.log() + (1 - p) * (1 - p).log()), torch.where(chosen, p, 1 - p).log()]))
    return torch.stack(rows).unbind(1)


def test_the_page_is_up_to_date():
    """Else: python docs/make/two_tokens.py > docs/learn.md"""
    assert (DOCS / "learn.md").read_text() == page()


def test_the_step_is_adamws():
    theta = torch.tensor([THETA], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([theta], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    theta.grad = torch.tensor([FIRST_GRADIENT], dtype=torch.float64)
    optimizer.step()
    state = {name: value.clone() for name, value in optimizer.state[theta].items()}
    with torch.no_grad():
        theta.fill_(THETA)  # the example begins here
    mean = sum(TRAINED.values()) / len(TRAINED)
    (_, logps), advantages = scores(theta[0], TRAINED), torch.tensor([one - mean for one in TRAINED.values()])
    theta.grad = None
    (-(advantages[:, None] * logps).sum() / 4).backward()
    made = step()
    assert made["gradient"] == pytest.approx(theta.grad.item(), rel=1e-12)
    settings = AdamWSettings(LR, BETAS, EPS, 0.0)
    parts = adamw_update_parts(theta.detach(), theta.grad, state["exp_avg"], state["exp_avg_sq"], 2, settings)
    assert made["parts"]["momentum"] == pytest.approx(parts.momentum.item(), rel=1e-9)
    assert made["parts"]["gradient"] == pytest.approx(parts.gradient.item(), rel=1e-9)
    optimizer.step()
    assert theta.item() - THETA == pytest.approx(made["update"], rel=1e-9)


def test_what_is_measured_and_predicted_is_the_estimators():
    update = torch.tensor(step()["update"], dtype=torch.float64)
    before = torch.tensor(THETA, dtype=torch.float64)
    ends = [jvp(lambda one: scores(one, COMPLETIONS), (theta,), (update,)) for theta in (before, before + update)]
    mask, drawn = torch.ones(len(COMPLETIONS), 2, dtype=torch.int64), ends[0][0][1]
    points = [point_terms((value[0], slope[0]), (value[1], slope[1]), drawn, mask) for value, slope in ends]
    changes = {name: one.estimate(torch.arange(len(COMPLETIONS))) for name, one in step_changes(*points).items()}
    found = numbers()["E"]
    for name in ("measured", "linear", "trapezoid"):
        assert found[name] == pytest.approx(changes[name].value, rel=1e-9)
    assert found["stderr"] == pytest.approx(changes["measured"].stderr, rel=1e-9)


def test_the_exact_entropy_is_that_over_all_completions():
    for theta in (THETA, THETA + step()["update"]):
        total = 0.0
        for text in ("aa", "ab", "ba", "bb"):
            one, two = token(theta, "", text[0]), token(theta, text[0], text[1])
            total += 2.718281828459045 ** (one["S"] + two["S"]) * (one["H"] + two["H"]) / 2
        assert exact(theta) == pytest.approx(total, rel=1e-12)
    assert exact_slope(THETA) == pytest.approx((exact(THETA + 1e-5) - exact(THETA - 1e-5)) / 2e-5, rel=1e-8)
    found = numbers()
    changes = sum(row["change"] for row in found["step"]["rows"])
    assert changes == pytest.approx(found["exact"]["slope"] * found["step"]["parts"]["gradient"], rel=1e-9)
