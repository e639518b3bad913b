"""The parts of an AdamW step, in the same order in every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_toy import make_step

from trl_entropy.engine.optimizer_step import (
    coefficient_of_step,
    metric_of_step,
    preconditioner_before,
    preconditioner_of_step,
    predicted_update,
    read_before_step,
    update_parts,
)

# Only the parts' consumer adds floats up, so a sum of many sizes shows the order of the parameters in its last digits.
PROGRAM = """
from types import SimpleNamespace
import torch
from trl_entropy.engine.optimizer_step import metric_of_step, predicted_update, update_parts
from trl_entropy.estimators.attribution.shares import update_products
from trl_entropy.estimators.optimizer.rules import AdamWRule

generator = torch.Generator().manual_seed(0)
names = [f"layers.{number}.weight" for number in range(40)] + ["unused"]
def numbers():
    sizes = [10.0 ** (number % 5) for number in range(len(names))]
    return {name: size * torch.randn(7, generator=generator) for name, size in zip(names, sizes)}
same = lambda value: dict.fromkeys(names, value)
moments = {"exp_avg": numbers(), "exp_avg_sq": {name: value.square() for name, value in numbers().items()}}
update = SimpleNamespace(
    options=same({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}), rule=AdamWRule(),
    clip_factor=0.7, step_of_rule=3, params_before=numbers(), gradient=numbers(),
    optimizer_state=lambda keys: {name: {key: moments[key][name] for key in keys} for name in names},
    without_gradient=frozenset(["unused"]),
)
entropy_gradient, parts = numbers(), dict(update_parts(update))
so_far, order = update_products((entropy_gradient[name], own) for name, own in parts.items()), list(parts)
assert len(order) == 40 and "unused" not in order
print(order, *(float(value).hex() for value in so_far), list(metric_of_step(update)), list(predicted_update(update)))
"""


@pytest.mark.slow
def test_the_same_digits_under_every_hash_seed():
    """The products (T9) bit for bit, and the order of the keys, in processes that hash strings differently."""
    said = []
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", PROGRAM]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
        said.append(run.stdout)
    assert said[0] == said[1] and "layers.39.weight" in said[0]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3], ids=["unclipped", "clipped"])
def test_the_step_is_that_of_torchs_adamw(built, max_grad_norm):
    """Two steps; eps is as large as the second moment's root, so that clipping shows in M."""
    engine = built(max_grad_norm=max_grad_norm, eps=1e-4, weight_decay=0.1, betas=(0.8, 0.95))
    for step in (1, 2):
        planned = {}

        def before(update, planned=planned, step=step):
            read_before_step(update)
            earlier = preconditioner_before(update)
            for name, v in update.exp_avg_sq.items():
                v_hat = v / (1 - 0.95 ** (step - 1)) if step > 1 else v
                expected = torch.where(v_hat > 0, 1 / (v_hat.sqrt() + 1e-4), 0.0)
                torch.testing.assert_close(earlier[name], expected, rtol=1e-5, atol=0)
            planned |= predicted_update(update)

        def after(update, planned=planned, step=step):
            state = dict(zip(engine.parameters, engine.optimizer.state.values(), strict=True))
            assert (update.clip_factor < 1) == bool(max_grad_norm) and update.optimizer_step == step
            metric, parts = preconditioner_of_step(update), dict(update_parts(update))
            for name, made in update.update.items():
                torch.testing.assert_close(planned[name], made, rtol=1e-3, atol=1e-6)
                v_hat = state[name]["exp_avg_sq"] / (1 - 0.95**step)
                expected = torch.where(v_hat > 0, 1 / (v_hat.sqrt() + 1e-4), 0.0)
                torch.testing.assert_close(metric[name], expected, rtol=1e-5, atol=0)
                share = coefficient_of_step(update) * metric[name]
                torch.testing.assert_close(metric_of_step(update)[name], share)
                torch.testing.assert_close(parts[name].gradient, -share * update.gradient[name])

        make_step(engine, before, after)
