"""Short trainings of the embedded model on any device, on replayed completions, and what can be on in them."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded import VOCAB_SIZE, build_model, build_tokenizer
from trl_entropy.runs.directory import RunDirectory

Settings = dict[str, Any]

HELD_OUT: Settings = {
    "entropy_probe": True,
    "entropy_probe_completions": "held_out",
    "entropy_probe_num_completions": 8,
}
NEXT_ROLLOUTS: Settings = {"entropy_probe": True, "entropy_probe_num_completions": 8}
SECOND_ORDER: Settings = HELD_OUT | {"entropy_second_order": True, "entropy_placebo": True}
FISHER: Settings = {"fisher_probe": True, "fisher_num_sequences": 16}
STATE: Settings = {
    "effective_sample_size_probe": True, "likelihood_probe": True, "optimizer_state_probe": True, "kl_every": 1,
}  # fmt: skip
INFORMATION: Settings = {
    "mutual_information_probe": True, "mutual_information_probe_every": 1, "mutual_information_num_prompts": 4,
}  # fmt: skip
HOLD: Settings = {"entropy_control": "hold", "entropy_control_target": 3.0}
CLIP_COV: Settings = {"token_control": "clip_cov", "token_control_fraction": 0.05, "token_control_bounds": [0.0, 5.0]}
KL_COV: Settings = {"token_control": "kl_cov", "token_control_fraction": 0.05, "num_iterations": 2}
RESAMPLED: Settings = {"curriculum": "pass_rate", "resample_uninformative_groups": True, "max_resample_rounds": 1}

# Every probe and every control by itself, so that a fault has a name.
CASES: dict[str, Settings] = {
    "entropy, next step's completions": NEXT_ROLLOUTS,
    "entropy, second order, placebo": SECOND_ORDER,
    "entropy, rollouts": {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    "attribution by completion, KL": HELD_OUT | {"entropy_attribution": "sequence", "beta": 0.01},
    "attribution by token": NEXT_ROLLOUTS | {"entropy_attribution": "token"},
    "noise scale, within prompt": {"noise_scale_probe": True, "noise_scale_within_prompt": True},
    "noise scale, micro-batches": {"noise_scale_probe": True, "noise_scale_from": "micro_batches"},
    "fisher": FISHER | {"probe_batch_size": 4},
    "fisher, sketch": FISHER | {"fisher_sketch_dim": 256},
    "sample size, optimizer state, KL": STATE | INFORMATION,
    "entropy control, probe": HOLD | {"entropy_control_num_completions": 8},
    "entropy control, rollouts": HOLD | {"entropy_control_completions": "rollouts"},
    "clip_cov": CLIP_COV,
    "clip_cov, micro-batch": CLIP_COV | {"token_control_scope": "micro_batch"},
    "kl_cov": KL_COV,
    "curriculum, resampling": RESAMPLED,
}
# The same joined where they go together: fewer runs where a run is slow.
JOINED: dict[str, Settings] = {
    "held-out completions": {
        **(SECOND_ORDER | FISHER | STATE | INFORMATION),
        **{"entropy_attribution": "token", "noise_scale_probe": True, "noise_scale_within_prompt": True},
        **{"entropy_control": "report", "entropy_control_num_completions": 8},
    },
    "next step's completions": {
        **(NEXT_ROLLOUTS | HOLD | CLIP_COV | RESAMPLED | STATE),
        **{"entropy_attribution": "sequence", "noise_scale_probe": True, "entropy_control_completions": "rollouts"},
    },
    "the step's completions": {
        **(FISHER | {"entropy_probe": True, "entropy_probe_completions": "rollouts", "fisher_sketch_dim": 256}),
        **{"noise_scale_probe": True, "noise_scale_from": "micro_batches"},
        **{"entropy_control": "report", "entropy_control_completions": "rollouts"},
    },
    "several updates of one generation": KL_COV | RESAMPLED | {"optimizer_state_probe": True},
}


class ReplayTrainer(DrGRPOTrainer):
    """A trainer whose completions are random tokens, the same ones on every device, in place of generated ones."""

    lengths, vocabulary = (4, 12), 400

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        draw = random.Random(f"{self.state.global_step} {len(prompt_ids)}")
        rows = [[draw.randrange(2, self.vocabulary) for _ in range(draw.randint(*self.lengths))] for _ in prompt_ids]
        return rows, None


class StopAfter(TrainerCallback):
    """Ends a training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def thirds(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward of 0, 1 or 2, which only the token ids decide."""
    return [float(sum(ids) % 3) for ids in completion_ids]


def smallest_model() -> Qwen2ForCausalLM:
    """One narrow layer with the embedded model's vocabulary: as few operations as a pass can have."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, num_key_value_heads=1, tie_word_embeddings=True, dtype="float32", **sizes, **ends
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config)


def adapter(rank: int = 4) -> LoraConfig:
    """LoRA of the reference run: all projections, alpha twice the rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def build_trainer(
    folder: Path,
    use_cpu: bool,
    lora: LoraConfig | None = None,
    trainer: type[DrGRPOTrainer] = ReplayTrainer,
    model: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    prefix: str = "",
    **settings: Any,
) -> DrGRPOTrainer:
    """
    A trainer with 4 prompts of 4 completions a step in two micro-batches.

    Args:
        model: None for the embedded model.
        prefix: of every prompt.
        settings: in place of those here.
    """
    tokenizer = build_tokenizer()
    prompts = Dataset.from_dict({"prompt": [f"{prefix}{i} and {j} are" for i in range(8) for j in range(8)]})
    defaults: Settings = {
        "output_dir": str(folder), "num_generations": 4, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2, "max_completion_length": 12, "learning_rate": 1e-3, "max_steps": 3,
        "lr_scheduler_type": "constant", "bf16": False, "use_cpu": use_cpu, "gradient_checkpointing": False,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return trainer(
        model=build_model(tokenizer, seed=0) if model is None else model,
        reward_funcs=thirds,
        args=DrGRPOConfig(**(defaults | settings)),
        callbacks=list(callbacks),
        processing_class=tokenizer,
        peft_config=lora,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
    )


def train(folder: Path, use_cpu: bool, resume: str | None = None, **settings: Any) -> tuple[Tensor, list[dict]]:
    """The trained parameters after a training, on the CPU and flat, and the run's metrics; for the rest see above."""
    built = build_trainer(folder, use_cpu, **settings)
    with contextlib.redirect_stdout(io.StringIO()):
        built.train(resume_from_checkpoint=resume)
    model = built.accelerator.unwrap_model(built.model)
    weights = [param.detach().flatten().float().cpu() for param in model.parameters() if param.requires_grad]
    return torch.cat(weights), RunDirectory(folder).metrics()
