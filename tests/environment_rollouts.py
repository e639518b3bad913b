"""Rollouts of two turns with tokens of an environment between them, and a model whose scores of those are garbage."""

import torch

from trl_entropy.gradients.inputs import base_model

ENVIRONMENT = [401, 307, 411]  # what the environment writes; a random policy writes these three once in 10^8 tokens


def two_turns(prompts, trainer):
    """A `rollout_func`: at most 4 tokens of the policy, 3 of the environment in three rows of four, then 5 more."""
    prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
    first, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    first = [ids[:4] for ids in first]
    answered = [first[i] + (ENVIRONMENT if i % 4 else []) for i in range(len(first))]
    asked = [prompt + ids for prompt, ids in zip(prompt_ids, answered, strict=True)]
    second, _ = trainer._generate_single_turn(asked, None, {}, 1)
    second = [ids[:5] if i % 4 else [] for i, ids in enumerate(second)]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [ids + more for ids, more in zip(answered, second, strict=True)],
        "logprobs": None,
        "env_mask": [
            [1] * len(ids) + [0] * (len(both) - len(ids)) + [1] * len(more)
            for ids, both, more in zip(first, answered, second, strict=True)
        ],
    }


def environment_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Where the environment wrote, in a batch of token ids."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    blocks = (ids.unfold(1, len(ENVIRONMENT), 1) == ids.new_tensor(ENVIRONMENT)).all(-1)
    for offset in range(len(ENVIRONMENT)):
        found[:, offset : offset + blocks.shape[1]] |= blocks
    return found


def score_environment_with_garbage(model: torch.nn.Module) -> None:
    """
    Change the hidden states from which the environment's tokens are predicted, by a multiple of themselves: their
    log-probabilities, entropies and derivatives become others, and no other token's do.
    """

    def hook(module, args, kwargs, output):
        ids = kwargs["input_ids"]
        if ids.shape[1] > len(ENVIRONMENT):
            predicts = torch.nn.functional.pad(environment_tokens(ids)[:, 1:], (0, 1)).unsqueeze(-1)
            hidden = output.last_hidden_state
            output.last_hidden_state = torch.where(predicts, 7 * hidden + 3, hidden)
        return output

    base_model(model).model.register_forward_hook(hook, with_kwargs=True)
