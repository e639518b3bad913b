"""`watch_step`: what one `optimizer.step()` of any PyTorch loop did to the entropy, without a trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trl_entropy.engine import Engine, build_engine, rank_symmetric
from trl_entropy.engine.build import sharded_engine
from trl_entropy.engine.context import Differences
from trl_entropy.estimators.entropy_change.delta_entropy import policy_entropy
from trl_entropy.estimators.entropy_change.step_change import (
    importance_sample_size,
    point_terms,
    stacked,
    step_changes,
    unstacked,
)
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.gradients.scores import score
from trl_entropy.probes.model_checks import check_scoring
from trl_entropy.rollouts.completions import Completions


@dataclass
class WatchedStep:
    """
    What the step did, in nats per token; every field is None until the `with` block has ended.

    Attributes:
        entropy: the policy's entropy before the step (T6).
        measured: its change (T7), by both ends' weights of the same completions.
        linear: what the first derivative before the step says of the whole of it (T8).
        trapezoid: the mean of the first derivatives at both ends (T10).
        linear_error, trapezoid_error: these less `measured`; all are on the same completions, so that the standard
            errors are small.
        importance_ess: how many equally weighted completions tell as much as these, reweighted to the other end (T3).
    """

    entropy: Estimate | None = None
    measured: Estimate | None = None
    linear: Estimate | None = None
    trapezoid: Estimate | None = None
    linear_error: Estimate | None = None
    trapezoid_error: Estimate | None = None
    importance_ess: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The numbers under the names that the entropy probe logs: `entropy/delta_measured`, `..._stderr`, ..."""
        names = {"entropy": "probe_batch", "linear_error": "error_linear", "trapezoid_error": "error_trapezoid"}
        logged: dict[str, float] = {}
        for field in fields(self):
            value, name = getattr(self, field.name), names.get(field.name, f"delta_{field.name}")
            if isinstance(value, Estimate):
                logged |= {f"entropy/{name}": value.value, f"entropy/{name}_stderr": value.stderr}
        return logged | ({} if self.importance_ess is None else {"entropy/importance_ess": self.importance_ess})


@contextmanager
def watch_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Int[Tensor, "B L"],
    completion_mask: Int[Tensor, "B T"],
    prompt_index: Int[Tensor, " B"],
    *,
    sampling_logps: Float[Tensor, "B T"] | None = None,
    loss_mask: Int[Tensor, "B T"] | None = None,
    drawn_after: bool = False,
    temperature: float = 1.0,
    derivatives: bool = True,
    batch_size: int | None = None,
) -> Iterator[WatchedStep]:
    """
    Measures what the update inside the block does to the policy's entropy, on completions that are not the update's.

        with watch_step(model, optimizer, ids, mask, completion_mask, prompt_index) as watched:
            optimizer.step()
        print(watched.measured.value, watched.measured.stderr)

    The model may be in one process, in DDP, or sharded by FSDP2 (`fully_shard`): then every process enters with rows
    of its own, equally many, and gets the numbers of all. Both ends are scored in float32 and evaluation mode; model,
    gradients and the optimizer's state are as the block leaves them. Cost: two forward passes of the completions, with
    `derivatives` about eight.

    Args:
        model: as the loop calls it, also where it is wrapped by DDP or sharded; a transformers causal language model.
        optimizer: the one that steps inside the block; any.
        input_ids, attention_mask: prompts on the left, completions in the last T columns, padded on both sides.
        completion_mask: 1 for a completion's tokens, its end token included.
        prompt_index: number of each row's prompt, over all processes. Errors are by the jackknife over prompts, so two
            are needed. **No completion may be among those of the update**: else first order and error are
            biased.
        sampling_logps: log-probabilities of the tokens under what drew them, nats, where that is neither end's policy.
        loss_mask: 1 for the tokens that the policy drew; as `completion_mask` if there are no tools.
        drawn_after: the policy after the step drew the completions, not the one before it.
        temperature: what the logits are divided by.
        derivatives: also predict the change.
        batch_size: completions at a time, at most; None: as many as memory allows.

    Yields:
        A [`WatchedStep`], filled when the block ends without an exception.

    Raises:
        NotImplementedError: for models that no engine reads (FSDP of version 1, other shardings): says what works.
        ValueError: if a trainable parameter is in no group of the optimizer, or the model cannot be scored exactly
            (as the probes refuse it: padding that moves its scores, virtual tokens, no forward mode); on all
            processes, if they have different numbers of rows.
    """
    completions = Completions(
        input_ids,
        attention_mask,
        completion_mask,
        prompt_index,
        sampling_logps,
        loss_mask=completion_mask if loss_mask is None else loss_mask,
    )
    engine = _engine_of(model, optimizer, input_ids.device)
    check_equal_rows(engine.accelerator, len(completions))
    check_scoring(engine.module, "watch_step", derivatives)
    before = {name: share.detach().clone() for name, share in engine.theta().items()}
    watched = WatchedStep()
    yield watched
    ends = before, engine.theta()
    measure_step(watched, engine, ends, completions, drawn_after, temperature, derivatives, batch_size)


def check_equal_rows(accelerator: Accelerator, number: int) -> None:
    """Raises `ValueError` on all processes unless each has as many rows, as what is gathered must. Collective."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device)).tolist()
    if len(set(numbers)) > 1:
        raise ValueError(
            "watch_step needs equally many completions on every process, and they have "
            f"{', '.join(map(str, numbers))}. Give each {min(numbers)}."
        )


def measure_step(
    watched: WatchedStep,
    engine: Engine,
    shares: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    completions: Completions,
    drawn_after: bool,
    temperature: float,
    derivatives: bool,
    batch_size: int | None,
) -> None:
    """Fills `watched`; `shares` are this process's of theta before and after the step. Collective."""
    before, after = (engine.assemble(one, copy=True) for one in shares)
    direction = None
    if derivatives:
        direction = engine.assemble(Differences(shares[1], shares[0]))
    ends = []
    for params in (before, after):
        with (
            rank_symmetric(engine.accelerator, "scoring the completions"),
            engine.scoring_model(params, differentiated=False) as scored,
        ):
            ends.append(score(scored, completions, temperature, batch_size, params, direction, int(derivatives)))
    drawn_with = completions.drawn_with(ends[drawn_after].logps[0])
    points = []
    for scores in ends:
        terms = point_terms(scores.entropy, scores.logps, drawn_with, completions.loss_mask)
        points.append(unstacked(engine.accelerator.gather(stacked(terms))))
    prompts = engine.accelerator.gather(completions.prompt_index)
    changes = step_changes(*points)
    watched.entropy = policy_entropy(points[0].terms).estimate(prompts)
    for name, change in changes.items():
        setattr(watched, name, change.estimate(prompts))
        if name != "measured":
            setattr(watched, f"{name}_error", (change - changes["measured"]).estimate(prompts))
    watched.importance_ess = importance_sample_size(points[drawn_after], points[not drawn_after])


def _engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Engine:
    """Reads theta as it is spread over processes; accelerate's state is the loop's own, if it has one."""
    accelerator = Accelerator(cpu=device.type == "cpu")
    if isinstance(model, FSDPModule):
        return sharded_engine(accelerator, model, optimizer, max_grad_norm=0.0)
    return build_engine(accelerator, model, optimizer, max_grad_norm=None)
