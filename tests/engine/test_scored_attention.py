"""A model that trains with another kernel of attention is scored with torch's, and has its own back afterwards."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_entropy.engine import build_engine
from trl_entropy.engine.attention import attention_of, scored_attention
from trl_entropy.gradients.scores import score
from trl_entropy.rollouts.completions import Completions

KERNEL = "half-only"


def half_only(module, query, *args, **kwargs):
    """As flash_attention_2: no float32."""
    if query.dtype == torch.float32:
        raise RuntimeError("takes fp16 and bf16 only")
    return sdpa_attention_forward(module, query, *args, **kwargs)


@pytest.fixture
def qwen2():
    AttentionInterface.register(KERNEL, half_only)
    AttentionMaskInterface.register(KERNEL, sdpa_mask)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def kernels_of(model):
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


def test_scores_and_derivatives_are_those_of_torchs_kernel(qwen2, accelerate_to):
    ones = torch.ones(2, 6, dtype=torch.long)
    completions = Completions(ones, ones, ones[:, :3], torch.arange(2), loss_mask=ones[:, :3])
    accelerator = accelerate_to()
    engine = build_engine(
        accelerator, *accelerator.prepare(qwen2, torch.optim.AdamW(qwen2.parameters())), max_grad_norm=1.0
    )
    params = {name: param.detach() for name, param in qwen2.named_parameters()}
    direction = {name: torch.ones_like(param) for name, param in params.items()}

    def scores():
        with engine.scoring_model(params) as model:
            return torch.cat(score(model, completions, 1.0, 2, params, direction, order=1).logps)

    expected = scores()
    qwen2.set_attn_implementation(KERNEL)
    with pytest.raises(RuntimeError, match="fp16 and bf16 only"):
        qwen2(ones)
    assert torch.equal(scores(), expected)
    assert kernels_of(qwen2) == {KERNEL}
    with engine.scoring_model(params, dtype=None) as model:  # the model that training runs keeps its kernel
        assert kernels_of(model) == {KERNEL}


def test_the_kernel_is_back_after_an_exception(qwen2):
    qwen2.set_attn_implementation(KERNEL)
    assert attention_of(qwen2)
    with pytest.raises(ZeroDivisionError), scored_attention(qwen2):
        assert kernels_of(qwen2) == {"sdpa"}
        raise ZeroDivisionError
    assert kernels_of(qwen2) == {KERNEL}
