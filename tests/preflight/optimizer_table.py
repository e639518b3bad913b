"""What the probes find of a tiny model under each optimizer, as the table of docs/optimizers.md."""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.runs.directory import RunDirectory

TABLE = Path(__file__).parents[2] / "docs/optimizers.md"
# Names of transformers, with the learning rate of a step that is small but not lost in the rounding of float32.
OPTIMIZERS = {
    "adamw_torch": 3e-5, "adamw_torch_fused": 3e-5, "adafactor": 3e-5, "adagrad": 3e-5, "rmsprop": 3e-6, "sgd": 1e-2,
    "lion_32bit": 3e-6, "adamw_bnb_8bit": 3e-5, "galore_adamw": 3e-5, "schedule_free_adamw": 3e-5, "ademamix": 3e-5,
}  # fmt: skip
STEPS = 3
_HELD_OUT = {"entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 8}
_FISHER = {"fisher_probe": True, "fisher_num_sequences": 16}
# Column -> what turns it on.
SETTINGS = {
    "attribution": _HELD_OUT | {"entropy_attribution": "token"},
    "second order": _HELD_OUT | {"entropy_second_order": True},
    "kernel": _FISHER,
    "noise scale": {"noise_scale_probe": True},
    "cross-prompt": {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    "control": {
        "entropy_control": "hold", "entropy_control_per_step": 0.0, "entropy_control_num_completions": 8,
        "entropy_control_gradient_ema": 0.0,
    },
}  # fmt: skip


def trained(optim: str, settings: dict, directory: str) -> list[dict]:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    model.get_input_embeddings().padding_idx = None  # a random policy draws padding too, which would have no gradient
    args = DrGRPOConfig(
        output_dir=directory, optim=optim, learning_rate=OPTIMIZERS[optim], lr_scheduler_type="constant",
        num_generations=4, per_device_train_batch_size=16, max_completion_length=8, max_steps=STEPS, bf16=False,
        use_cpu=True, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, report_to="none",
        weight_decay=0.1, max_grad_norm=0.1, **settings,
    )  # fmt: skip
    prompts = [f"{name} has {i} apples." for name in ("Ann", "Ben", "Cem", "Dia") for i in range(8)]
    trainer = DrGRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids],
        args=args, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return RunDirectory(args.output_dir).metrics()


# ---- columns: the relative error of what is found, in the run's own terms


def _attribution(rows: list[dict]) -> float:
    """What no part explains, of the sum of the parts."""
    return max(abs(row["entropy/attribution_rounding"]) for row in rows)


def _second_order(rows: list[dict]) -> float:
    """What the prediction before the step, along the step that is planned, misses of the measured change."""
    return max(abs(row["entropy/error_second_order"] / row["entropy/delta_measured"]) for row in rows)


def _kernel(rows: list[dict]) -> float:
    """Measured changes of log-probabilities on predicted ones: the slope is 1 but for curvature."""
    return max(abs(row["fisher/change_slope"] - 1) for row in rows)


def _noise(rows: list[dict]) -> float:
    """Whether groups add up to the gradient; the metric is there from the second step on, unless it is 1."""
    has_metric = {"noise_scale/adam_grad_sq_norm" in row for row in rows[1:]}
    return max(row["noise_scale/gradient_error"] for row in rows) if has_metric == {True} else float("nan")


def _cross_prompt(rows: list[dict]) -> float:
    assert all(row["entropy/delta_cross_prompt"] == row["entropy/delta_cross_prompt"] for row in rows[1:])
    return max(row["entropy/rollouts_gradient_error"] for row in rows[1:])


def _control(rows: list[dict]) -> float:
    """What the correction leaves of the change that it was asked to take out, to first order."""
    return max(abs(row["entropy_control/delta_predicted"] / row["entropy_control/delta_optimizer"]) for row in rows)


ERRORS = {
    "attribution": (_attribution, 1e-3),
    "second order": (_second_order, 0.05),
    "kernel": (_kernel, 0.05),
    "noise scale": (_noise, 1e-3),
    "cross-prompt": (_cross_prompt, 1e-3),
    "control": (_control, 1e-3),
}


def cell(optim: str, column: str) -> tuple[str, float | str]:
    error, allowed = ERRORS[column]
    with tempfile.TemporaryDirectory() as directory:
        try:
            torch.manual_seed(0)
            found = error(trained(optim, SETTINGS[column], directory))
        except ValueError as refusal:
            return "refused", str(refusal)
        except ImportError as missing:  # the optimizer's own package, which is not here
            return "not tried", str(missing)
    if found != found:
        return "metric is 1", found
    return ("ok" if found <= allowed else "wrong"), found


def optimizer_row(optim: str) -> str:
    return f"| {optim} | " + " | ".join(cell(optim, column)[0] for column in SETTINGS) + " |"


if __name__ == "__main__":
    for name in sys.argv[1:] or OPTIMIZERS:
        found = {column: cell(name, column) for column in SETTINGS}
        print(f"| {name} | " + " | ".join(state for state, _ in found.values()) + " |", flush=True)
        print({column: value for column, (_, value) in found.items()}, file=sys.stderr)
