"""Trains a tiny policy, straight or from its newest checkpoint, under whatever it is launched with.

    accelerate launch --config_file launch/zero2-cpu.yaml tests/distributed/resume_worker.py OUTPUT_DIR SETTINGS...

Each of SETTINGS is one run as JSON: `name`, a folder of OUTPUT_DIR; `stop_after`, a step; `resume`; `lora`; fields of
DrGRPOConfig; `pass_reward`, with which the curriculum's pass rates are those of the newest group. The
hash of the trained parameters is left in `weights.txt`.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from rank_script import leave, prepare_rank

STEPS = 5


def reward(completion_ids, **kwargs) -> list[float]:
    return [sum(token % 3 for token in ids) / len(ids) for ids in completion_ids]


def sparse_reward(completion_ids, **kwargs) -> list[float]:
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def train(
    output_dir: Path,
    name: str,
    model_path: str,
    stop_after=None,
    resume=None,
    lora=False,
    equal_often=False,
    pass_reward=None,
    **settings,
) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    from trl_entropy import DrGRPOConfig, DrGRPOTrainer
    from trl_entropy.engine import build_engine

    class StopAfter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_after:
                control.should_training_stop = True

    class QuickCurriculum(DrGRPOTrainer):
        def _new_sampler(self):
            return super()._new_sampler(ema=1.0)

    trainer_class = DrGRPOTrainer
    if pass_reward is not None:
        trainer_class, QuickCurriculum.pass_reward = QuickCurriculum, pass_reward
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {
        "num_generations": 4,
        "num_prompts_per_step": 4,
        "per_device_train_batch_size": 16 // num_processes,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "entropy_probe": True,
        "entropy_probe_completions": "held_out",
        "entropy_probe_num_completions": 8,
        "entropy_second_order": True,
        "entropy_placebo": True,
        "effective_sample_size_probe": True,
        "kl_every": 2,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
    }
    trainer = trainer_class(
        model=model_path,
        reward_funcs=sparse_reward if equal_often else reward,
        args=DrGRPOConfig(output_dir=str(output_dir / name), **(defaults | settings)),
        train_dataset=Dataset.from_dict({"prompt": [f"{i} and {j} are" for i in range(4) for j in range(8)]}),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None,
        callbacks=[StopAfter()],
    )
    trainer.train(resume_from_checkpoint=resume)
    engine = build_engine(trainer.accelerator, trainer.model_wrapped, trainer.optimizer, trainer.args.max_grad_norm)
    digest = hashlib.sha256()
    for _, value in sorted(engine.assemble(engine.theta(), copy=True).items()):
        digest.update(value.numpy().tobytes())
    if trainer.is_world_process_zero():
        (output_dir / name / "weights.txt").write_text(digest.hexdigest()[:16])


if __name__ == "__main__":
    prepare_rank()
    for text in sys.argv[2:]:
        train(Path(sys.argv[1]), **json.loads(text))
    leave()
