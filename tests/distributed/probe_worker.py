"""Trains a tiny policy on replayed completions with the entropy probe on, under whatever it is launched with.

    accelerate launch --config_file launch/zero2-cpu.yaml tests/distributed/probe_worker.py OUTPUT_DIR SETTINGS_JSON...

A completion depends on its prompt and its place in the group only, so that any number of ranks trains on the same
ones, and probes the same ones. Each SETTINGS_JSON is one run; its `name` is a folder of OUTPUT_DIR.
"""

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rank_script import leave, prepare_rank

NUM_GENERATIONS, MAX_LENGTH = 4, 9


def replayed_on_all_ranks(prompt_ids: list[list[int]], make: Callable[[list[int], int], list[int]]) -> list[list[int]]:
    """`make(prompt, place)` for this rank's rows: equal prompts of all ranks get places 0, 1, ... Collective."""
    from accelerate.utils import gather_object

    seen: Counter = Counter()
    completions = []
    for ids in gather_object(prompt_ids):
        completions.append(make(ids, seen[tuple(ids)]))
        seen[tuple(ids)] += 1
    first = int(os.environ.get("RANK", "0")) * len(prompt_ids)
    return completions[first : first + len(prompt_ids)]


def random_tokens(ids: list[int], place: int) -> list[int]:
    """Some end early."""
    draw = random.Random(f"{ids} {place}")
    return [draw.randrange(2, 300) for _ in range(draw.randint(1, MAX_LENGTH))]


def reward(completion_ids, **kwargs) -> list[float]:
    """The mean of the tokens' remainders by 3."""
    return [sum(token % 3 for token in ids) / len(ids) for ids in completion_ids]


def sparse_reward(prompts, completion_ids, **kwargs) -> list[float]:
    """Equal in many groups; no prompt with a 4 is ever right."""
    return [float(sum(ids) % 3 == 0 and "4" not in p) for p, ids in zip(prompts, completion_ids, strict=True)]


def odd_length(completion_ids, **kwargs) -> list[float | None]:
    """A metric that says nothing of completions of an even length."""
    return [float(len(ids)) if len(ids) % 2 else None for ids in completion_ids]


FAILING_EVENTS = (
    "reward",
    "around_micro_batch",
    "on_micro_batch",
    "on_rollouts",
    "on_before_update",
    "on_after_update",
    "rank_symmetric",
    "leaving_micro_batch",
    "on_step_end",
)


def fail_on_rank_1(marker: Path) -> None:
    """Writes into `marker` when."""
    if os.environ["RANK"] == "1":
        marker.write_text(str(time.time()))
        raise ValueError("injected on rank 1")


def failing_probe(event: str, marker: Path):
    """A probe in which `event` fails on rank 1; the other ranks go on into the collectives of training."""
    from contextlib import contextmanager

    from trl_entropy import Probe
    from trl_entropy.engine import rank_symmetric

    class Failing(Probe):
        @contextmanager
        def around_micro_batch(self, *args, **kwargs):
            self.maybe_fail("around_micro_batch")
            yield
            self.maybe_fail("leaving_micro_batch")

        def on_micro_batch(self, *args, **kwargs):
            self.maybe_fail("on_micro_batch")
            self.maybe_fail("lives on")

        def on_rollouts(self, *args, **kwargs):
            self.maybe_fail("on_rollouts")

        def on_before_update(self, *args, engine, **kwargs):
            self.maybe_fail("on_before_update")
            with rank_symmetric(engine.accelerator, "testing"):
                self.maybe_fail("rank_symmetric")

        def on_after_update(self, *args, **kwargs):
            self.maybe_fail("on_after_update")

        def on_step_end(self, *args, **kwargs):
            self.maybe_fail("on_step_end")

        def maybe_fail(self, current: str) -> None:
            if current == event:
                fail_on_rank_1(marker)

    return Failing()


def train(
    output_dir: Path,
    name: str,
    model_path: str,
    lora: bool = False,
    fails_in: str | None = None,
    keeps_parameters: bool = False,
    equal_often: bool = False,
    **settings,
) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from trl_entropy import DrGRPOConfig, DrGRPOTrainer, Probe

    class ReplayTrainer(DrGRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return replayed_on_all_ranks(prompt_ids, random_tokens), None

    class KeepParameters(Probe):
        """Writes theta before and after each step, as the engine gives it."""

        def on_after_update(self, args, state, control, *, update, engine, **kwargs):
            values = {f"before.{n}": value for n, value in update.params_before.items()}
            values |= {f"after.{n}": value for n, value in update.params_after.items()}
            if engine.accelerator.is_main_process:
                save_file(values, output_dir / name / f"parameters_{state.global_step + 1}.safetensors")

    def failing_reward(**kwargs):
        fail_on_rank_1(marker)
        return reward(**kwargs)

    marker = output_dir / f"{name}.failed.txt"
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    defaults = {
        "num_generations": NUM_GENERATIONS,
        "num_prompts_per_step": 4,
        "per_device_train_batch_size": 16 // num_processes,
        "max_completion_length": MAX_LENGTH,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        # Not far below the gradients: with 1e-8 a coordinate whose gradient is rounding moves by lr all the same.
        "adam_epsilon": 1e-4,
        "weight_decay": 0.01,
        "entropy_probe": True,
        "entropy_probe_completions": "held_out",
        "entropy_probe_num_completions": 12,
        "probe_batch_size": 4,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    trainer = ReplayTrainer(
        model=model_path,
        reward_funcs=failing_reward if fails_in == "reward" else sparse_reward if equal_often else reward,
        args=DrGRPOConfig(output_dir=str(output_dir / name), **(defaults | settings)),
        train_dataset=Dataset.from_dict({"prompt": [f"{i} and {j} are" for i in range(6) for j in range(6)]}),
        processing_class=tokenizer,
        metric_funcs=[odd_length],
        peft_config=peft_config,
        callbacks=[failing_probe(fails_in, marker)] * bool(fails_in) + [KeepParameters()] * keeps_parameters,
    )
    trainer.train()


if __name__ == "__main__":
    prepare_rank()
    for text in sys.argv[2:]:
        train(Path(sys.argv[1]), **json.loads(text))
    leave()
