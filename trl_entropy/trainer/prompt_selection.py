"""
`PromptSelectingTrainer`: selects the prompts that a step learns from, by pass rate (`curriculum`) and by replacing
groups whose rewards are all equal (`resample_uninformative_groups`).

Every override calls `super()`, and was written against trl 1.16 and transformers 5.23.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_entropy.rollouts.batch import GenerationBatch, loss_mask_of
from trl_entropy.rollouts.drawing import prompt_key, prompts_of
from trl_entropy.rollouts.groups import group_numbers, groups_with_different_rewards
from trl_entropy.runs.state import StateOwner
from trl_entropy.runs.step_files import write_dropped
from trl_entropy.trainer.curriculum import PassRateSampler
from trl_entropy.trainer.group_resampling import (
    Place,
    ScoredRound,
    chosen_groups,
    dropped_logs,
    filled_batch,
    filled_logs,
    filled_rewards,
    round_size,
)
from trl_entropy.trainer.resumable import ResumableTrainer
from trl_entropy.trainer.training_state import plain_logs, restore_logs

logger = logging.getLogger(__name__)


class PromptSelectingTrainer(ResumableTrainer):
    """
    The part of [`~trl_entropy.DrGRPOTrainer`] for `curriculum` and `resample_uninformative_groups`.

    TRL's own metrics (`reward`, `completions/*`, ...) describe the prompts as they were first drawn; the batch that is
    trained on, the logged completions and `_rewards` have the replacements.

    Attributes:
        pass_reward: total reward from which on a completion counts as passed, for `curriculum`.
        first_round: what was drawn last, before any group was replaced; None if none could have been.
    """

    pass_reward = 1.0
    first_round: ScoredRound | None = None
    _rewards: Tensor  # of the completions that were scored last, on all ranks; set by `ProbedTrainer`
    _replacements: PassRateSampler | None = None
    _has_warned_of_no_reward = False

    def begin_training(self) -> None:
        super().begin_training()
        self._has_warned_of_no_reward = False

    def state_owners(self) -> dict[str, StateOwner]:
        owners = super().state_owners()
        if isinstance(self._train_sampler, PassRateSampler):
            owners["curriculum"] = self._train_sampler
        if self._replacements is not None:
            owners["replacements"] = self._replacements
        return owners

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.curriculum == "none" and not self.args.resample_uninformative_groups:
            return super()._get_train_sampler(*args, **kwargs)
        self._rows_of_prompt: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts_of(self.train_dataset)):
            self._rows_of_prompt[prompt].append(row)
        if self.args.curriculum == "none":
            # Its pass rates are never updated, so it goes through the shuffled dataset.
            self._replacements = self._new_sampler()
            return super()._get_train_sampler(*args, **kwargs)
        self._train_sampler = self._new_sampler()
        return self._train_sampler

    def _new_sampler(self, **buckets: Any) -> PassRateSampler:
        """Make a sampler; a subclass may pass other `buckets`, arguments of the sampler, than the defaults."""
        return PassRateSampler(
            num_prompts=len(self.train_dataset),
            batch_size=self.args.generation_batch_size // self.num_generations,
            mini_repeat_count=self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
            **buckets,
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        unscored = rewards_per_func.isnan().all(dim=1)  # as in TRL: no function returned a reward
        if self.model.training and unscored.all():
            self._warn_of_no_reward(len(unscored))
        return rewards_per_func

    def _warn_of_no_reward(self, num_completions: int) -> None:
        """Say once in a training that a generation has no reward at all."""
        if self._has_warned_of_no_reward or not self.is_world_process_zero():
            return
        self._has_warned_of_no_reward = True
        logger.warning(
            "step %d: no reward arrived. Every reward function (%s) returned None or nan for each of the %d "
            "completions, so that this step learns nothing from rewards. Later steps without a reward are not "
            "announced; metrics.jsonl names them under not_finite.",
            self.state.global_step + 1,
            ", ".join(self.reward_func_names),
            num_completions,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> GenerationBatch:
        columns = list(inputs[0])
        batch = self._scored_generation(inputs)
        if not self.model.training:
            return batch
        self.first_round = None
        self._learn_pass_rates()
        if self.args.resample_uninformative_groups:
            batch = self._replace_uninformative_groups(batch, columns)
        if isinstance(self._train_sampler, PassRateSampler):
            sizes = self._train_sampler.bucket_sizes()
            self.record_metrics({f"curriculum/num_{name}": size for name, size in sizes.items()})
        return batch

    def _scored_generation(self, inputs: list[dict[str, Any]]) -> GenerationBatch:
        """TRL's batch of new completions; a subclass may add a tensor with a row for each."""
        return super()._generate_and_score_completions(inputs)

    # ---- curriculum

    def _learn_pass_rates(self) -> None:
        """Update the curriculum with the pass rates of the groups that were scored last, on all ranks."""
        if not isinstance(self._train_sampler, PassRateSampler):
            return
        passed = (self._rewards >= self.pass_reward).double()
        rates = passed.view(-1, self.num_generations).mean(dim=1).tolist()
        for prompt, rate in zip(self._prompts_scored_last(), rates, strict=True):
            self._train_sampler.update(dict.fromkeys(self._rows_of_prompt[prompt], rate))

    def _prompts_scored_last(self) -> list[str]:
        """The prompts of the groups that were scored last, on all ranks, in order."""
        prompts = list(self._logs["prompt"])[-len(self._rewards) :: self.num_generations]
        return [prompt_key(prompt) for prompt in prompts]

    # ---- uninformative groups

    def _replace_uninformative_groups(self, batch: GenerationBatch, columns: list[str]) -> GenerationBatch:
        """Draw and score other prompts until there are enough informative groups or rounds. Collective."""
        start, rounds = time.perf_counter(), [self._scored_round(batch)]
        taken = {row for prompt in self._prompts_scored_last() for row in self._rows_of_prompt[prompt]}
        with self._metrics_of_the_first_draw():
            while len(rounds) <= self.args.max_resample_rounds:
                rows = self._draw_replacements(rounds, taken)
                if not rows:
                    break
                taken.update(
                    row for n in rows for row in self._rows_of_prompt[prompt_key(self.train_dataset[n]["prompt"])]
                )
                batch = self._scored_generation(self._share_of(rows, columns))
                rounds.append(self._scored_round(batch))
                self._learn_pass_rates()
        self.first_round = rounds[0]
        chosen = chosen_groups([one.informative for one in rounds])
        self._record_resampling(rounds, time.perf_counter() - start)
        batch = rounds[0].batch if len(rounds) == 1 else self._filled(rounds, chosen)
        self._log_rounds(rounds, chosen)
        return batch

    def _scored_round(self, batch: GenerationBatch) -> ScoredRound:
        numbers = group_numbers(len(self._rewards), self.num_generations, 0, self._rewards.device)
        informative = groups_with_different_rewards(self._rewards, numbers)
        return ScoredRound(batch, self._rewards, informative, plain_logs(self._logs, last=len(self._rewards)))

    @contextlib.contextmanager
    def _metrics_of_the_first_draw(self) -> Iterator[None]:
        """TRL would add each round's value to its metrics and log the mean: keep only the first round's values."""
        kept, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        try:
            yield
        finally:
            self._metrics["train"] = kept
            kept["num_tokens"] = [self.state.num_input_tokens_seen]  # of all rounds

    def _draw_replacements(self, rounds: list[ScoredRound], taken: set[int]) -> list[int]:
        """Rows of the dataset for another round, as many as can be shared evenly; empty if no round is needed."""
        num_slots = len(rounds[0].informative)
        num_informative = sum(int(one.informative.sum()) for one in rounds)
        num_drawn = sum(len(one.informative) for one in rounds)
        if num_informative >= num_slots:
            return []
        unit = math.lcm(self.accelerator.num_processes, self.num_generations) // self.num_generations
        size = round_size(num_slots - num_informative, num_informative, num_drawn, unit, num_slots)
        source = self._train_sampler if self._replacements is None else self._replacements
        rows = source.draw(size, exclude=taken)
        return rows[: len(rows) // unit * unit]

    def _share_of(self, rows: list[int], columns: list[str]) -> list[dict[str, Any]]:
        """This process's inputs of a round: every row of the dataset repeated for each of its completions."""
        repeated = [row for row in rows for _ in range(self.num_generations)]
        share, rank = len(repeated) // self.accelerator.num_processes, self.accelerator.process_index
        examples = {row: self.train_dataset[row] for row in rows}
        return [
            {name: examples[row][name] for name in columns if name in examples[row]}
            for row in repeated[rank * share : (rank + 1) * share]
        ]

    def _filled(self, rounds: list[ScoredRound], chosen: list[tuple[int, int]]) -> GenerationBatch:
        """The batch of the chosen groups; sets rewards and logged completions to theirs. Collective."""
        rank, size = self.accelerator.process_index, self.num_generations
        pad_token_id = self._tokenizer.pad_token_id
        fill = {"prompt_ids": pad_token_id, "completion_ids": pad_token_id, "tool_mask": 1}
        batch = filled_batch(rounds, chosen, size, rank, fill)
        batch["num_items_in_batch"] = self.accelerator.gather(loss_mask_of(batch).sum()).sum()
        self._rewards = filled_rewards(rounds, chosen, size)
        restore_logs(self._logs, filled_logs(rounds, chosen, size))
        return batch

    def _log_rounds(self, rounds: list[ScoredRound], chosen: list[Place]) -> None:
        """Add the round of each completion to TRL's table of the step, and write the table of what was dropped."""
        if not self.log_completions:
            return
        column = self._logs["extra"]["resample_round"]
        column.clear()
        column.extend(number for number, _ in chosen for _ in range(self.num_generations))
        dropped = dropped_logs(rounds, chosen, self.num_generations)
        if dropped["rule"] and self.is_world_process_zero():
            run, keep = Path(self.args.output_dir), self.args.completions_files_keep
            write_dropped(run, self.state.global_step + 1, dropped, keep)

    def _record_resampling(self, rounds: list[ScoredRound], seconds: float) -> None:
        """Log how many groups were informative, and what each that is trained on has cost. Collective."""
        num_slots, num_drawn = len(rounds[0].informative), sum(len(one.informative) for one in rounds)
        num_informative = sum(int(one.informative.sum()) for one in rounds)
        num_accepted = min(num_informative, num_slots)
        tokens = torch.stack([loss_mask_of(one.batch).sum() for one in rounds]).sum()
        num_tokens = self.accelerator.reduce(tokens, reduction="sum").item()
        metrics = {
            "num_rounds": len(rounds) - 1,
            "num_uninformative": int((~rounds[0].informative).sum()),
            "num_kept_uninformative": num_slots - num_accepted,
            "num_unused": num_informative - num_accepted,
            "num_completions": num_drawn * self.num_generations,
            "informative_share": num_informative / num_drawn,
        }
        if num_accepted:
            metrics["completions_per_accepted_group"] = num_drawn * self.num_generations / num_accepted
            metrics["tokens_per_accepted_group"] = num_tokens / num_accepted
        self.record_metrics({f"resampling/{name}": value for name, value in metrics.items()})
        self.record_metrics({"time/resampling": seconds})
