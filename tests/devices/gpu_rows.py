"""The checks of `launch/gpu-check.sh`: what a GPU may do otherwise than a CPU, one row each."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import PreTrainedModel

from tests.devices.replayed import (
    CASES,
    FISHER,
    HELD_OUT,
    JOINED,
    SECOND_ORDER,
    ReplayTrainer,
    Settings,
    StopAfter,
    adapter,
    smallest_model,
    train,
)
from tests.distributed.launching import launch
from trl_entropy import DrGRPOTrainer
from trl_entropy.evaluation.plan import PROFILES, settings_of
from trl_entropy.evaluation.sampling import Sampler
from trl_entropy.gradients.scores import score
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.rollouts.drawing import pack_completions

# Numbers that are compared between CPU and GPU: those that float32's rounding leaves at least two digits of.
COMPARED = (
    "reward", "grad_norm", "kl", "entropy/policy", "entropy/delta_linear", "entropy/delta_trapezoid",
    "entropy/delta_second_order", "entropy/delta_cross_prompt", "entropy/share_momentum",
    "noise_scale/grad_variance_trace", "fisher/diagonal", "fisher/change_slope", "entropy_control/delta_optimizer",
    "optimizer_state/exp_avg_p50", "ess/loss_weights", "token_control/mean_covariance", "resampling/num_completions",
    "curriculum/num_normal",
)  # fmt: skip
LARGEST_DIFFERENCE = 0.02
EVERY_PROBE: Settings = {
    **(HELD_OUT | FISHER),
    **{"entropy_attribution": "token", "noise_scale_probe": True, "optimizer_state_probe": True},
}


class Verdict(NamedTuple):
    """`result` is ok, FAIL, refused (the package says that it does not do this) or skipped."""

    result: str
    detail: str


Check = Callable[[], Verdict]


def checks(device: str) -> dict[str, Check]:
    """The rows of the first table, by name, for `"cuda"` or `"cpu"`."""
    found: dict[str, Check] = {}
    for name, settings in CASES.items():
        found[f"{name}, LoRA"] = _same_on_both(device, settings, lora=True)
    for name, settings in JOINED.items():
        found[f"{name}, full"] = _same_on_both(device, settings, lora=False)
    found |= {
        "probes leave training as it is, bit for bit": lambda: _leaves_training(device),
        "resumed is uninterrupted, bit for bit": lambda: _resumes(device),
        "bf16, recomputed activations": lambda: _in_bf16(device),
        "out of memory, planted": lambda: _halves(device),
        "out of memory, real": lambda: _runs_out(device),
        "evaluation": lambda: _evaluates(device),
    }
    for engine in ("zero2", "zero3", "fsdp2"):
        found[f"{engine}, one process"] = _with_engine(device, engine)
    return found


# ---- CPU against device


def _same_on_both(device: str, settings: Settings, lora: bool) -> Check:
    def check() -> Verdict:
        rows = []
        for use_cpu in (True,) if device == "cpu" else (False, True):
            with tempfile.TemporaryDirectory() as folder:
                peft = adapter() if lora else None
                rows.append(train(Path(folder), use_cpu, model=smallest_model(), lora=peft, **settings)[1])
        return compared(rows[0], rows[-1])

    return check


def compared(there: list[dict], here: list[dict]) -> Verdict:
    """Whether the metrics of two runs have the same keys, and numbers that agree."""
    number, worst, name = 0, 0.0, "-"
    for one, other in zip(there, here, strict=True):
        if one.keys() != other.keys():
            return Verdict("FAIL", f"other keys: {', '.join(sorted(one.keys() ^ other.keys())[:4])}")
        for key in (key for key in COMPARED if isinstance(one.get(key), float) and one[key] == one[key]):
            difference = abs(one[key] - other[key]) / max(abs(other[key]), 1e-6)
            number += 1
            worst, name = max((worst, name), (difference, key))
    right = number > 0 and worst < LARGEST_DIFFERENCE
    return Verdict("ok" if right else "FAIL", f"{number} numbers, at most {worst:.1e} from the CPU's ({name})")


# ---- on the device alone


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """With attention that is: the float32 backward of torch's fused one is not."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _eager_model() -> PreTrainedModel:
    model = smallest_model()
    model.set_attn_implementation("eager")
    return model


def _leaves_training(device: str) -> Verdict:
    """Off against off first: what a device itself leaves different says nothing about probes."""

    def weights(**settings: Any) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return train(Path(folder), device == "cpu", model=_eager_model(), trainer=DrGRPOTrainer, **settings)[0]

    with _deterministic():
        off, again, on = weights(), weights(), weights(**EVERY_PROBE)
        other = weights(learning_rate=1.001e-3)
    if not torch.equal(off, again):
        return Verdict("FAIL", "two trainings without probes differ: the device itself is not deterministic")
    if torch.equal(off, other):
        return Verdict("FAIL", "another learning rate changes nothing: the comparison is blind")
    return Verdict("ok" if torch.equal(off, on) else "FAIL", "off = off = on, and another learning rate is not")


