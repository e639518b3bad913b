"""The groups' gradients by a pass of its own: of the tokens that the policy wrote, as in training's loss."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_entropy.engine import trainable_parameters
from trl_entropy.gradients.group_products import products_by_extra_pass
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.rollouts.completions import Completions


def test_tokens_of_tools_have_no_gradient():
    """Against the same tokens with an advantage of 0, which is what leaves them out of the loss."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    ids, mask = torch.randint(0, 11, (4, 7)), torch.ones(4, 5, dtype=torch.long)
    by_policy = mask.clone()
    by_policy[:2, 1:3] = 0
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0])
    gradient = {name: torch.ones_like(param) for name, param in trainable_parameters(model).items()}

    def products(loss_mask, advantages):
        groups = torch.tensor([0, 0, 1, 1])
        completions = Completions(ids, torch.ones_like(ids), mask, groups, loss_mask=loss_mask)
        coefficients = LossCoefficients.on_policy(advantages, mask, 2, 5)  # whatever the loss mask is
        (found,), _ = products_by_extra_pass(model, completions, coefficients, 1.0, gradient, None, 8)
        return torch.stack(found)

    found = products(by_policy, advantages)
    assert torch.allclose(found, products(mask, advantages[:, None] * by_policy))
    assert not torch.allclose(found, products(mask, advantages), rtol=1e-2)
