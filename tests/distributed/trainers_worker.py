r"""
Trainers of TRL with probes, on recorded completions, under the engine of an accelerate YAML.

    PYTHONPATH=tests accelerate launch --config_file launch/zero2-cpu.yaml \
        tests/distributed/trainers_worker.py MODEL DIRECTORY WITH_KL

Writes DIRECTORY/<kind>.json, what each step logs. A completion depends on its prompt and its place in the group only.
"""

import json
import os
import sys
from pathlib import Path

from environment_rollouts import two_turns
from probe_worker import replayed_on_all_ranks
from rank_script import leave, prepare_rank
from replay_module import completion

ROWS = 16  # of a step, over all processes
COMMON = {
    "num_generations": 4,
    "max_completion_length": 16,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1e-4,
    "weight_decay": 0.01,
    "beta": 0.0,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "logging_steps": 1,
    "top_k": 0,
}
PROBES = {
    "entropy_probe": True,
    "entropy_probe_completions": "held_out",
    "entropy_probe_num_completions": 8,
    "entropy_attribution": "sequence",
    "noise_scale_probe": True,
    "fisher_probe": True,
    "fisher_num_sequences": 16,
    "optimizer_state_probe": True,
    "effective_sample_size_probe": True,
}
# All of the next step's completions: a part of them is the first groups of each process, other ones by their number.
AGENT = {
    "entropy_probe_completions": "next_rollouts",
    "entropy_probe_num_completions": ROWS,
    "entropy_attribution": "token",
    "likelihood_probe": True,
}
KINDS = ("rloo", "gmpo", "agent", "callback")


def reward(completion_ids, **kwargs) -> list[float]:
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def trainer_of(kind: str, model_path: str, directory: Path, with_kl: bool):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

    from trl_entropy import (
        DrGRPOConfig,
        DrGRPOTrainer,
        EntropyChange,
        ProbedGMPOConfig,
        ProbedGMPOTrainer,
        ProbedRLOOConfig,
        ProbedRLOOTrainer,
    )

    GRPOTrainer._generate_single_turn = lambda trainer, ids, *args, **kwargs: (replayed(trainer, ids), None)
    RLOOTrainer._generate_single_turn = lambda trainer, ids, *args, **kwargs: replayed(trainer, ids)
    kinds = {
        "rloo": (ProbedRLOOTrainer, ProbedRLOOConfig, PROBES),
        "gmpo": (ProbedGMPOTrainer, ProbedGMPOConfig, PROBES | {"scale_rewards": "none"}),
        "agent": (DrGRPOTrainer, DrGRPOConfig, PROBES | AGENT | {"max_steps": 3}),
        "callback": (GRPOTrainer, GRPOConfig, {"loss_type": "dr_grpo", "scale_rewards": "none", "max_steps": 3}),
    }
    trainer_class, config_class, more = kinds[kind]
    more = {"max_steps": 2} | more | ({"kl_every": 1} if with_kl and kind != "callback" else {})
    size = ROWS // int(os.environ.get("WORLD_SIZE", "1"))
    args = config_class(output_dir=str(directory / kind), per_device_train_batch_size=size, **COMMON, **more)
    prompts = [f"{name} has {i} apples." for name in ("Ann", "Ben", "Cem", "Dia") for i in range(8)]
    return trainer_class(
        model=model_path,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[EntropyChange()] if kind == "callback" else [],
        **({"rollout_func": two_turns} if kind == "agent" else {}),
    )


def replayed(trainer, prompt_ids: list[list[int]]) -> list[list[int]]:
    return replayed_on_all_ranks(prompt_ids, lambda ids, place: completion(trainer._tokenizer, ids, place))


def train(kind: str, model_path: str, directory: Path, with_kl: bool) -> None:
    trainer = trainer_of(kind, model_path, directory, with_kl)
    trainer.train()
    if trainer.is_world_process_zero():
        if kind == "callback":
            rows = [row for row in trainer.state.log_history if "loss" in row]
        else:
            from trl_entropy.runs.directory import RunDirectory

            rows = RunDirectory(directory / kind).metrics()
        (directory / f"{kind}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    prepare_rank()
    for one in KINDS:
        train(one, sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True")
    leave()
