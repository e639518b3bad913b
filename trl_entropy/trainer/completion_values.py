"""The numbers of completions whose change by a step the entropy probe measures: rewards, lengths, metrics."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.config.quantities import DEFAULT_QUANTITIES, keys_of_quantities
from trl_entropy.probes.probe import Probe
from trl_entropy.rollouts.generation import answer_end, last_turn
from trl_entropy.tasks.r1_template import ANSWER_CLOSE


class CompletionValues:
    """
    Takes the numbers of this process's completions that were generated and scored last.

    Attributes:
        keys: what is kept of a completion, as [`keys_of_quantities`] names it: that whose change the run's probes
            measure, and all metrics, which are logged of a probe's completions; empty: no probe measures a change.
        metric_names: the metric functions whose change is measured, which must be called at every step.
    """

    def __init__(self, rewards: Sequence[str], metrics: Sequence[str]) -> None:
        self._rewards, self._metrics = list(rewards), list(metrics)
        self.keys: tuple[str, ...] = ()
        self.metric_names: frozenset[str] = frozenset()
        self._known: dict[str, list[float]] = {}

    def take_from(self, probes: Sequence[Probe]) -> None:
        """
        Find out what the probes ask for.

        Raises:
            ValueError: for a name in `change_of` that the run does not have.
        """
        asking = [probe for probe in probes if probe.measures_quantities]
        names = {name: None for probe in asking for name in probe.change_of or DEFAULT_QUANTITIES}
        asked = keys_of_quantities(list(names), self._rewards, self._metrics) if names else ()
        self.metric_names = frozenset(key.split("/", 1)[1] for key in asked if key.startswith("metrics/"))
        metrics = [f"metrics/{name}" for name in self._metrics if asking]
        self.keys = tuple(dict.fromkeys([*asked, *metrics]))

    def note_ends(self, ended: Sequence[bool]) -> None:
        """What was generated has ended by itself, or was cut off."""
        self._known["truncated"] = [float(not one) for one in ended]

    def note_scores(self, rewards: Tensor, of_functions: Tensor, of_metrics: Mapping[str, list[float]]) -> None:
        """
        What was generated has these rewards and metrics.

        Args:
            rewards, of_functions: this process's rows: the weighted sums, and a column for each reward function.
        """
        if not self.keys:
            return
        self._known["reward"] = rewards.tolist()
        for name, column in zip(self._rewards, of_functions.unbind(1), strict=True):
            self._known[f"rewards/{name}"] = column.tolist()
        nothing = [math.nan] * len(rewards)
        self._known |= {f"metrics/{name}": of_metrics.get(name, nothing) for name in self._metrics}

    def columns(self, lengths: Tensor) -> dict[str, Float[Tensor, " B"]]:
        """
        The numbers by key, float64.

        Args:
            lengths: tokens of each completion that the policy drew.
        """
        known = self._known | {"length": lengths.tolist()}
        return {key: torch.tensor(known[key], dtype=torch.float64, device=lengths.device) for key in self.keys}


def have_ended(trainer: Any, completion_ids: list[list[int]], own_tokens: list[list[int]] | None) -> list[bool]:
    """
    Whether each completion ended by itself: with an end token, or with `stop_at_answer` at its answer.

    Args:
        own_tokens: 1 for each token that the policy drew, 0 for those of tools and environments; None: it drew all.
    """
    tokenizer = trainer._tokenizer
    ends = {*trainer.eos_token_ids, tokenizer.pad_token_id}
    ended = [bool(ids) and ids[-1] in ends for ids in completion_ids]
    if not trainer.args.stop_at_answer:
        return ended
    own_tokens = own_tokens or [[1] * len(ids) for ids in completion_ids]
    turns = [last_turn(ids, own) for ids, own in zip(completion_ids, own_tokens, strict=True)]
    return [
        one or answer_end(tokenizer, turn, ANSWER_CLOSE) is not None for one, turn in zip(ended, turns, strict=True)
    ]


@contextmanager
def scoring_leaves_no_trace(trainer: Any) -> Iterator[None]:
    """Inside, rewards and metrics are computed for a probe: nothing of it is logged, and no random state moves on."""
    names = ("_metrics", "_pending_extra_logs", "_pending_metrics", "_rewards")
    kept = {name: vars(trainer)[name] for name in names if name in vars(trainer)}
    states = random.getstate(), np.random.get_state()
    vars(trainer).update(
        _metrics=defaultdict(lambda: defaultdict(list)),
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
    )
    try:
        yield
    finally:
        vars(trainer).update(kept)
        random.setstate(states[0])
        np.random.set_state(states[1])
