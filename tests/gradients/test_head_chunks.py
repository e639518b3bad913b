"""Scores and their derivatives with the logits of a few tokens at a time are those of all logits at once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_inputs import COMMON, VOCAB, batch_of, gpt2, gpt2_with_adapter, made, mixtral, opt, qwen2, qwen3_moe
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2ForCausalLM

from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.gradients import head_chunks
from trl_entropy.gradients.group_gradients import token_scores
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_gradients import DotProducts, Rows, SquaredNorms
from trl_entropy.gradients.sequence_products import consumed, gradients_of, weighted_entropies, weighted_logps
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions


def gemma2():
    """Its logits are capped after the head."""
    return Gemma2ForCausalLM(
        Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager")
    )


def cohere():
    """Its logits are scaled after the head."""
    return CohereForCausalLM(CohereConfig(**COMMON, logit_scale=3.0, eos_token_id=0, bos_token_id=0, pad_token_id=0))


def adapter_on_head():
    return get_peft_model(qwen2(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))


def whole_head_beside_adapter():
    return get_peft_model(qwen2(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def tied():
    model = qwen2()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


class MixesTokens(Qwen2ForCausalLM):
    """What stands between body and head adds up the hidden states of the tokens: not to be split."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Sequential(_Sum(), nn.Linear(config.hidden_size, VOCAB, bias=False))


class _Sum(nn.Module):
    def forward(self, hidden):
        return hidden.cumsum(1)


SPLIT = [
    gpt2, gpt2_with_adapter, opt, qwen2, mixtral, qwen3_moe, gemma2, cohere, adapter_on_head,
    whole_head_beside_adapter, tied,
]  # fmt: skip


@pytest.fixture
def both_ways(monkeypatch):
    """both_ways(model, function): its result with all logits at once, and with those of one column after the other."""
    calls = []
    scores = head_chunks._Chunks.scores
    monkeypatch.setattr(head_chunks._Chunks, "scores", lambda *args: calls.append(1) or scores(*args))

    def both_ways(model, function, columns=1, rows=3):
        whole = function()
        assert not calls
        monkeypatch.setattr(head_chunks, "LOGITS_AT_ONCE_ON_CPU", columns * rows * VOCAB)
        assert head_chunks.can_split(model, completions_of(model))
        calls.clear()
        parts = function()
        assert calls
        return whole, parts

    return both_ways


def completions_of(model):
    """Gemma 2 gives nan in float64 where a column has nothing to attend to."""
    lengths = [3, 3, 3] if isinstance(model, Gemma2ForCausalLM) else [2, 5, 3]
    return Completions.of(RolloutBatch.from_micro_batches([batch_of(lengths, 0, width=5)]))


def direction_of(model):
    generator = torch.Generator().manual_seed(1)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return {name: 0.1 * torch.randn(param.shape, generator=generator, dtype=param.dtype) for name, param in named}


@pytest.mark.parametrize("build", SPLIT)
def test_scores_and_derivatives(build, both_ways):
    model = made(build).double()
    if build in (mixtral, qwen3_moe):
        model.set_experts_implementation("eager")  # the fused kernel takes no float64

    def scores():
        found = score(model, completions_of(model), 0.7, 8, None, direction_of(model), order=2)
        return torch.stack([*found.entropy, *found.logps])

    whole, parts = both_ways(model, scores)
    assert whole.abs().amax(dim=(1, 2)).min() > 1e-3
    assert torch.allclose(parts, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", SPLIT)
@pytest.mark.parametrize("columns", [1, 3])
def test_gradients_of_two_values(build, columns, both_ways):
    """One forward pass and two backward passes, through chunks that are computed again for each."""
    model = made(build).double()
    completions = completions_of(model)
    weights = torch.rand(completions.loss_mask.shape, generator=torch.Generator().manual_seed(2))
    if build in (mixtral, qwen3_moe):
        model.set_experts_implementation("eager")

    def gradients():
        with evaluation_mode(model):
            found = gradients_of(model, completions, [weighted_logps(weights), weighted_entropies(weights)], 0.7, 8)
        return [torch.cat([g.flatten() for g in one.values()]) for one in found]

    for whole, parts in zip(*both_ways(model, gradients, columns), strict=True):
        assert whole.norm() > 0 and torch.allclose(parts, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", [qwen2, adapter_on_head, tied])
@pytest.mark.parametrize("make", [SquaredNorms, Rows, "dots"])
def test_gradients_of_each_completion(build, make, both_ways):
    """A head that is trained is called once a chunk, and its gradient is the sum of what these calls give."""
    model = made(build).double()
    completions = completions_of(model)
    value = weighted_logps(completions.loss_mask.double())

    def consumer():
        return DotProducts(3, [direction_of(model)]) if make == "dots" else make(3)

    def values():
        with evaluation_mode(model):
            return consumed(model, completions, value, consumer, 1.0, 8).values

    whole, parts = both_ways(model, values)
    assert whole.abs().max() > 0 and torch.allclose(parts, whole, rtol=1e-6)


def test_a_head_that_mixes_tokens_is_not_split(monkeypatch, caplog):
    model = made(lambda: MixesTokens(qwen2().config)).double()
    completions = completions_of(model)
    caplog.set_level("INFO", head_chunks.__name__)
    whole = score(model, completions, 1.0, 8).logps[0]
    monkeypatch.setattr(head_chunks, "LOGITS_AT_ONCE_ON_CPU", 1)
    assert torch.equal(whole, score(model, completions, 1.0, 8).logps[0])
    assert not head_chunks.can_split(model, completions) and "in parts its scores differ by" in caplog.text


def test_the_body_is_as_it_was_after_an_exception(monkeypatch):
    model = made(qwen2)
    monkeypatch.setattr(head_chunks, "LOGITS_AT_ONCE_ON_CPU", 1)
    assert head_chunks.can_split(model, completions_of(model))
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_scores(model, completions_of(model), 1.0)
    assert "forward" not in vars(model.model)
