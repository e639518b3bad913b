"""Two steps, each followed by an evaluation that takes a second; writes when each rank stepped and what was evaluated.

accelerate launch --config_file launch/ddp-cpu.yaml tests/distributed/evaluate_worker.py OUTPUT MODEL WHEN
"""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from rank_script import leave
from transformers import AutoTokenizer, TrainerCallback

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.evaluation import during_training
from trl_entropy.trainer.callbacks import RunLogCallback

SECONDS = 1.0
output, model, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
evaluated, steps = [], []


def run_job(job, timeout, cancel):
    start = time.time()
    time.sleep(SECONDS)
    evaluated.append((job.target.step, start, time.time()))
    return "a stand-in"


class Steps(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        steps.append(time.time())


during_training.run_job = run_job
args = DrGRPOConfig(
    output_dir=str(output / "run"), num_generations=4, per_device_train_batch_size=8, max_completion_length=8,
    max_steps=2, bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="steps", save_steps=1,
    disable_tqdm=True, evaluate_checkpoints=when, report_to="none",
)  # fmt: skip
trainer = DrGRPOTrainer(
    model=model,
    reward_funcs=lambda completion_ids, **kwargs: [float(len(ids) % 2) for ids in completion_ids],
    args=args,
    train_dataset=Dataset.from_dict({"prompt": [f"Ann has {i} apples." for i in range(16)]}),
    processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    callbacks=[Steps()],
)
log = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunLogCallback))
log.settings = {"task": "word_problems", "model_name_or_path": "start"}
trainer.train()
result = {"steps": steps, "evaluated": evaluated, "end": time.time(), "world_size": args.world_size}
(output / f"rank-{args.process_index}.json").write_text(json.dumps(result))
leave()
