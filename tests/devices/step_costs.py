"""
Seconds and peak memory of a step at Qwen2.5-1.5B's shape, without and with each probe and control.

Weights are random. A step has 64 completions of 100 to 200 random tokens after prompts of about 100, in micro-batches
of 16; LoRA, precision and checkpointing are those of configs/qwen2.5-1.5b-gsm8k.yaml, and E has a quarter of the
completions as there. The reference's steps are 32 times larger: what a probe costs for each completion keeps its
ratio, and what it costs for each step (reading moments, say) weighs less there.

Does it fit? A token costs 2 x 1.54e9 = 3.1e9 FLOPs forward; a step's 64 x 300 = 19,200 tokens cost a forward pass F =
6e13. Training (forward, recomputed, backward by the inputs) is 3 F in bf16: 0.6 s at 300 TFLOP/s. Probes compute in
float32, 45 of an H100's 67 TFLOP/s: F is 1.3 s. In F: E forward and forward mode 8/4, second order (8 + 13)/4,
attribution by completion 8/4 + 3/4 + 3, by token 8/4 + 4, rollouts 7, within-prompt noise 3, kernel of half of the
completions 5/2, control 1 or 4.5, KL 1. Together 45 F or so = 60 s for one step of each; each is measured in one step
after one that is not, and builds a trainer (3 s): 17 x 3 + 2 x (60 + 17 x 0.8) = 200 s, and the steps without
any, which are measured after every third row, 7 x (3 + 2 x 0.8) = 32 s. That is less than half of ten minutes; the
checks before it take 30 trainings on CPU and GPU, 150 s, and three launches, 90 s.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from tests.devices.replayed import (
    CLIP_COV,
    FISHER,
    HOLD,
    INFORMATION,
    ReplayTrainer,
    Settings,
    adapter,
    build_trainer,
    smallest_model,
)
from trl_entropy import DrGRPOTrainer
from trl_entropy.preflight.shapes import KNOWN_SHAPES

MODEL = "Qwen/Qwen2.5-1.5B"
NUM_E = 16
_E: Settings = {"entropy_probe": True, "entropy_probe_num_completions": NUM_E}
_HELD_OUT = _E | {"entropy_probe_completions": "held_out"}
_CONTROL = HOLD | {"entropy_control_num_completions": NUM_E}
COSTS: dict[str, Settings] = {
    "`entropy_probe`": _E,
    "`entropy_probe`, `entropy_prediction: linear`": _E | {"entropy_prediction": "linear"},
    "`entropy_probe`, `held_out`": _HELD_OUT,
    "`entropy_second_order`": _HELD_OUT | {"entropy_second_order": True},
    "`entropy_placebo`": _E | {"entropy_placebo": True},
    "`entropy_attribution: sequence`": _E | {"entropy_attribution": "sequence"},
    "`entropy_attribution: token`": _E | {"entropy_attribution": "token"},
    "`entropy_probe_completions: rollouts`": {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    "`noise_scale_probe`": {"noise_scale_probe": True},
    "`noise_scale_within_prompt`": {"noise_scale_probe": True, "noise_scale_within_prompt": True},
    "`noise_scale_from: micro_batches`": {"noise_scale_probe": True, "noise_scale_from": "micro_batches"},
    "`fisher_probe`, 32 completions": FISHER | {"fisher_num_sequences": 32, "fisher_sketch_dim": 4096},
    "`likelihood_probe`": {"likelihood_probe": True},
    "`mutual_information_probe`": INFORMATION,
    "`kl_every`": {"kl_every": 1},
    "`effective_sample_size_probe`, `optimizer_state_probe`": {
        "effective_sample_size_probe": True,
        "optimizer_state_probe": True,
    },
    "`entropy_control: hold`": _CONTROL,
    "`entropy_control: hold`, `rollouts`": HOLD | {"entropy_control_completions": "rollouts"},
    "`token_control: clip_cov`": CLIP_COV,
}
NOTHING = "nothing"
REST = 3  # rows between two measurements of steps with nothing on


class Cost(NamedTuple):
    """
    One measured step: seconds, the mean of steps without probes before and after, and GiB at the peak.

    Attributes:
        error: why there are no numbers; empty if there are.
    """

    name: str
    seconds: float
    seconds_without: float
    peak: float
    error: str = ""

    @property
    def ratio(self) -> float:
        return self.seconds / self.seconds_without


class Stopwatch(TrainerCallback):
    """Seconds of the last step; waits for the device before and after it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self.seconds = time.perf_counter() - self.start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def costs(device: str, deadline: float, only: str = "") -> Iterator[Cost]:
    """
    The rows of the table, each when it and the steps without probes around it are measured.

    Args:
        deadline: of `time.monotonic`; rows that would begin later are left out.
        only: a text that a row's name must have.
    """
    names = [name for name in COSTS if only in name]
    if not names:
        return
    before, peak = _measured(device, {})
    yield Cost(NOTHING, before, before, peak)
    waiting: list[tuple[str, float, float]] = []
    for number, name in enumerate(names, start=1):
        in_time = time.monotonic() < deadline
        if in_time:
            try:
                waiting.append((name, *_measured(device, COSTS[name])))
            except Exception as error:  # the other rows are worth having
                traceback.print_exc(limit=-6, file=sys.stderr)
                yield Cost(name, math.nan, math.nan, math.nan, " ".join(f"{type(error).__name__}: {error}".split()))
        if waiting and (not in_time or number % REST == 0 or number == len(names)):
            after = _measured(device, {})[0]
            yield from (Cost(what, seconds, (before + after) / 2, peak) for what, seconds, peak in waiting)
            before, waiting = after, []
        if not in_time:
            return


def _measured(device: str, settings: Settings) -> tuple[float, float]:
    """Seconds of a training's second step, and its peak in GiB (nan on a CPU)."""
    on_gpu, watch = device == "cuda", Stopwatch()
    gc.collect()  # the last trainer, which refers to itself
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    lengths = (100, 200) if on_gpu else (8, 12)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ReplayTrainer, "lengths", lengths):
        trainer = _trainer(Path(folder), device, watch, settings)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    return watch.seconds, peak


def _trainer(folder: Path, device: str, watch: Stopwatch, settings: Settings) -> DrGRPOTrainer:
    size: Settings = {
        "num_generations": 8, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "max_steps": 2,
        "probe_batch_size": 16, "probe_files_keep": 0,
    }  # fmt: skip
    if device == "cuda":
        size |= {"max_completion_length": 200, "bf16": True, "learning_rate": 1e-6, "gradient_checkpointing": True}
        size |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = _random_model(device) if device == "cuda" else smallest_model()
    prefix = "Ann has 3 apples and buys 4 more. " * (3 if device == "cuda" else 0)  # about 100 tokens
    return build_trainer(
        folder, device == "cpu", adapter(rank=64), model=model, prefix=prefix, callbacks=[watch], **(size | settings)
    )


def _random_model(device: str) -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**KNOWN_SHAPES[MODEL]), dtype=torch.bfloat16)


def table(rows: list[Cost]) -> list[str]:
    """Markdown."""
    lines = ["| with | s/step | without | ratio | peak GiB |", "| --- | --- | --- | --- | --- |"]
    return lines + [
        f"| {row.name} | {row.error[:160]} | | | |"
        if row.error
        else f"| {row.name} | {row.seconds:.2f} | {row.seconds_without:.2f} | {row.ratio:.2f} | {row.peak:.1f} |"
        for row in rows
    ]
