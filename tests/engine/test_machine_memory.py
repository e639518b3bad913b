"""Whole tensors in the machine's memory, read one at a time: values, lifetimes, and the scores of a model."""

import gc
import weakref
from unittest import mock

import pytest
import torch
from engine_toy import IDS, Tied, loss_of
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_entropy.engine import trainable_parameters
from trl_entropy.engine.machine_memory import MachineTensors
from trl_entropy.engine.parameters import replaced_tensors
from trl_entropy.engine.read_when_used import Remade, read_when_used
from trl_entropy.gradients.scores import score
from trl_entropy.rollouts.completions import Completions


def on_machine(values: dict[str, torch.Tensor], accelerator) -> MachineTensors:
    sizes = {name: (value.shape, value.dtype) for name, value in values.items()}
    return MachineTensors(sizes, ({name: value} for name, value in values.items()), accelerator)


def test_tensors_are_those_given(accelerate_to):
    values = {
        "odd": torch.randn(3, 5),
        "narrow": torch.randn(7).bfloat16(),
        "": torch.randn(()),
        "none": torch.ones(0),
    }
    held = on_machine(values, accelerate_to())
    assert list(held) == list(values) and len(held) == 4 and dict(held).keys() == values.keys()
    for name, value in values.items():
        assert held[name].dtype == value.dtype and torch.equal(held[name], value)
    assert held.num_bytes == 3 * 64  # each begins at 64 bytes


def test_tensors_without_parts_are_zero(accelerate_to):
    held = MachineTensors({"a": (torch.Size([2, 3]), torch.float32)}, [], accelerate_to())
    assert torch.equal(held["a"], torch.zeros(2, 3))


def test_memory_that_cannot_be_shared_is_the_processs_own_and_says_so(accelerate_to, monkeypatch, caplog):
    monkeypatch.setattr("os.getpid", lambda: 2**22 + 1)
    held = on_machine({"a": torch.arange(3.0)}, accelerate_to())
    assert held["a"].tolist() == [0, 1, 2]
    assert "cannot be shared between processes" in caplog.text


def test_a_parameter_is_made_for_each_use_and_freed_after_it(model: Tied):
    expected, made = model(IDS), []
    weight, frozen = model.head.weight.detach(), model.frozen.weight.detach()

    def reader(value):
        def read():
            assert not any(one() is not None for one in made), "two at a time"
            copy = value.clone()
            made.append(weakref.ref(copy))
            return copy

        return read

    readers = {id(model.head.weight): reader(weight), id(model.frozen.weight): reader(frozen)}
    before = dict(model.named_parameters())
    with torch.no_grad(), read_when_used(model, readers):
        assert torch.equal(model(IDS), expected)
        assert len(made) == 3  # the embedding and the head share theirs
        assert all(one is before[name] for name, one in model.named_parameters())
    assert model.head.weight is before["embedding.weight"]


def test_what_another_puts_in_its_place_is_used(model: Tied):
    own, other = id(model.frozen.weight), nn.Parameter(torch.zeros(4, 4))
    readers = {own: lambda: pytest.fail("read all the same")}
    with read_when_used(model, readers), replaced_tensors(model, {own: other}):
        assert model.frozen.weight is other
    with pytest.raises(ZeroDivisionError), read_when_used(model, readers):
        raise ZeroDivisionError
    assert type(model._parameters) is dict and isinstance(model.frozen.weight, nn.Parameter)


def test_one_table_inside_another_keeps_both(model: Tied):
    outer, inner = torch.full((4, 4), 1.0), torch.full((4,), 2.0)
    with (
        read_when_used(model, {id(model.frozen.weight): lambda: outer}),
        read_when_used(model, {id(model.frozen.bias): lambda: inner}),
    ):
        assert model.frozen.weight is outer and model.frozen.bias is inner


def test_a_graph_keeps_no_copies(model: Tied):
    trained = [model.embedding.weight, model.norm.weight]
    expected, made = torch.autograd.grad(loss_of(model), trained), []

    def read() -> torch.Tensor:
        copy = value.clone()
        made.append(weakref.ref(copy.untyped_storage()))
        return copy

    value, remade = model.frozen.weight.detach(), Remade()
    with read_when_used(model, {id(model.frozen.weight): remade.reader(read)}), remade.in_forward_of(model):
        loss = loss_of(model)
        gc.collect()
        assert len(made) == 1 and made[0]() is None
        found = torch.autograd.grad(loss, trained)
    assert len(made) == 2  # once more for the backward pass
    assert all(map(torch.equal, expected, found))


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip


def policy(lora: bool, **sizes: int) -> nn.Module:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES | sizes, tie_word_embeddings=True)).eval()
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, adapter) if lora else model


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("lora", [False, True])
def test_scores_and_derivatives_are_those_of_parameters_that_are_given_whole(lora, order, accelerate_to):
    model = policy(lora)
    completions = completions_of(3)
    params = {name: param + 0.1 for name, param in trainable_parameters(model).items()}
    direction = {name: torch.randn_like(param) for name, param in params.items()}
    accelerator = accelerate_to()
    expected = score(model, completions, 1.0, 2, params, direction, order)
    given = on_machine(params, accelerator), on_machine(direction, accelerator)
    remade = Remade()
    copies = {id(p): remade.reader(p.detach().clone) for p in model.parameters() if not p.requires_grad}
    with read_when_used(model, copies), remade.in_forward_of(model):
        found = score(model, completions, 1.0, 2, *given, order)
    for one, other in zip(expected.entropy + expected.logps, found.entropy + found.logps, strict=True):
        assert torch.equal(one, other) if order < 2 else torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def completions_of(rows: int) -> Completions:
    ids, ones = torch.randint(0, 40, (rows, 9)), torch.ones(rows, 9, dtype=torch.long)
    return Completions(ids, ones, ones[:, :5], torch.arange(rows), loss_mask=ones[:, :5])


LARGE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}


def layer_bytes(model: nn.Module) -> int:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return sum(param.nbytes for param in base.model.layers[0].parameters())


@pytest.mark.parametrize(("order", "most"), [(0, 0.5), (1, 1.0), (2, 1.3)])
def test_less_than_a_layer_is_on_the_device_while_trained_parameters_move(order, most, accelerate_to):
    """As an accelerator has it, where each reading is a copy; whole, parameters and direction are twelve layers."""
    model, accelerator = policy(lora=False, **LARGE), accelerate_to()
    values = {name: param.detach() for name, param in model.named_parameters()}
    given, read = [on_machine(values, accelerator) for _ in range(2)], MachineTensors.__getitem__
    with (
        mock.patch.object(MachineTensors, "__getitem__", lambda self, name: read(self, name).clone()),
        LiveBytes() as live,
    ):
        score(model, completions_of(2), 1.0, 2, *given, order)
    assert 0.1 < live.peak / layer_bytes(model) < most


def test_less_than_a_layer_is_on_the_device_while_a_frozen_base_is_differentiated_through():
    model = policy(lora=True, **LARGE)
    remade, trained = Remade(), list(trainable_parameters(model).values())
    copies = {id(p): remade.reader(p.detach().clone) for p in model.parameters() if not p.requires_grad}
    ids = completions_of(2).input_ids
    with read_when_used(model, copies), remade.in_forward_of(model), LiveBytes() as live:
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.grad(loss, trained)
    assert 0.1 < live.peak / layer_bytes(model) < 2  # with the activations; all six, if the graph kept them
