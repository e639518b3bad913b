"""
What TRL's trainer and ours keep in memory between two steps, and transformers does not save.

Without it a resumed run is another run when the checkpoint falls inside a generation window (`steps_per_generation`
above the accumulation, `num_iterations` above 1), from the second epoch on, or between two log lines. Written against
trl 1.16 and transformers 5.23; `tests/contracts` holds the facts.
"""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device

from trl_entropy.trainer.curriculum import PassRateSampler

if TYPE_CHECKING:
    from trl_entropy.trainer.dr_grpo import DrGRPOTrainer


def file_of(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"training_state_{rank}.pt"


def save(trainer: DrGRPOTrainer, checkpoint: Path) -> None:
    """Write this process's file into the checkpoint."""
    torch.save(collect(trainer), file_of(checkpoint, trainer.args.process_index))


def load(trainer: DrGRPOTrainer, checkpoint: Path) -> None:
    """Put back what [`save`] wrote, but for what `train()` resets after this: see [`restore_log_window`]."""
    path = file_of(checkpoint, trainer.args.process_index)
    restore(trainer, torch.load(path, weights_only=True, map_location="cpu"))


def collect(trainer: DrGRPOTrainer) -> dict[str, Any]:
    """Everything, as tensors, numbers, strings and containers of them."""
    window = trainer.args.steps_per_generation * trainer.num_iterations
    inside_window, sampler = trainer._step % window != 0, trainer._train_sampler
    return {
        "step": trainer._step,
        "buffered_inputs": trainer._buffered_inputs if inside_window else None,
        "logs": plain_logs(trainer._logs) if inside_window else None,
        "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
        "log_window": {
            "tr_loss": trainer._tr_loss.detach().clone(),
            "globalstep_last_logged": trainer._globalstep_last_logged,
        },
        "num_groups": trainer._num_groups,
        "step_prompts": [sorted(prompts) for prompts in trainer._step_prompts],
        "curriculum": sampler.state_dict() if isinstance(sampler, PassRateSampler) else None,
        "replacements": None if trainer._replacements is None else trainer._replacements.state_dict(),
        "probes": {name: probe.state_dict() for name, probe in trainer.named_probes().items()},
    }


def restore(trainer: DrGRPOTrainer, state: dict[str, Any]) -> None:
    trainer._step = state["step"]
    trainer._buffered_inputs = send_to_device(state["buffered_inputs"], trainer.accelerator.device)
    if state["logs"] is not None:
        restore_logs(trainer._logs, state["logs"])
    trainer._metrics["train"] = defaultdict(list, state["metrics"])
    trainer._num_groups = state["num_groups"]
    trainer._step_prompts = deque(map(set, state["step_prompts"]), maxlen=trainer._step_prompts.maxlen)
    trainer._log_window = state["log_window"]
    if state["curriculum"] is not None:
        trainer._train_sampler.load_state_dict(state["curriculum"], trainer.resumed_within_epoch)
    if trainer._replacements is not None:
        trainer._replacements.load_state_dict(state["replacements"], within_epoch=False)
    for name, probe in trainer.named_probes().items():
        if name in state["probes"]:  # a probe may be turned on later
            probe.load_state_dict(state["probes"][name])


def restore_log_window(trainer: DrGRPOTrainer) -> None:
    """The loss since the last log line, which transformers' loop sets to zero before `on_train_begin`."""
    window = trainer._log_window
    if window is not None:
        trainer._tr_loss = window["tr_loss"].to(trainer.args.device)
        trainer._globalstep_last_logged = window["globalstep_last_logged"]
        trainer._log_window = None


def plain_logs(logs: dict[str, Any], last: int = 0) -> dict[str, Any]:
    """TRL's tables of the last completions without images, deques as lists; of the `last` rows only, 0: all."""
    return {
        name: {key: list(column)[-last:] for key, column in value.items()}
        if isinstance(value, dict)
        else list(value)[-last:]
        for name, value in logs.items()
        if name != "images"
    }


def restore_logs(logs: dict[str, Any], saved: dict[str, Any]) -> None:
    """Put what [`plain_logs`] took in place of the tables' rows."""
    for name, value in saved.items():
        columns = value.items() if isinstance(value, dict) else [(None, value)]
        for key, rows in columns:
            column = logs[name] if key is None else logs[name][key]
            column.clear()
            column.extend(rows)
