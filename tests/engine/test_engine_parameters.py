"""Other parameter values put into a model, and taken out again."""

import pytest
import torch
from engine_toy import Tied, loss_of
from torch import nn

from trl_entropy.engine import (
    build_engine,
    snapshot_parameters,
    swapped_parameters,
    trainable_parameters,
)


def other_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(param, 0.3) for name, param in trainable_parameters(model).items()}


def test_trainable_parameters_are_named_once(model: Tied) -> None:
    assert list(trainable_parameters(model)) == ["embedding.weight", "norm.weight", "norm.bias"]


def test_snapshot_does_not_follow_the_model(model: Tied) -> None:
    before = snapshot_parameters(model)
    with torch.no_grad():
        model.norm.bias.add_(1)
    assert torch.equal(before["norm.bias"], torch.zeros(4))


def test_swapped_parameters_computes_with_them_and_restores_the_objects(model: Tied) -> None:
    objects = {name: (param, param.detach().clone()) for name, param in model.named_parameters()}
    values, before = other_values(model), loss_of(model)
    with swapped_parameters(model, values) as swapped:
        assert swapped is model
        assert model.head.weight is model.embedding.weight  # still tied
        assert torch.equal(model.norm.weight, values["norm.weight"])
        loss = loss_of(model)
        grads = torch.autograd.grad(loss, list(trainable_parameters(model).values()))
    assert not torch.equal(loss, before)
    assert all(grad.isfinite().all() for grad in grads)
    for name, param in model.named_parameters():
        assert param is objects[name][0]
        assert torch.equal(param, objects[name][1])
        assert param.grad is None
    assert model.head.weight is model.embedding.weight
    assert torch.equal(loss_of(model), before)


def test_swapped_parameters_restores_after_an_exception(model: Tied) -> None:
    before = dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), swapped_parameters(model, other_values(model)):
        raise ZeroDivisionError
    assert all(param is before[name] for name, param in model.named_parameters())


def test_a_graph_built_before_the_swap_stays_valid(model: Tied) -> None:
    expected = torch.autograd.grad(loss_of(model), model.norm.weight)[0]
    loss = loss_of(model)
    with swapped_parameters(model, other_values(model)):
        loss_of(model)
    loss.backward()
    assert torch.equal(model.norm.weight.grad, expected)


def test_gradient_hooks_survive_a_swap_to_another_dtype(model: Tied) -> None:
    """DDP reduces in hooks of the parameter's gradient accumulator; `param.data = other_dtype` would lose them."""
    model.bfloat16()
    calls = []
    accumulator = model.norm.weight.expand_as(model.norm.weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *unused: calls.append(1))
    with swapped_parameters(model, other_values(model), dtype=torch.float32):
        assert loss_of(model).requires_grad
    loss_of(model).backward()
    assert calls == [1]


def test_swapped_parameters_in_float32(model: Tied) -> None:
    """A bf16 model, frozen layers and buffers included, computes exactly as its float32 copy does."""
    model.bfloat16()
    values = {name: param.float() + 1e-5 for name, param in snapshot_parameters(model).items()}
    reference = Tied()
    reference.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        for name, param in trainable_parameters(reference).items():
            param.copy_(values[name])
    with swapped_parameters(model, values, dtype=torch.float32):
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
        assert torch.equal(loss_of(model), loss_of(reference))
        assert not model.frozen.weight.requires_grad
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_swapped_parameters_rounds_to_the_models_dtype(model: Tied) -> None:
    model.bfloat16()
    with swapped_parameters(model, {name: value.float() for name, value in other_values(model).items()}):
        assert torch.equal(model.norm.weight, torch.full((4,), 0.3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("norm.bias"), "no values for 1 trainable parameters, the first is 'norm.bias'"),
        (lambda values: values.update(x=torch.ones(1)), "names that are no trainable parameters: 'x'"),
        (
            lambda values: values.update({"norm.bias": torch.ones(5)}),
            r"'norm.bias' has shape \(4,\), its value \(5,\)",
        ),
    ],
)
def test_swapped_parameters_refuses_what_does_not_match(model: Tied, change, message: str) -> None:
    values = other_values(model)
    change(values)
    with pytest.raises(ValueError, match=message), swapped_parameters(model, values):
        pass


def test_swapped_parameters_refuses_partitioned_and_quantised(model: Tied) -> None:
    model.frozen.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"), swapped_parameters(model, other_values(model), torch.float32):
        pass
    model.norm.bias.ds_id = 3
    with pytest.raises(ValueError, match="zero_stage: 2"), swapped_parameters(model, other_values(model)):
        pass


def test_scoring_model_gives_float32_or_what_training_computes(accelerate_to, model: Tied) -> None:
    expected = loss_of(model)
    accelerator = accelerate_to(mixed_precision="bf16")
    prepared = accelerator.prepare(model, torch.optim.AdamW(trainable_parameters(model).values()))
    rounded = loss_of(prepared[0])
    engine = build_engine(accelerator, *prepared, max_grad_norm=1.0)
    params = snapshot_parameters(model)
    with torch.autocast("cpu", torch.bfloat16), engine.scoring_model(params) as scored:
        assert torch.equal(loss_of(scored), expected)
    with engine.scoring_model(params, dtype=None) as scored:
        assert torch.equal(loss_of(scored), rounded)


def test_scoring_model_is_in_evaluation_mode(accelerate_to, model: Tied) -> None:
    accelerator = accelerate_to()
    model.frozen.eval()
    prepared = accelerator.prepare(model, torch.optim.AdamW(trainable_parameters(model).values()))
    engine = build_engine(accelerator, *prepared, max_grad_norm=1.0)
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), engine.scoring_model(snapshot_parameters(model)) as scored:
        assert not any(module.training for module in scored.modules())
        raise ZeroDivisionError
    assert {name: module.training for name, module in model.named_modules()} == modes
