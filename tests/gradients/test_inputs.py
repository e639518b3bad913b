"""Scores are those of the policy that trains, or that drew the completions, whatever the padding and the kernels."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_entropy.gradients.group_gradients import token_scores
from trl_entropy.gradients.inputs import base_model, counts_columns, eager_experts
from trl_entropy.gradients.scores import score
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.drawing import pack_completions

VOCAB = 23
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.2, "intermediate_size": 16, "num_key_value_heads": 1,
}  # fmt: skip


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes))


def gpt2_with_adapter():
    return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def opt():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16}
    return OPTForCausalLM(
        OPTConfig(vocab_size=VOCAB, max_position_embeddings=32, word_embed_proj_dim=16, init_std=0.5, **sizes)
    )


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**COMMON))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **experts))


def made(build):
    torch.manual_seed(0)
    return build().eval()


def batch_of(lengths, first_group, width=4):
    """A micro-batch of TRL's: prompts of these lengths padded to the longest, completions that end one by one."""
    generator = torch.Generator().manual_seed(first_group)
    rows, longest = len(lengths), max(lengths)
    prompt_mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    completion_mask = torch.stack([(torch.arange(width) < width - n % 3).long() for n in range(rows)])
    return {
        "prompt_ids": torch.randint(1, VOCAB, (rows, longest), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(1, VOCAB, (rows, width), generator=generator) * completion_mask,
        "completion_mask": completion_mask,
        "prompt_index": torch.arange(rows) + first_group,
        **dict.fromkeys(("rewards", "raw_advantages", "length_scale", "advantages"), torch.ones(rows)),
    }


def logps_of_the_loss(model, batch):
    """As TRL calls the model: the ids and the mask, no positions."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return logps.where(batch["completion_mask"].bool(), 0.0)


@pytest.mark.parametrize("build", [gpt2, gpt2_with_adapter, opt, qwen2])
def test_own_completions_have_the_scores_of_the_loss(build):
    """Micro-batches of different widths, joined; and each row alone, without the columns that others need."""
    model, batches = made(build), [batch_of([2, 5, 3], 0), batch_of([6, 1, 4], 3), batch_of([2], 6)]
    completions = Completions.of(RolloutBatch.from_micro_batches(batches))
    expected = torch.cat([logps_of_the_loss(model, batch) for batch in batches])
    for batch_size in (1, 2, 7):
        assert torch.allclose(score(model, completions, 1.0, batch_size).logps[0], expected, atol=2e-5)
    for rows in (completions, completions.trimmed(), completions.rows(torch.tensor([1, 5]))):
        chosen = expected[rows.prompt_index]
        found = token_scores(model, rows, 1.0)[1].detach()
        assert torch.allclose(found.where(rows.completion_mask.bool(), 0.0), chosen, atol=2e-5)


@pytest.mark.parametrize("build", [gpt2, opt, qwen2])
def test_a_probe_batch_has_the_scores_of_the_sampler(build):
    """`generate` gives a row's first token position 0, however far the row is padded."""
    model, prompts = made(build), [[3, 4, 5, 6, 7], [8, 9]]
    ids, mask = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]]), torch.ones(2, 5, dtype=torch.long)
    mask[1, :3] = 0
    drawn = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=True, top_k=0,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    tokens = drawn.sequences[:, 5:]
    logps = torch.stack(drawn.logits, dim=1).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    completions = pack_completions(prompts, tokens.tolist(), 0, 0, "cpu")
    for batch_size in (1, 2):
        assert torch.allclose(score(model, completions, 1.0, batch_size).logps[0], logps, atol=2e-5)


def test_models_that_count_columns():
    found = {build: counts_columns(made(build)) for build in (gpt2, gpt2_with_adapter, opt, qwen2, mixtral)}
    assert found == {gpt2: True, gpt2_with_adapter: True, opt: False, qwen2: False, mixtral: False}


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_experts_are_differentiated_forward(build):
    """The fused kernel has no forward mode; a small step, so that no token goes to another expert."""
    model = made(build).double()
    base_model(model).set_experts_implementation("eager")  # the fused kernel takes no float64
    completions = Completions.of(RolloutBatch.from_micro_batches([batch_of([2, 4, 3], 0)]))
    params = {name: param.detach() for name, param in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    derivative = score(model, completions, 1.0, 8, None, direction, order=1).logps[1]

    def at(step):
        return score(model, completions, 1.0, 8, {n: p + step * direction[n] for n, p in params.items()}).logps[0]

    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    assert derivative.norm() > 0.1 and (derivative - difference).norm() < 2e-3 * difference.norm()
    model = model.float()
    base_model(model).set_experts_implementation("grouped_mm")
    direction = {name: value.float() for name, value in direction.items()}
    fused = score(model, completions, 1.0, 8, None, direction, order=1).logps[1]
    assert torch.allclose(fused.double(), derivative, atol=1e-3 * derivative.abs().max())
    assert set(base_model(model).get_experts_implementation().values()) == {"grouped_mm"}


def test_experts_are_as_they_were_after_an_exception():
    model = made(mixtral)
    with pytest.raises(RuntimeError), eager_experts(model):
        assert set(model.get_experts_implementation().values()) == {"eager"}
        raise RuntimeError
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}
