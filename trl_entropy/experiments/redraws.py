"""Independent redraws at a fixed state, in chunks that are kept on disk so that a killed experiment goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from trl_entropy.engine.parameters import trainable_parameters
from trl_entropy.estimators.adamw import AdamWSettings, gradient_coefficient, preconditioner
from trl_entropy.estimators.importance import WeightForm
from trl_entropy.estimators.step_change import point_terms, stacked
from trl_entropy.estimators.surrogate import surrogate_terms
from trl_entropy.estimators.u_statistic import cross_gram
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.state import FixedState, Rollouts
from trl_entropy.scores import Completions, TokenScores, score

ROWS_PER_CHUNK = 1024  # completions generated at a time
FORMS: tuple[WeightForm, ...] = ("decision", "sequence")
_POOL, _ROLLOUTS = 1, 2  # second part of a seed; 0 is the update batch


@dataclass(frozen=True)
class Cache:
    """
    Results of chunks as files, in a folder named after all that determines them: another state, another folder.

    Args:
        folder: of this state and seed.
    """

    folder: Path

    @classmethod
    def of(cls, output: Path, checkpoint: Checkpoint, seed: int) -> Cache:
        """The cache below `output` for one checkpoint (by content) and seed."""
        digest = hashlib.sha256(str(seed).encode())
        for path in (checkpoint.path / "model.safetensors", checkpoint.path / "optimizer.pt"):
            digest.update(path.read_bytes())
        digest.update(repr(sorted(checkpoint.config.items(), key=lambda item: item[0])).encode())
        digest.update(repr(checkpoint.task).encode())
        return cls(output / f"chunks-{digest.hexdigest()[:12]}")

    def get(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor kept under `name`, computed if there is none."""
        path = self.folder / f"{name}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        value = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(value, temporary)
        temporary.replace(path)
        return value


def probe_pool(
    state: FixedState, cache: Cache, num_completions: int, seed: int, batch_size: int
) -> Float[Tensor, "B columns"]:
    """
    Per-completion terms before and after the update, of independent completions: any disjoint rows are redraws of E.

    Prompts are drawn with replacement, one completion each.

    Returns:
        Columns: for the per-decision form, then the sequence form, `stacked` terms before (4) and after (4).
    """
    size = min(ROWS_PER_CHUNK, num_completions)

    def chunk(index: int) -> Tensor:
        seeds = (seed, _POOL, index)
        completions, _ = state.draw(state.draw_problems(size, seeds), seeds)
        before, after = (_score(state, completions, params, batch_size) for params in (state.before, state.after))
        terms = [
            stacked(point_terms(scores.entropy, scores.logps, before.logps[0], completions.completion_mask, form))
            for form in FORMS
            for scores in (before, after)
        ]
        return torch.cat(terms, dim=1).cpu()

    return _in_chunks(cache, "probe", num_completions, size, chunk)


def rollout_redraws(
    state: FixedState, cache: Cache, num_redraws: int, num_prompts: int, num_generations: int, seed: int
) -> Float[Tensor, "R P P"]:
    """
    For independent rollouts the Gram matrices X_n' M Y_m of (T17), in nats per token: of the update's gradient part.

    M is that *before* the step, times the coefficient -lr (1-b1)/(1-b1^t) by which it enters (T5), clipping apart.
    """
    metric = _flat(_gradient_metric(state))
    size = max(1, min(ROWS_PER_CHUNK // (num_prompts * num_generations), num_redraws))

    def chunk(index: int) -> Tensor:
        seeds = (seed, _ROLLOUTS, index)
        rollouts = state.draw_rollouts(state.draw_problems(size * num_prompts, seeds), num_generations, seeds)
        starts = range(0, size * num_prompts, num_prompts)
        redraws = (group_gradients(state, rollouts, range(start, start + num_prompts)) for start in starts)
        return torch.stack([cross_gram(x, y, metric) for x, y in redraws]).cpu()

    return _in_chunks(cache, f"rollouts-{num_prompts}x{num_generations}", num_redraws, size, chunk)


def group_gradients(
    state: FixedState, rollouts: Rollouts, prompts: range
) -> tuple[Float[Tensor, "P D"], Float[Tensor, "P D"]]:
    """
    X_n and Y_n of (T17) for some of the groups, by one backward each, with h and mean length those of these groups.

    Their means over the groups are grad h (T8) and the gradient of the loss (T2).
    """
    parameters = list(trainable_parameters(state.model).values())
    groups = [state.forward(rollouts.completions, n) for n in prompts]
    num_tokens = sum(int(part.completion_mask.sum()) for _, _, part in groups)
    entropy_sum = sum(float((entropy.detach().double() * part.completion_mask).sum()) for entropy, _, part in groups)
    x, y = [], []
    for n, (entropy, logps, part) in zip(prompts, groups, strict=True):
        terms = surrogate_terms(entropy, logps, part.completion_mask, entropy_sum / num_tokens)
        entropy_term = terms.sum() * (len(prompts) / num_tokens)
        loss_share = rollouts.loss_terms(logps, part, n).mean()
        x.append(_flat(torch.autograd.grad(entropy_term, parameters, retain_graph=True)))
        y.append(_flat(torch.autograd.grad(loss_share, parameters)))
    return torch.stack(x), torch.stack(y)


def _gradient_metric(state: FixedState) -> list[Tensor]:
    """-lr (1-b1)/(1-b1^t) M of every parameter, M from the moments before the step."""
    context, step = state.context, state.context.optimizer_step
    parts = []
    for name, exp_avg_sq in context.exp_avg_sq.items():
        settings = AdamWSettings(
            context.learning_rate[name], context.betas[name], context.eps[name], context.weight_decay[name]
        )
        metric = preconditioner(exp_avg_sq, step - 1, settings.betas[1], settings.eps)
        parts.append(-gradient_coefficient(settings, step) * metric)
    return parts


def _score(state: FixedState, completions: Completions, params: dict[str, Tensor], batch_size: int) -> TokenScores:
    with state.engine.scoring_model(params) as model:
        return score(model, completions, state.args.temperature, batch_size, params, state.update, order=1)


def _flat(tensors: Iterable[Tensor]) -> Float[Tensor, " D"]:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _in_chunks(cache: Cache, name: str, num: int, size: int, chunk: Callable[[int], Tensor]) -> Tensor:
    """The first `num` rows of whole chunks of `size`, each computed once; a larger number later uses what is there."""
    indices = tqdm(range(-(-num // size)), desc=name, unit="chunk", mininterval=1.0)
    parts = [cache.get(f"{name}-{size}-{index:05d}", partial(chunk, index)) for index in indices]
    return torch.cat(parts)[:num]