def _resumes(device: str) -> Verdict:
    def weights(folder: str, **settings: Any) -> torch.Tensor:
        settings = SECOND_ORDER | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | settings
        return train(Path(folder), device == "cpu", model=_eager_model(), trainer=DrGRPOTrainer, **settings)[0]

    with _deterministic(), tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole = weights(one)
        interrupted = weights(other, callbacks=[StopAfter(2)])
        resumed = weights(other, resume="latest")
    right = torch.equal(whole, resumed) and not torch.equal(whole, interrupted)
    return Verdict("ok" if right else "FAIL", "4 steps against 2 steps, a stop, and 2 more")


def _in_bf16(device: str) -> Verdict:
    more = {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(build_tokenizer(), seed=0).to(torch.bfloat16)
        settings = SECOND_ORDER | FISHER | {"noise_scale_probe": True} | more
        _, rows = train(Path(folder), device == "cpu", model=model, lora=adapter(), **settings)
    return consistent(rows[-1])


def consistent(row: dict[str, float]) -> Verdict:
    """Whether the numbers of a step agree that are computed in two ways."""
    measured, trapezoid = row["entropy/delta_measured"], row["entropy/delta_trapezoid"]
    off, error = abs(trapezoid - measured) / abs(measured), row["noise_scale/gradient_error"]
    detail = f"trapezoid and measured change differ by {off:.1e}, groups' gradients and the step's by {error:.1e}"
    return Verdict("ok" if off < 0.05 and error < 0.05 else "FAIL", detail)


# ---- memory


def _halves(device: str) -> Verdict:
    """Passes of a probe over more than two completions run out of memory; the numbers must stay."""
    refused, settings = [], HELD_OUT | {"entropy_attribution": "sequence", "max_steps": 1}

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if not module.training and len(kwargs["input_ids"]) > 2:
            refused.append(len(kwargs["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory. This one is planted.")

    rows = []
    for plants in (True, False):
        model = smallest_model()
        if plants:
            model.register_forward_pre_hook(refuse, with_kwargs=True)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(train(Path(folder), device == "cpu", model=model, lora=adapter(), **settings)[1])
    verdict = compared(*rows)
    right = bool(refused) and verdict.result == "ok"
    return Verdict("ok" if right else "FAIL", f"{len(refused)} times out of memory and went on; {verdict.detail}")


def _runs_out(device: str) -> Verdict:
    """1.2 GB are left for passes that want more; they are planned smaller, or halved when they do not fit."""
    if device == "cpu":
        return Verdict("skipped", "a CPU gives no error to halve a batch on")
    torch.cuda.empty_cache()
    total, before = torch.cuda.mem_get_info()[1], torch.cuda.memory_stats().get("num_ooms", 0)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 1.2e9) / total))
    long = {"max_completion_length": 200, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
    long |= HELD_OUT | {"entropy_probe_num_completions": 48, "entropy_attribution": "sequence", "max_steps": 1}
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(ReplayTrainer, "lengths", (150, 200)):
            train(Path(folder), False, lora=adapter(), **long)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    number = torch.cuda.memory_stats().get("num_ooms", 0) - before
    return Verdict("ok", f"{number} times out of memory within 1.2 GB, and went on")


# ---- evaluation, and other engines


def _evaluates(device: str) -> Verdict:
    """What the device draws and scores is scored again on the CPU."""
    task = {"task": "word_problems", "seed": 0, "max_completion_length": 12, "temperature": 0.7, "reward_funcs": []}
    settings = settings_of(task, PROFILES["quick"], num_samples=4)
    tokenizer, model = build_tokenizer(), smallest_model().eval().to(device)
    prompts = ["Ann has 3 apples.", "Cleo", "Ben has 4 coins and gets 2 more."]
    rows = dict(Sampler(model, tokenizer, settings, 8).draw([{"prompt": prompt} for prompt in prompts], greedy=False))
    model, worst = model.cpu(), 0.0
    for place, row in rows.items():
        packed = pack_completions([tokenizer(prompts[place])["input_ids"]], [row["completion_ids"]], 0, 0, "cpu")
        again = score(model, packed, task["temperature"], 1).logps[0][0]
        worst = max(worst, (again - torch.tensor(row["logps"])).abs().max().item())
    return Verdict("ok" if worst < 1e-3 else "FAIL", f"scores of {len(rows)} completions at most {worst:.1e} nats off")


def _with_engine(device: str, engine: str) -> Check:
    """In a process of its own, by the launch file that a user takes."""

    def check() -> Verdict:
        if engine.startswith("zero"):
            try:
                import deepspeed  # noqa: F401
            except ImportError:
                return Verdict("skipped", "deepspeed is not installed")
        config = engine if device == "cuda" else f"{engine}-cpu"
        options = ("--num_processes", "1", "--module")
        worker = Path("tests.devices.engine_worker")
        seconds = 120 if device == "cuda" else 500  # at its first start on a CPU DeepSpeed compiles
        try:
            done = launch(config, worker, device, engine, scratch=_compiled_ops(), timeout=seconds, options=options)
        except subprocess.TimeoutExpired:
            return Verdict("FAIL", f"not done after {seconds} s")
        lines = [line for line in done.stdout.splitlines() if line.startswith("verdict ")]
        if not lines:
            return Verdict("FAIL", (done.stdout.strip().splitlines() or ["nothing was printed"])[-1][:160])
        return Verdict(*json.loads(lines[-1].removeprefix("verdict ")))

    return check


def _compiled_ops() -> Path:
    """Where torch keeps what DeepSpeed compiles, so that the second engine finds it."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
