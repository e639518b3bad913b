"""The loss of an on-policy step by loops over completions, one at a time and unpadded, in float64: one process."""

import torch

from trl_entropy.engine import trainable_parameters
from trl_entropy.gradients.float64_reference import float64_reference


def scored(model, rollouts, temperature=1.0):
    """Entropies and log-probabilities of each completion's tokens, with their graph."""
    found = []
    for i, length in enumerate(rollouts.lengths.tolist()):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i].bool()]
        completion = rollouts.completion_ids[i, :length]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits / temperature).log_softmax(-1)
        found.append((-(log_probs.exp() * log_probs).sum(-1), log_probs[torch.arange(length), completion]))
    return found


def set_parameters(model, params):
    for name, parameter in trainable_parameters(model).items():
        parameter.data.copy_(params[name])


def losses_of_completions(model, rollouts, args, params, start=None):
    """
    What each completion adds to the step's loss, with its graph and as [`scored`]; inside `float64_reference`.

    Args:
        params: from before the step.
        start: those of the reference policy, with a KL term.
    """
    reference = None
    if args.beta:
        set_parameters(model, start)
        reference = [logps.detach() for _, logps in scored(model, rollouts)]
    set_parameters(model, params)
    scores = scored(model, rollouts)
    lengths, losses = [len(logps) for _, logps in scores], []
    for i, (entropy, logps) in enumerate(scores):
        per_token = -rollouts.advantages[i].double() * logps
        if args.loss_type == "cispo":
            per_token = per_token * min(1.0, args.epsilon_high)
        if args.use_vllm:
            per_token = per_token * (logps.detach() - rollouts.sampling_logps[i, : len(logps)]).exp().clamp(max=3.0)
        if reference is not None:
            log_ratio = reference[i] - logps
            kl = log_ratio.exp() - log_ratio - 1
            per_token = per_token + args.beta * (kl + kl.detach() * logps)  # TRL multiplies it by the ratio, 1 here
        size = args.per_device_train_batch_size
        first = i // size * size
        of_micro_batch, num_micro_batches = sum(lengths[first : first + size]), len(lengths) // size
        divisor = {
            "dr_grpo": len(lengths) * args.max_completion_length,
            "grpo": len(lengths) * lengths[i],
            "sapo": len(lengths) * lengths[i],
            "luspo": len(lengths),
            "bnpo": of_micro_batch * num_micro_batches,
        }.get(args.loss_type, sum(lengths))
        bonus = args.entropy_coef * entropy.sum() / (of_micro_batch * num_micro_batches)
        losses.append(per_token.sum() / divisor - bonus)
    return losses, scores


def group_gradients(model, rollouts, args, params, start=None):
    """Y_n, P times what each prompt group adds to the gradient, (P, D)."""
    groups, rows = rollouts.prompt_index.unique().tolist(), []
    with float64_reference(model):
        losses, _ = losses_of_completions(model, rollouts, args, params, start)
        for group in groups:
            members = (rollouts.prompt_index == group).nonzero().flatten().tolist()
            value = len(groups) * sum(losses[i] for i in members)
            parts = torch.autograd.grad(value, list(trainable_parameters(model).values()), retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def drawing_with_logprobs(draw):
    """In the place of TRL's generation: random tokens, with log-probabilities that are none of the policy's."""

    def completions(prompt_ids, *args):
        ids = [[draw.randrange(2, 400) for _ in range(draw.randint(1, 12))] for _ in prompt_ids]
        return ids, [[-6 + draw.uniform(-0.5, 0.5) for _ in row] for row in ids]

    return completions
