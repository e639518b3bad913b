"""Independent redraws at a fixed state, in chunks kept on disk so that an interrupted experiment can continue."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from trl_entropy.engine.optimizer_step import metric_before
from trl_entropy.estimators.entropy_change.step_change import point_terms, stacked
from trl_entropy.estimators.statistics.importance import WeightForm
from trl_entropy.estimators.statistics.u_statistic import cross_gram
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.state import FixedState, Policy
from trl_entropy.gradients.group_gradients import GroupRows, flat, group_rows
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.durable import replacing
from trl_entropy.runs.file_errors import as_os_error

ROWS_PER_CHUNK = 1024  # completions generated at a time
FORMS: tuple[WeightForm, ...] = ("decision", "sequence")
_POOL, _ROLLOUTS = 1, 2  # second part of a seed; 0 is the update batch


@dataclass(frozen=True)
class Cache:
    """
    Results of chunks as files. Their folder is named after everything that determines them, so that another state or
    seed has another folder.

    Args:
        folder: of this state and seed.
    """

    folder: Path

    @classmethod
    def of(cls, output: Path, state: FixedState, seed: int) -> Cache:
        """The cache below `output` for one checkpoint and its problems and functions (by content) and seed."""
        return cls(output / f"chunks-{digest_of(state.checkpoint, state.data_fingerprints, seed)}")

    def get(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor stored under `name`; if there is none it is computed and stored."""
        path = self.folder / f"{name}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        value = compute()
        with as_os_error(path), replacing(path) as temporary:
            torch.save(value, temporary)
        return value


def digest_of(checkpoint: Checkpoint, data_fingerprints: Sequence[str | None], seed: int) -> str:
    """A name of everything that determines what is drawn at a checkpoint, by content."""
    digest = hashlib.sha256(str(seed).encode())
    for path in (checkpoint.path / "model.safetensors", checkpoint.path / "optimizer.pt"):
        digest.update(path.read_bytes())
    digest.update(repr(sorted(checkpoint.config.items(), key=lambda item: item[0])).encode())
    digest.update(repr(checkpoint.task).encode())
    digest.update(repr((sorted(checkpoint.function_files.values()), tuple(data_fingerprints))).encode())
    return digest.hexdigest()[:12]


def pool_completions(policy: Policy, size: int, seed: int, index: int) -> Completions:
    """Chunk `index` of the pool: prompts drawn with replacement, one completion of each."""
    seeds = (seed, _POOL, index)
    return policy.draw(policy.draw_problems(size, seeds), seeds)


def pool_and_entropy(state: FixedState, size: int, seed: int, batch_size: int) -> tuple[Completions, float]:
    """The pool's first chunk with `size` completions, and the policy entropy h on them before the step, in nats."""
    completions = pool_completions(state, size, seed, 0)
    entropy = state.score(completions, batch_size).entropy[0]
    return completions, float(entropy.double().sum() / completions.lengths.sum())


def probe_pool(
    state: FixedState, cache: Cache, num_completions: int, seed: int, batch_size: int
) -> Float[Tensor, "B columns"]:
    """
    Per-completion terms before and after the update of independent completions, so that disjoint sets of rows are
    independent redraws of E. Prompts are drawn with replacement, one completion of each.

    Returns:
        Columns: for the per-decision form, then the sequence form, `stacked` terms before (4) and after (4).
    """
    size = min(ROWS_PER_CHUNK, num_completions)

    def chunk(index: int) -> Tensor:
        completions = pool_completions(state, size, seed, index)
        before, after = (
            state.score(completions, batch_size, params, state.update, order=1)
            for params in (state.before, state.after)
        )
        terms = [
            stacked(point_terms(scores.entropy, scores.logps, before.logps[0], completions.loss_mask, form))
            for form in FORMS
            for scores in (before, after)
        ]
        return torch.cat(terms, dim=1).cpu()

    return in_chunks(cache, "probe", num_completions, size, chunk)


def rollout_redraws(
    state: FixedState, cache: Cache, num_redraws: int, num_prompts: int, num_generations: int, seed: int
) -> Float[Tensor, "R P P"]:
    """
    The Gram matrices X_n' M Y_m of (T17) of independent rollouts: entropy changes by the update's gradient part, in
    nats per token.

    M is the metric *before* the step times the coefficient -lr c (1-b1)/(1-b1^t) by which it enters (T5), with the
    clip factor c of the state's own step.
    """
    names = list(state.engine.parameters)
    metric = -flat(metric_before(state.context), names)
    size = max(1, min(ROWS_PER_CHUNK // (num_prompts * num_generations), num_redraws))

    def chunk(index: int) -> Tensor:
        seeds = (seed, _ROLLOUTS, index)
        problems = state.draw_problems(size * num_prompts, seeds)
        rollouts = RolloutBatch.from_micro_batches([state.draw_rollouts(problems, num_generations, seeds)])
        redraws = torch.arange(len(rollouts.rewards)).split(num_prompts * num_generations)
        rows = (redrawn_rows(state, rollouts, index) for index in redraws)
        return torch.stack([cross_gram(one.entropy, one.loss, metric) for one in rows]).cpu()

    return in_chunks(cache, f"rollouts-{num_prompts}x{num_generations}", num_redraws, size, chunk)


def redrawn_rows(state: FixedState, rollouts: RolloutBatch, index: Int[Tensor, " n"]) -> GroupRows:
    """X_n and Y_n of (T17) of one redraw, the rows `index` of `rollouts`, with the redraw's own h and mean length."""
    completions = Completions.of(rollouts).rows(index)
    entropy = state.score(completions, len(index)).entropy[0]
    num_tokens, num_prompts = int(completions.loss_mask.sum()), len(completions.prompt_index.unique())
    coefficients = LossCoefficients.on_policy(
        rollouts.advantages[index],
        completions.loss_mask,
        len(index) // num_prompts,
        state.args.max_completion_length,
    )
    with state.engine.scoring_model(state.before) as model:
        return group_rows(
            model,
            completions,
            coefficients,
            state.args.temperature,
            policy_entropy=float(entropy.double().sum()) / num_tokens,
            num_tokens=num_tokens,
            num_prompts=num_prompts,
            batch_size=len(index),
        )


def in_chunks(cache: Cache, name: str, num: int, size: int, chunk: Callable[[int], Tensor]) -> Tensor:
    """The first `num` rows from chunks of `size` rows. Stored chunks are used again, also when `num` grows later."""
    indices = tqdm(range(-(-num // size)), desc=name, unit="chunk", mininterval=1.0)
    parts = [cache.get(f"{name}-{size}-{index:05d}", partial(chunk, index)) for index in indices]
    return torch.cat(parts)[:num]
