"""Trains tiny models under whatever engine it is launched with, and records what the engine hands out, per rank.

    accelerate launch --config_file launch/zero2-cpu.yaml tests/distributed/engine_worker.py OUTPUT_DIR CASES_JSON

One launch runs many cases, because a process costs far more than a case. Also imported by the tests, for the model and
the case.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rank_script import leave, prepare_rank
from torch import nn
from torch.distributed.fsdp import FSDPModule

SEQUENCE_LENGTH = 12
VOCABULARY = 61  # odd sizes, so that ZeRO's partitions cut through parameters
NUM_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run. `sequences` is the global batch of a step; each rank and micro-batch has its share."""

    lora: bool
    bf16: bool
    accumulation: int
    max_grad_norm: float = 0.05  # below the norms met here: clips
    optim: str = "adamw_torch"
    load_in_bf16: bool = False
    watched: bool = True  # whether the engine's functions want every step
    checkpointing: str | None = None  # "reentrant" or "non-reentrant"
    resumes: bool = False  # saves before its last step, and makes that step a second time from the checkpoint
    poisoned: bool = False  # the loss of the second step is nan
    sequences: int = 8

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        parts = [f"{key}={value}" for key, value in shown.items() if value != defaults[key]]
        return ",".join(parts).replace("True", "1").replace("False", "0")


