"""
What a process holds beyond its slices while a probe works, where parameters are sliced: ZeRO-3 and FSDP2 on a CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/sliced_memory.py [--processes 2] [--hidden 1024] [--full]
        [--largest 10] [--engines E ...] [PROBE ...]

A Qwen2 of eight layers, of 15 million numbers each at the hidden size 1024, trains for two steps of 16 completions of
8 tokens, so that a layer is large against activations and vocabulary; with LoRA of rank 8 on all layers or in full.
Counted is, on the process that has most, the largest sum of bytes in tensors that operations of the probe returned and
that were alive together, in layers: `device`. What a CPU reads from the machine's memory in place is copied here, as
an accelerator copies it. `machine`: the memory that a machine's processes share, in layers, once for all of them.
Beside both stands doctor's number for the probe's phase, without the gradients and buffers of training, which are
there before. With another hidden size what is gathered at a time shrinks as a layer does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

LAYERS, HIDDEN = 8, 1024
KINDS = ("device", "planned device", "machine", "planned machine")
HELD_OUT = {
    "entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 8,
}  # fmt: skip
PROBES: dict[str, dict[str, Any]] = {
    "held_out, measured": HELD_OUT | {"entropy_prediction": "none"},
    "held_out": HELD_OUT,
    "held_out, second order": HELD_OUT | {"entropy_second_order": True},
    "held_out, attribution": HELD_OUT | {"entropy_attribution": "sequence"},
    "next_rollouts": {"entropy_probe": True},
    "rollouts": {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    "likelihood_probe": {"likelihood_probe": True},
    "noise_scale_probe": {"noise_scale_probe": True},
    "fisher_probe": {"fisher_probe": True, "fisher_num_sequences": 8},
    "entropy_control": {
        "entropy_control": "report", "entropy_control_target": 0.3, "entropy_control_completions": "probe",
        "entropy_control_num_completions": 8,
    },
    "optimizer_state_probe": {"optimizer_state_probe": True},
}  # fmt: skip


def layer_bytes(hidden: int) -> int:
    """Of float32 in a layer: four projections of the attention, three with a bias; three of the MLP; two norms."""
    keys, inner = hidden // 4, 4 * hidden  # 2 heads of keys and of values, for 8 of queries
    attention = 2 * hidden * hidden + 2 * hidden * keys + hidden + 2 * keys
    return 4 * (attention + 3 * hidden * inner + 2 * hidden)


def live_bytes() -> Any:
    """A counter as `LiveBytes`, without shared memory and DTensors, that names what is alive at its peak."""
    from live_bytes import LiveBytes
    from torch.distributed.tensor import DTensor

    class Live(LiveBytes):
        def __init__(self) -> None:
            super().__init__()
            self.made: dict[int, str] = {}
            self.at_peak: dict[str, int] = {}

        def _count(self, storage, tensor, func) -> None:
            if getattr(storage, "filename", None):
                return
            before = self.peak
            super()._count(storage, tensor, func)
            self.made[storage._cdata] = f"{func} {list(tensor.shape)}, {asked_by()}"
            if self.peak > before:
                self.at_peak = {}
                for key, size in self.alive.items():
                    self.at_peak[self.made[key]] = self.at_peak.get(self.made[key], 0) + size

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(issubclass(kind, DTensor) for kind in types):
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    return Live()


def asked_by(most: int = 5) -> str:
    """The innermost lines outside torch and this file that an operation is called from."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < most:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path.name not in ("live_bytes.py", Path(__file__).name, "contextlib.py"):
            lines.append(f"{path.parent.name}/{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


def train(folder: Path, hidden: int, full: bool, probe: str) -> dict[str, Any]:
    """Two steps on this process; what the probe held, in bytes."""
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils._python_dispatch import _disable_current_modes
    from transformers import AutoTokenizer

    from trl_entropy import DrGRPOConfig, DrGRPOTrainer
    from trl_entropy.engine import sliced_parameters
    from trl_entropy.engine.base import Engine
    from trl_entropy.engine.machine_memory import MachineTensors
    from trl_entropy.trainer.probe_batches import ProbeBatches

    args = DrGRPOConfig(
        output_dir=str(folder / f"run of {probe}"), max_steps=2, num_generations=4, num_prompts_per_step=4,
        per_device_train_batch_size=4, max_completion_length=8, bf16=False, gradient_checkpointing=False, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=0, **PROBES[probe],
    )  # fmt: skip
    trainer = DrGRPOTrainer(
        model=str(folder / "model"), args=args, processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        reward_funcs=lambda completion_ids, **columns: [float(sum(ids) % 7) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": [f"{i} and {j} are" for i in range(6) for j in range(6)]}),
        peft_config=None if full else LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0),
    )  # fmt: skip
    live, runner, machine = live_bytes(), trainer.probe_runner, [0.0]

    def counted(function):
        def inside(*given, **named):
            with live:
                return function(*given, **named)

        return inside

    held: list[weakref.ref] = []

    def counts_memory(self, *given, init=MachineTensors.__init__, **named):
        init(self, *given, **named)
        held.append(weakref.ref(self))
        machine[0] = max(machine[0], sum(one.num_bytes for one in (ref() for ref in held) if one is not None))

    def not_counted(self, *given, draw=ProbeBatches._draw, **named):
        with _disable_current_modes():  # generation, for which ZeRO-3 gathers the model, as it does in training
            return draw(self, *given, **named)

    read = MachineTensors.__getitem__
    with (
        mock.patch.object(sliced_parameters, "_BUCKET_NUMEL", 4 * hidden * hidden),  # the default at 1024
        mock.patch.object(ProbeBatches, "_draw", not_counted),
        mock.patch.object(Engine, "_begin_update", counted(Engine._begin_update)),
        mock.patch.object(Engine, "_end_update", counted(Engine._end_update)),
        mock.patch.object(runner, "rollouts_drawn", counted(runner.rollouts_drawn)),
        mock.patch.object(MachineTensors, "__getitem__", lambda self, name: read(self, name).clone()),
        mock.patch.object(MachineTensors, "__init__", counts_memory),
    ):
        trainer.train()
    return {"device": live.peak, "machine": machine[0], "at_peak": live.at_peak, **doctors(trainer, folder, full)}


def doctors(trainer: Any, folder: Path, full: bool) -> dict[str, int]:
    """Bytes that doctor says of this process and of the machine."""
    from benchmarks.probe_memory import planned_items

    from trl_entropy.preflight.launch import Launch

    engine, many = "zero3" if trainer.is_deepspeed_enabled else "fsdp2", trainer.accelerator.num_processes
    launch = Launch(engine=engine, num_processes=many, num_asked=many, source="this benchmark", use_cpu=True)
    prompts = trainer.processing_class([row["prompt"] for row in trainer.train_dataset])["input_ids"]
    items = planned_items(trainer.args, str(folder / "model"), full, max(map(len, prompts)), launch)
    machine = items.pop("of the machine's, shared") * many
    for before in ("gradients", "communication buffers"):
        items.pop(before, None)
    return {"planned device": sum(items.values()), "planned machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--full", action="store_true", help="train all parameters instead of an adapter")
    parser.add_argument("--engines", nargs="+", default=["zero3-cpu", "fsdp2-cpu"])
    parser.add_argument("--largest", type=int, default=0, help="print so many of the tensors alive at a peak")
    parser.add_argument("probes", nargs="*", help="; ".join(PROBES))
    options = parser.parse_args()
    print("| engine | probe | device | doctor | machine | doctor |\n|---|---|---|---|---|---|")
    for engine in options.engines:
        found = measured(engine, options.processes, options.full, options.probes or list(PROBES), options.hidden)
        for probe, held in found.items():
            cells = " | ".join(f"{held[kind]:.2f}" for kind in KINDS)
            print(f"| {engine.removesuffix('-cpu')} | {probe} | {cells} |", flush=True)
            for name, size in sorted(held["at_peak"].items(), key=lambda item: -item[1])[: options.largest]:
                print(f"  {size / layer_bytes(options.hidden):.3f} {name}")


def measured(
    engine: str, num_processes: int, full: bool, probes: list[str], hidden: int = HIDDEN
) -> dict[str, dict[str, Any]]:
    """
    By probe, what the process that holds most has on its `device`, and the `machine`, with doctor's numbers, in
    layers; `at_peak` the bytes of what was alive on that device then, by who made it.
    """
    from launching import launch

    found = {}
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name) / "model", hidden)
        given = (name, json.dumps([hidden, full, *probes]))
        many = ("--num_processes", str(num_processes))
        done = launch(engine, Path(__file__), *given, scratch=Path(name) / "ops", timeout=3000, options=many)
        if done.returncode or "cannot be shared" in done.stdout:
            raise RuntimeError(done.stdout[-6000:])
        for probe in probes:
            ranks = [json.loads(path.read_text()) for path in sorted(Path(name).glob(f"{probe}.*.json"))]
            assert len(ranks) == num_processes, f"{len(ranks)} processes wrote of {probe}"
            most = max(ranks, key=lambda rank: rank["device"])
            found[probe] = {kind: max(rank[kind] / layer_bytes(hidden) for rank in ranks) for kind in KINDS}
            found[probe]["at_peak"] = most["at_peak"]
    return found


def save_model(folder: Path, hidden: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trl_entropy.models.embedded import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=LAYERS,
            num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)


def work(folder: str, given: str) -> None:
    """As one process of a launch."""
    from engine_worker import fresh_accelerator_state
    from rank_script import leave, prepare_rank

    from trl_entropy.runs.console import quiet_libraries

    prepare_rank()
    quiet_libraries()
    hidden, full, *probes = json.loads(given)
    for probe in probes:
        with fresh_accelerator_state():
            found = train(Path(folder), hidden, full, probe)
        (Path(folder) / f"{probe}.{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    here = Path(__file__).parents[1]
    sys.path += [str(here), str(here / "distributed")]
    work(*sys.argv[1:]) if len(sys.argv) == 3 and sys.argv[2].startswith("[") else main()
