"""Short runs of the embedded models whose completions a real vLLM draws, and what their files say again in float64."""

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_entropy.config.command_line import parse
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.train import build_trainer

REPOSITORY = Path(__file__).parents[2]
# Put into each file of tests here: `pytestmark = NEEDS_VLLM`.
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.timeout(1500),  # a busy machine is no failure
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here; bash launch/test-vllm.sh makes an environment that has it",
    ),
]
# A rate at which the policy moves far within three steps: vLLM with the weights of the start would be noticed.
SETTINGS = {
    "config": REPOSITORY / "configs" / "quickstart.yaml",
    "use_vllm": True,
    "vllm_max_model_length": 128,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "num_prompts_per_step": 8,
    "num_generations": 4,
    "per_device_train_batch_size": 32,
    "num_train_problems": 256,
    "num_eval_problems": 64,
    "eval_on_start": False,
    "eval_strategy": "no",
    "save_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "entropy_probe_every": 1,
    "likelihood_probe_every": 1,
    "kl_every": 0,
}
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": "all-linear", "lora_dropout": 0,
        "learning_rate": 3e-3}  # fmt: skip
PROBES = ("entropy_probe", "effective_sample_size_probe", "likelihood_probe", "optimizer_state_probe")
NO_PROBES = dict.fromkeys(PROBES, False)


def words_of(path, **settings) -> list[str]:
    """What is typed after `trl-entropy train` for a run in `path`."""
    given = SETTINGS | {"output_dir": path} | settings
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def train(path, callbacks=(), resume=None, **settings):
    """A run in this process; its vLLM is ended with it. The trainer."""
    more = {} if resume is None else {"resume_from_checkpoint": resume}
    trainer = build_trainer(*parse(words_of(path, **settings, **more)))
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        end_vllm(trainer)
    return trainer


def end_vllm(trainer) -> None:
    """Give vLLM's cache back before the next one is built, and forget that TRL told it of a launcher."""
    trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
    del trainer.vllm_generation.llm
    gc.collect()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def probe_file(run: RunDirectory, step: int):
    """Tensors and metadata of the entropy probe's file of a step."""
    path = run.path / "probes" / "entropy" / f"step_{step:06d}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def policy(run: RunDirectory, step: int, start: str) -> torch.nn.Module:
    """The policy after a step, in float64; `start` is the folder of step 0."""
    folder = run.path / f"checkpoint-{step}"
    model = AutoModelForCausalLM.from_pretrained(folder if step and not _is_adapter(folder) else start)
    if step and _is_adapter(folder):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.double().eval()


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


@torch.no_grad()
def scores(model, rows):
    """Entropy and log-probability of each completion token, float64, nats; 0 where the policy drew none."""
    width = rows["completion_mask"].shape[1]
    positions = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(rows["input_ids"], attention_mask=rows["attention_mask"], position_ids=positions).logits
    logps = logits[:, -width - 1 : -1].log_softmax(-1)
    mask = drawn_by_the_policy(rows)
    chosen = logps.gather(2, rows["input_ids"][:, -width:, None]).squeeze(2)
    return -(logps.exp() * logps).sum(2) * mask, chosen * mask


def drawn_by_the_policy(rows):
    return rows.get("loss_mask", rows["completion_mask"]).double()


def weighted_entropy(entropy, logps, rows, sampling) -> float:
    """(T6): nats per token under the policy of `logps`, of rows that were drawn with `sampling`."""
    mask = drawn_by_the_policy(rows)
    ratio = (logps - sampling.double()) * mask
    weights = (ratio.cumsum(1) - ratio).exp() * mask
    return ((weights * entropy).sum() / weights.sum()).item()


def mean_difference(logps, rows, sampling) -> float:
    """Mean distance of the log-probabilities of two policies from one another, over the tokens, nats."""
    mask = drawn_by_the_policy(rows)
    return (((logps - sampling.double()).abs() * mask).sum() / mask.sum()).item()