def build_model(lora: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Qwen2 of a few thousand parameters, the same on every rank; LoRA with B not 0, so that A has a gradient."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=3, target_modules=targets, lora_dropout=0.0, init_lora_weights=False))


def token_batches(num_sequences: int) -> torch.Tensor:
    """Fixed token ids, (num_sequences, SEQUENCE_LENGTH)."""
    return torch.randint(VOCABULARY, (num_sequences, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(7))


def loss_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, labels=input_ids).loss


PROBE_BATCH = 3


def probe_score(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss on tokens of its own and the norm of its gradient, as a probe takes them."""
    from trl_entropy.engine import trainable_parameters

    loss = loss_of(model, token_batches(PROBE_BATCH))
    grads = torch.autograd.grad(loss, list(trainable_parameters(model).values()))
    return loss.detach(), torch.linalg.vector_norm(torch.cat([grad.flatten().double() for grad in grads]))


def engine_trainer_class() -> type:
    """Made on demand: importing transformers' Trainer takes seconds."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback

    class EngineTrainer(Trainer):
        """Calls the engine as the package's trainer does, and records."""

        def __init__(self, case: Case, **kwargs):
            events = Events()
            super().__init__(**kwargs, callbacks=[events])
            events.trainer = self
            self.case, self.batches, self.steps, self.engine = case, {}, [], None
            self.model_accepts_loss_kwargs = False  # as GRPOTrainer: the loss is divided by the accumulation steps

        def compute_loss(self, model, inputs, **kwargs):
            self.batches.setdefault(self.state.global_step + 1, []).append(inputs["input_ids"].clone())
            poison = self.case.poisoned and self.state.global_step == 1
            return loss_of(model, inputs["input_ids"]) * (torch.nan if poison else 1)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                self.engine.gradients_ready()
            return loss

        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

        def before_update(self, context):
            keys = ["gradient", "grad_norm", "clip_factor", "params_before", "has_float32_master"]
            keys += ["learning_rate", "weight_decay", "without_gradient"]
            keys += ["exp_avg", "exp_avg_sq", "betas", "eps", "optimizer_step"] if "adamw" in self.case.optim else []
            record = {key: read_whole(getattr(context, key)) for key in keys}
            record["model_before"] = snapshot(self)
            with self.engine.scoring_model(context.params_before) as model:
                record["probe"] = probe_score(model)
            with self.engine.scoring_model(context.params_before, dtype=None) as model:
                record["probe_own_dtype"] = probe_score(model)
            self.steps.append(record)

        def after_update(self, context):
            keys = ("params_after", "update", "step_skipped")
            self.steps[-1] |= {key: read_whole(getattr(context, key)) for key in keys}
            self.steps[-1]["model_after"] = snapshot(self)

    class Events(TrainerCallback):
        """transformers gives callbacks no trainer, so the trainer's own methods are reached through `self.trainer`."""

        trainer: EngineTrainer

        def on_train_begin(self, args, state, control, **kwargs):
            from trl_entropy.engine import build_engine

            trainer = self.trainer
            trainer.engine = build_engine(
                trainer.accelerator, trainer.model_wrapped, trainer.optimizer, max_grad_norm=args.max_grad_norm
            )
            trainer.engine.register(
                wants=lambda: trainer.case.watched,
                before_update=trainer.before_update,
                after_update=trainer.after_update,
            )

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.trainer.engine.update_done()

        def on_train_end(self, args, state, control, **kwargs):
            self.trainer.engine.close()

    return EngineTrainer


def read_whole(value: object) -> object:
    """Copies of tensors that processes share, which the next step may overwrite or give back."""
    from trl_entropy.engine.machine_memory import MachineTensors

    return {name: one.clone() for name, one in value.items()} if isinstance(value, MachineTensors) else value


def snapshot(trainer) -> dict[str, torch.Tensor]:
    from trl_entropy.engine import snapshot_parameters, trainable_parameters

    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trainable = trainable_parameters(model)
    if isinstance(model, FSDPModule):  # gathered in the dtype that the layers compute in
        for part in (part for part in model.modules() if isinstance(part, FSDPModule)):
            part.reshard()
        return {name: param.detach().full_tensor() for name, param in trainable_parameters(model).items()}
    if not all(hasattr(param, "ds_id") for param in trainable.values()):
        return snapshot_parameters(model)
    from deepspeed import zero

    with zero.GatheredParameters(list(trainable.values())):
        return {name: param.detach().clone() for name, param in trainable.items()}


def train(case: Case, output_dir: Path, resume: bool = False) -> dict:
    """Trains one case, or only its last step from the checkpoint before, and returns its record."""
    from transformers import TrainingArguments

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    run_dir = output_dir / f"trainer-{case.name}"
    recompute = {"use_reentrant": case.checkpointing == "reentrant"} if case.checkpointing else None
    data = [{"input_ids": row, "labels": row} for row in token_batches(case.sequences * NUM_STEPS)]
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=case.sequences // (case.accumulation * world_size),
        gradient_accumulation_steps=case.accumulation,
        gradient_checkpointing=recompute is not None,
        gradient_checkpointing_kwargs=recompute,
        max_steps=NUM_STEPS,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=case.max_grad_norm,
        bf16=case.bf16,
        optim=case.optim,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="steps" if case.resumes else "no",
        save_steps=NUM_STEPS - 1,
        disable_tqdm=True,
        seed=0,
    )
    model = build_model(case.lora, torch.bfloat16 if case.load_in_bf16 else torch.float32)
    trainer = engine_trainer_class()(case, model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(run_dir / f"checkpoint-{NUM_STEPS - 1}") if resume else None)
    record = {
        "case": dataclasses.asdict(case),
        "num_processes": trainer.accelerator.num_processes,
        "engine": type(trainer.engine).__name__,
        "steps": trainer.steps,
        "batches": [trainer.batches[step] for step in sorted(trainer.batches)],
        "logged_grad_norms": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
        "final": snapshot(trainer),
    }
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return record


def run_case(case: Case, output_dir: Path) -> None:
    rank = os.environ.get("RANK", "0")
    with fresh_accelerator_state():
        torch.save(train(case, output_dir), output_dir / f"{case.name}.rank{rank}.pt")
    if case.resumes:
        with fresh_accelerator_state():
            torch.save(train(case, output_dir, resume=True), output_dir / f"resumed-{case.name}.rank{rank}.pt")


@contextlib.contextmanager
def fresh_accelerator_state() -> Iterator[None]:
    """accelerate and transformers keep settings in process-wide singletons and the environment; the group stays."""
    from accelerate.state import AcceleratorState, GradientState

    environment = dict(os.environ)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)


def fail_on_last_rank(accelerator) -> None:
    from trl_entropy.engine import rank_symmetric

    with rank_symmetric(accelerator, "counting"):
        if accelerator.process_index == accelerator.num_processes - 1:
            raise KeyError("seven")


def check_failing_together(output_dir: Path) -> None:
    """An exception on the last rank must reach all of them, and leave the group fit for use."""
    from accelerate import Accelerator

    from trl_entropy.engine import rank_symmetric

    accelerator = Accelerator(cpu=True)
    messages = []
    try:
        fail_on_last_rank(accelerator)
    except RuntimeError as error:
        messages.append((str(error), repr(error.__cause__)))
    with rank_symmetric(accelerator, "doing nothing"):
        pass
    total = accelerator.reduce(torch.ones(1))
    torch.save((messages, total), output_dir / f"messages.rank{accelerator.process_index}.pt")


def main(output_dir: str, cases: str) -> None:
    import jaxtyping

    jaxtyping.install_import_hook("trl_entropy.engine", "beartype.beartype")
    prepare_rank()
    torch.set_num_threads(1)
    for settings in json.loads(cases):
        run_case(Case(**settings), Path(output_dir))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        check_failing_together(Path(output_dir))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
