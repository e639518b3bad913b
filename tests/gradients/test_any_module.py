"""Per-sequence gradients of modules of any class, against one backward per sequence."""

import peft
import pytest
import torch
from test_sequence_gradients import assert_close, by_name, collect, oracle
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from trl_entropy.engine.attention import scored_attention
from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.estimators.rows.row_sums import DotProducts, Rows, SquaredNorms
from trl_entropy.gradients import behaviour, module_vjp
from trl_entropy.gradients.layer_rules import LayerError
from trl_entropy.gradients.row_proof import prove_rows, row_errors
from trl_entropy.gradients.sequence_gradients import SequenceGradients
from trl_entropy.models.tiny import tiny_config, tiny_model
from trl_entropy.probes.model_checks import _trial

D = 4


class GemmaNorm(nn.Module):
    def __init__(self, gated=False):
        super().__init__()
        self.weight, self.gated = nn.Parameter(torch.randn(D)), gated

    def forward(self, x, gate=None):
        x = x * gate.sigmoid() if self.gated else x
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.0


class Router(nn.Module):
    """Two outputs, of which one is made of the other, for tokens in one row after the other."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(3))

    def forward(self, tokens):
        logits = nn.functional.linear(tokens, self.weight, self.bias)
        best = logits.topk(2).indices
        return logits, logits.softmax(-1).gather(1, best), best


class Mixer(nn.Module):
    """Parameters of its own beside those of layers inside, one of which it never calls."""

    def __init__(self):
        super().__init__()
        self.decay, self.matrix = nn.Parameter(torch.rand(D)), nn.Parameter(torch.randn(D, D))
        self.inside, self.conv = nn.Linear(D, D), nn.Conv1d(D, D, 3, padding=2, groups=D)

    def forward(self, hidden, mask):
        hidden = self.conv(self.inside(hidden).mT)[..., : hidden.shape[1]].mT * mask[:, :, None]
        state, states = torch.zeros_like(hidden[:, 0]), []
        for t in range(hidden.shape[1]):
            state = state * self.decay + hidden[:, t] @ self.matrix
            states.append(state)
        return torch.stack(states, dim=1)


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.gated = Scaled(7, D, padding_idx=0), GemmaNorm(), GemmaNorm(gated=True)
        self.conv1d, self.wide_norm, self.router = Conv1D(D, D), nn.LayerNorm((5, D)), Router()
        self.mixer, self.scale = Mixer(), nn.Parameter(torch.rand(D))

    def forward(self, ids):
        mask = (ids > 1).to(self.scale.dtype)
        hidden = self.norm(self.table(ids))
        for _ in range(2):  # every layer is called twice
            hidden = self.wide_norm(self.conv1d(hidden) + self.gated(hidden, gate=hidden.flip(1)))
            hidden = hidden + self.mixer(hidden, mask=mask)
        logits, chosen, best = self.router(hidden.view(-1, D))
        mixed = (logits.tanh().sum(-1) + (chosen * (best + 1)).sum(-1)).view(len(ids), -1)
        return (mixed * (hidden * self.scale).sum(-1)).sum(1)


@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("weight_gradients", [True, False])
def test_rows_of_any_module_equal_one_backward_per_sequence(way, weight_gradients, monkeypatch):
    monkeypatch.setattr(module_vjp, "_WAYS", module_vjp._WAYS)
    torch.manual_seed(0)
    model, ids = Everything().double(), torch.randint(7, (4, 5))
    for module in model.modules():
        module_vjp._WAY[module] = way
    expected = oracle(model(ids), model)
    vector = by_name(torch.randn(expected.shape[1]).double(), model)
    groups = torch.tensor([1, 0, 1, -1])
    summed = torch.stack([expected[1], expected[0] + expected[2]])
    for numbers, wanted in ((torch.arange(4), expected), (groups, summed)):
        norms, dots, rows = (
            make(len(wanted))
            for make in (SquaredNorms, lambda n: DotProducts(n, [vector]), lambda n: Rows(n, torch.float64))
        )
        collect(model, [norms, dots, rows], lambda: model(ids), numbers, weight_gradients=weight_gradients)
        assert_close(rows.values, wanted, 1e-12)
        assert_close(norms.values, wanted.square().sum(1), 1e-12)
        flat = torch.cat([vector[name].flatten() for name in vector])
        assert_close(dots.values[0], wanted @ flat, 1e-11)
    seen = {type(module).__name__: behaviour._SEEN.get(module) for module in model.modules()}
    assert seen["GemmaNorm"].kinds == {"weight": "zero"} and seen["Scaled"].scale == pytest.approx(3)
    assert seen["Mixer"] is seen["Router"] is None
    ways = {type(module).__name__: module_vjp._WAY[module] for module in model.modules()}
    assert set(ways.values()) == {way}, ways  # none had to be taken by another way


def test_a_module_that_computes_otherwise_when_called_again_is_refused_by_name():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5))

    model = nn.Sequential(Noisy(D, D))
    with pytest.raises(LayerError, match=r"layer '0' of class Noisy cannot.*dropout"):
        collect(model, [Rows(3)], lambda: model(torch.randn(3, 5, D)).sum((1, 2)))


def test_autocast_is_as_the_module_had_it():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Mixer()), (torch.randn(3, 5, D), torch.ones(3, 5))
    rows = Rows(3)
    with SequenceGradients(model[0], rows) as collector:
        with torch.autocast("cpu", torch.bfloat16):
            values = model[0](*inputs).float().sum((1, 2))
            expected = oracle(values, model[0])
        with collector.batch(torch.arange(3)):
            values.sum().backward()
    assert_close(rows.values, expected, 2**-6)


def tiny(family, adapter=None):
    torch.manual_seed(0)
    model = tiny_model(tiny_config(AutoConfig.for_model(family)))
    model = model if adapter is None else peft.get_peft_model(model, adapter)
    for param in model.parameters():
        if param.requires_grad:
            param.data += 0.05 * torch.randn_like(param)
    return model


def lora(targets="all-linear", **more):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, **more)


def ia3():
    targets = ["k_proj", "down_proj"]
    return peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=["down_proj"])


ADAPTED = {
    "full Gemma 3": lambda: tiny("gemma3_text"),
    "full GPT-2": lambda: tiny("gpt2"),
    "full GPT-OSS": lambda: tiny("gpt_oss"),
    "DoRA": lambda: tiny("qwen3", lora(use_dora=True)),
    "rsLoRA": lambda: tiny("qwen3", lora(use_rslora=True)),
    "IA3": lambda: tiny("qwen3", ia3()),
    "LoRA of an embedding": lambda: tiny("llama", lora(["embed_tokens", "q_proj"])),
    "LoRA of experts": lambda: tiny(
        "mixtral", lora(["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    ),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_rows_of_families_and_adapters(name):
    model = ADAPTED[name]()
    random_state = torch.get_rng_state()
    with evaluation_mode(model), scored_attention(model):
        prove_rows(model, _trial(model))
        errors = row_errors(model, _trial(model))
    assert torch.equal(torch.get_rng_state(), random_state), "training would draw others"
    assert max(errors.values()) < 1e-5 and len(errors) == sum(param.requires_grad for param in model.parameters())


def test_a_layer_that_its_owner_never_calls_is_split_with_the_owner():
    """Mamba multiplies with the weight of its convolution without calling it."""
    model = tiny("mamba")
    with evaluation_mode(model), scored_attention(model):
        prove_rows(model, _trial(model))
        assert max(row_errors(model, _trial(model)).values()) < 1e-5
