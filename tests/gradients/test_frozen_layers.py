"""Derivatives without products of zero tangents: the same bits as by torch's own rules, and fewer products."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_entropy.gradients import scores
from trl_entropy.gradients.frozen_layers import frozen_layers
from trl_entropy.rollouts.completions import Completions

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip


def adapted() -> nn.Module:
    model = get_peft_model(Qwen2ForCausalLM(Qwen2Config(**SIZES)), LoraConfig(r=2, task_type="CAUSAL_LM"))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)  # else the adapter adds nothing
    return model


def only_trains(*parts: str, tied: bool = False) -> nn.Module:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    for name, param in model.named_parameters():
        param.requires_grad_(any(part in name for part in parts))
    return model


MODELS = {
    "adapter": adapted,
    "everything": lambda: only_trains(""),
    "tied embeddings, which the head shares": lambda: only_trains("embed_tokens", tied=True),
    "a bias": lambda: only_trains("layers.0.self_attn.q_proj.bias"),
    "norms": lambda: only_trains("layernorm"),
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_are_those_of_torch_bit_for_bit(name, order, monkeypatch):
    model = MODELS[name]().eval()
    ids, ones = torch.randint(0, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    completions = Completions(ids, ones, ones[:, :5], torch.arange(2), loss_mask=ones[:, :5])
    params = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}
    direction = {name: torch.randn_like(param) for name, param in params.items()}

    def scored() -> scores.TokenScores:
        return scores.score(model, completions, 1.0, 2, params, direction, order)

    ours = scored()
    monkeypatch.setattr(scores, "frozen_layers", lambda *_: contextlib.nullcontext())
    theirs = scored()
    for one, other in zip(ours.entropy + ours.logps, theirs.entropy + theirs.logps, strict=True):
        assert torch.equal(one, other)
    assert all(float(derivative.abs().max()) > 0 for derivative in ours.entropy)


@pytest.mark.parametrize(("moves", "products"), [(False, 2), (True, 3)])
def test_a_frozen_layer_makes_two_products_and_gets_its_forward_back(moves, products):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    moving = ["0.weight", "1.weight"] if moves else ["0.weight"]
    params = {name: param.detach() for name, param in model.named_parameters() if name in moving}
    tangents = {name: torch.ones_like(param) for name, param in params.items()}

    def call(params: dict) -> torch.Tensor:
        return torch.func.functional_call(model, params, torch.ones(4, 8))

    with frozen_layers(model, params), FlopCounterMode(display=False) as flops:
        torch.func.jvp(call, (params,), (tangents,))
    first = 3 * 2 * 4 * 8 * 8  # torch's own rule: x is a constant here, and has a tangent of zeros
    assert flops.get_total_flops() == pytest.approx(first + products * 2 * 4 * 8 * 8)
    assert all("forward" not in vars(layer) for layer in model)
