"""The parts of an AdamW step, in the same order in every process."""

import os
import subprocess
import sys
from pathlib import Path

# Only the parts' consumer adds floats up, so a sum of many sizes shows the order of the parameters in its last digits.
PROGRAM = """
from types import SimpleNamespace
import torch
from trl_entropy.engine.adamw_step import metric_of_step, predicted_update, update_parts
from trl_entropy.estimators.attribution.shares import update_products

generator = torch.Generator().manual_seed(0)
names = [f"layers.{number}.weight" for number in range(40)] + ["unused"]
def numbers():
    sizes = [10.0 ** (number % 5) for number in range(len(names))]
    return {name: size * torch.randn(7, generator=generator) for name, size in zip(names, sizes)}
same = lambda value: dict.fromkeys(names, value)
update = SimpleNamespace(
    learning_rate=same(1e-3), betas=same((0.9, 0.999)), eps=same(1e-8), weight_decay=same(0.01), clip_factor=0.7,
    optimizer_step=3, params_before=numbers(), gradient=numbers(), exp_avg=numbers(),
    exp_avg_sq={name: value.square() for name, value in numbers().items()},
    without_gradient=frozenset(["unused"]), check_adamw=lambda: None,
)
entropy_gradient, so_far, order = numbers(), None, []
for name, parts in update_parts(update):
    so_far = update_products(entropy_gradient[name], parts, so_far)
    order.append(name)
assert len(order) == 40 and "unused" not in order
print(order, *(float(value).hex() for value in so_far), list(metric_of_step(update)), list(predicted_update(update)))
"""


def test_the_same_digits_under_every_hash_seed():
    """The products (T9) bit for bit, and the order of the keys, in processes that hash strings differently."""
    said = []
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", PROGRAM]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        said.append(run.stdout)
    assert said[0] == said[1] and "layers.39.weight" in said[0]
