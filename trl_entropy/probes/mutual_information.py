"""Whether completions depend on their prompts: their mutual information, by scoring each under other prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine import Engine, rank_symmetric
from trl_entropy.estimators.statistics.mutual_information import mutual_information
from trl_entropy.gradients.scores import Params, score
from trl_entropy.probes import model_checks
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.logged import with_stderr
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.groups import first_groups


class MutualInformationProbe(Probe):
    """
    Logs bounds on I(prompt; completion) of the policy before the step (T23), from completions of some of the step's
    prompts, each scored under all of these. Beside the entropy it parts a policy that is sure of its answer from one
    that says the same to every prompt: a collapse to a template that leaves the entropy as it is.

    What tools answer is taken to depend on their calls alone, so that its probability is the same under any prompt.

    Cost: `num_prompts` forward passes over the completions of `num_prompts` prompts.

    Args:
        every: cadence in steps.
        num_prompts: prompts over all processes; each process gives its first groups. No estimate exceeds its log.
        batch_size: completions scored at a time, at most; None: as many as memory allows.
    """

    name = "mutual_information"

    def __init__(self, every: int = 10, num_prompts: int = 8, batch_size: int | None = None) -> None:
        super().__init__(every)
        self.num_prompts, self.batch_size = num_prompts, batch_size

    @classmethod
    def from_config(cls, args: ProbeChecks) -> MutualInformationProbe:
        return cls(args.mutual_information_probe_every, args.mutual_information_num_prompts, args.probe_batch_size)

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        args.check_mutual_information(self.num_prompts)
        model_checks.check_full_distribution(args, model, "mutual_information_probe")
        model_checks.check_drawn_without_dropout(model, "mutual_information_probe")
        model_checks.check_scoring(model, "mutual_information_probe")

    def on_before_update(
        self,
        args,
        state,
        control,
        *,
        metrics,
        update,
        engine,
        rollouts: RolloutBatch,
        record: StepRecord,
        files: ProbeFiles,
        **kwargs: Any,
    ) -> None:
        num_rows = self.num_prompts // args.world_size * args.num_generations
        completions = Completions.of(rollouts).rows(first_groups(rollouts.prompt_index, num_rows))
        accelerator = engine.accelerator
        prompts, owner = prompts_of(completions)
        own = owner + accelerator.process_index * len(prompts[0])
        everyones = tuple(gathered_on_the_right(part, accelerator) for part in prompts)
        logps, log_weights = self._score(engine, args.temperature, update.params_before, completions, everyones, own)
        everyone = {"logps": logps, "own": own, "prompt_index": completions.prompt_index}
        if completions.sampling_logps is not None:  # drawn by another than the policy
            everyone["log_weights"] = log_weights
        table = {name: accelerator.gather(rows) for name, rows in everyone.items()}
        bounds = mutual_information(table["logps"], table["own"], table.get("log_weights"))
        for name, estimate in bounds._asdict().items():
            metrics |= with_stderr(f"mutual_information/{name}", estimate)
        metrics |= {
            "mutual_information/limit": math.log(self.num_prompts),
            "mutual_information/num_prompts": self.num_prompts,
            "mutual_information/num_completions": bounds.lower.num_samples,
        }
        files.write_gathered(self.name, record.step, table)
        files.write_rollouts(record.step, record.rollouts)

    def _score(
        self,
        engine: Engine,
        temperature: float,
        params: Params,
        completions: Completions,
        prompts: tuple[Int[Tensor, "P S"], Int[Tensor, "P S"]],
        own: Int[Tensor, " N"],
    ) -> tuple[Float[Tensor, "N P"], Float[Tensor, " N"]]:
        """
        S_i(x_j) of this rank's completions under all prompts, and log pi less that of what drew each, under its own;
        if one rank fails, all do.
        """
        columns, log_weights = [], torch.zeros(len(own), dtype=torch.float64, device=own.device)
        with (
            rank_symmetric(engine.accelerator, "scoring completions under other prompts"),
            engine.scoring_model(params, differentiated=False) as model,
        ):
            for place, prompt in enumerate(zip(*prompts, strict=True)):
                given = under_prompt(completions, *prompt)
                logps = score(model, given, temperature, self.batch_size, params).logps[0]
                ratio = (logps.double() - given.drawn_with(logps).double()).where(given.loss_mask.bool(), 0.0).sum(1)
                log_weights = ratio.where(own == place, log_weights)
                columns.append(logps.double().sum(1))
        return torch.stack(columns, dim=1), log_weights


def prompts_of(completions: Completions) -> tuple[tuple[Int[Tensor, "P S"], Int[Tensor, "P S"]], Int[Tensor, " N"]]:
    """The tokens and masks of the different prompts, ordered by the number of their group, and which each row has."""
    numbers, owner = completions.prompt_index.unique(return_inverse=True)
    rows, end = torch.arange(len(owner), device=owner.device), completions.prompt_columns
    first = torch.full_like(numbers, len(owner)).scatter_reduce(0, owner, rows, "amin")
    return (completions.input_ids[first, :end], completions.attention_mask[first, :end]), owner


def gathered_on_the_right(rows: Int[Tensor, "P S"], accelerator: Accelerator) -> Int[Tensor, "N W"]:
    """The rows of all ranks, which may be of different widths, aligned on the right. Collective."""
    width = int(accelerator.gather(torch.tensor([rows.shape[1]], device=rows.device)).max())
    return accelerator.gather(torch.nn.functional.pad(rows, (width - rows.shape[1], 0)))


def under_prompt(completions: Completions, ids: Int[Tensor, " S"], mask: Int[Tensor, " S"]) -> Completions:
    """The completions as if all of them had answered one prompt."""
    end, count = completions.prompt_columns, len(completions)
    types = {  # of prompts without an image: 0
        name: torch.cat([torch.zeros_like(ids).expand(count, -1), columns[:, end:]], dim=1)
        for name, columns in completions.column_types.items()
    }
    both = {
        "input_ids": torch.cat([ids.expand(count, -1), completions.input_ids[:, end:]], dim=1),
        "attention_mask": torch.cat([mask.expand(count, -1), completions.attention_mask[:, end:]], dim=1),
        "prompt_index": torch.zeros_like(completions.prompt_index),
    }
    return replace(completions, **both, first_position=None, column_types=types)
