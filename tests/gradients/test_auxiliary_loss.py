"""The loss that balances experts, of a tiny mixture in float64, against loops over micro-batches and tokens."""

import itertools

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from trl_entropy.gradients.auxiliary_loss import auxiliary_slope
from trl_entropy.rollouts.completions import Completions

EXPERTS, CHOSEN = 4, 2


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=23, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, initializer_range=0.3,
    )  # fmt: skip
    model = MixtralForCausalLM(config).double()
    model.set_experts_implementation("eager")  # the other has no float64
    return model


@pytest.fixture(scope="module")
def completions():
    ids = torch.randint(3, 23, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[3, :1] = mask[0, -1:] = mask[3, -2:] = 0
    own = mask[:, 3:]
    return Completions(ids, mask, own, torch.tensor([0, 0, 1, 1]), loss_mask=own)


def balance(logits_by_layer):
    """EXPERTS sum_e (tokens given to e / tokens) (mean probability of e), layers counted as tokens, token by token."""
    given, probability, tokens = [0.0] * EXPERTS, [torch.zeros(()).double()] * EXPERTS, 0
    for logits in (row for layer in logits_by_layer for row in layer):
        shares = logits.exp() / logits.exp().sum()
        best = sorted(range(EXPERTS), key=lambda e: -float(logits[e]))[:CHOSEN]
        tokens += 1
        for expert in range(EXPERTS):
            given[expert] += expert in best
            probability[expert] = probability[expert] + shares[expert]
    return EXPERTS * sum(g / tokens * p / tokens for g, p in zip(given, probability, strict=True))


def oracle(model, completions, size, direction):
    """Each row of a micro-batch is read alone, without its padding; the gradient's product with `direction`."""
    losses = []
    for rows in torch.arange(len(completions)).split(size):
        logits = [[], []]
        for row in rows:
            ids = completions.input_ids[row][completions.attention_mask[row].bool()][None]
            output = model(input_ids=ids, output_router_logits=True)
            for layer, found in zip(logits, output.router_logits, strict=True):
                layer.extend(found)
        losses.append(balance(logits))
    params = dict(model.named_parameters())
    gradient = torch.autograd.grad(sum(losses) / len(losses), params.values(), allow_unused=True)
    products = zip(params, gradient, strict=True)
    return sum((direction[name] * part).sum() for name, part in products if part is not None)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_slope_is_that_of_loops_over_tokens(mixture, completions, size):
    generator = torch.Generator().manual_seed(1)
    params = dict(mixture.named_parameters())
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}
    found = auxiliary_slope(mixture, completions, size, params, direction)
    expected = float(oracle(mixture, completions, size, direction))
    assert abs(expected) > 1e-2
    assert float(found) == pytest.approx(expected, rel=1e-5)  # transformers sums in float32
    assert mixture.training and all(p.grad is None for p in params.values())


def test_micro_batches_are_not_exchangeable_with_the_step(mixture, completions):
    """A product of averages: were the loss that of all rows at once, the part would be another."""
    params = dict(mixture.named_parameters())
    ones = {name: torch.ones_like(p) for name, p in params.items()}
    slopes = [float(auxiliary_slope(mixture, completions, size, params, ones)) for size in (1, 2, 4)]
    assert all(abs(one - other) > 1e-4 for one, other in itertools.pairwise(slopes))
