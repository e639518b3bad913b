"""A clipped AdamW step of torch on a tiny policy, with decay and moments accumulated, and all that went into it."""

import torch
from tiny_groups import LENGTH, rewards_of
from tiny_policy import TinyPolicy

from trl_entropy.estimators.optimizer.adamw import (
    AdamWSettings,
    UpdateParts,
    adamw_moments,
    adamw_update_parts,
    gradient_coefficient,
    live_preconditioner,
)

BETAS, EPS, MAX_NORM = (0.9, 0.98), 1e-3, 0.05
DEAD = 3  # a coordinate whose gradient is always zero, although completions have one there


class TinyStep:
    """Step 3 of a run of 4 prompts x 4 completions: `update` is what torch did; two parameters, one without decay.

    Vectors over both parameters: theta, update, metric (0 where dead), parts. Rows over the completions of U:
    `scores` (B, D), `token_scores` (B, T, D), `gradients` g_i, `alpha` (B, T).
    """

    def __init__(self, seed=0, num_prompts=4, num_generations=4, num_steps=3):
        self.policy = TinyPolicy(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        self.params = [torch.nn.Parameter(half.clone()) for half in self.policy.theta.split([5, 7])]
        groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(self.params, (0.1, 0.0), strict=True)]
        optimizer = torch.optim.AdamW(groups, lr=0.05, betas=BETAS, eps=EPS)
        for step in range(1, num_steps + 1):
            self.theta = torch.cat([p.detach().clone() for p in self.params])
            self.policy.theta = self.theta  # on-policy
            self.rows, self.prompt_index = self.policy.sample(num_prompts, num_generations, generator)
            self._score(num_prompts, num_generations)
            for param, grad in zip(self.params, self.gradient.split([5, 7]), strict=True):
                param.grad = grad.clone()
            norm = float(torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM))
            clip = min(1.0, MAX_NORM / (norm + 1e-6))
            moments = [dict(optimizer.state[p]) for p in self.params]
            moments = [{key: value.clone() for key, value in state.items()} for state in moments]
            if step == num_steps:
                self._parts(moments, [group["weight_decay"] for group in groups], step, clip)
            optimizer.step()
        self.clip = clip
        self.update = torch.cat([p.detach() for p in self.params]) - self.theta

    def _score(self, num_prompts, num_generations):
        jacobian = torch.autograd.functional.jacobian(lambda moved: self.policy.score(moved)[1], self.theta)
        self.token_scores, self.mask = jacobian[self.rows], self.policy.completion_mask[self.rows]
        self.scores = self.token_scores.sum(1)
        self.rewards = rewards_of(self.policy)[self.rows]
        rewards = self.rewards.view(num_prompts, num_generations)
        self.advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        count = len(self.rows)
        self.alpha = (self.advantages / (count * LENGTH))[:, None] * self.mask
        self.gradients = -torch.einsum("bt,btd->bd", self.alpha, self.token_scores)
        self.gradient = self.gradients.sum(0)
        self.gradient[DEAD] = 0.0

    def _parts(self, moments, decays, step, clip):
        """(T5), parameter by parameter, from the state before the step."""
        pieces, metrics = [], []
        pairs = zip(self.theta.split([5, 7]), self.gradient.split([5, 7]), moments, decays, strict=True)
        for theta, grad, state, decay in pairs:
            settings = AdamWSettings(0.05, BETAS, EPS, decay)
            before = state["exp_avg"], state["exp_avg_sq"]
            pieces.append(adamw_update_parts(theta, grad, *before, step, settings, clip))
            after = adamw_moments(grad, *before, BETAS, clip)[1]
            metrics.append(live_preconditioner(after, step, BETAS[1], EPS))
        self.parts = UpdateParts(*(torch.cat(part) for part in zip(*pieces, strict=True)))
        self.metric, self.coefficient = torch.cat(metrics), gradient_coefficient(settings, step, clip)
