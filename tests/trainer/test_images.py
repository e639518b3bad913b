"""Images go wherever token ids go: scores, derivatives, the KL, and completions that a probe draws."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_vlm import build_processor, build_vlm, picture

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.gradients.scores import score
from trl_entropy.probes.probe import Probe
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.drawing import prompt_key, prompt_of
from trl_entropy.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def questions(num: int = 32, column: str = "image") -> Dataset:
    pictures = [picture(i) if column == "image" else [picture(i)] for i in range(num)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": "Which colour?"}]] * num, column: pictures})


def trainer_of(processor, path, dataset=None, callbacks=None, **settings) -> DrGRPOTrainer:
    defaults = {
        "output_dir": str(path),
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "probe_batch_size": 5,
    }
    return DrGRPOTrainer(
        build_vlm(processor),
        lambda completion_ids, **_: [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids],
        DrGRPOConfig(**(defaults | settings)),
        train_dataset=questions() if dataset is None else dataset,
        processing_class=processor,
        callbacks=callbacks,
    )


class Scoring(Probe):
    """Compares scores of the step's completions with those that the loss computed, and with other images."""

    def on_micro_batch(self, args, state, control, *, metrics, inputs, per_token_logps, mask, **kwargs):
        self.loss_logps = [*getattr(self, "loss_logps", []), per_token_logps * mask]

    def on_before_update(self, args, state, control, *, metrics, engine, rollouts, **kwargs):
        completions = Completions.of(rollouts)
        own = score(engine.module, completions, 1.0, 3).logps[0]
        swapped = completions.pixel_inputs.chosen(torch.arange(len(completions)).flip(0))
        other = Completions(**{**vars(completions), "pixel_inputs": swapped})
        metrics["scoring/error"] = (own - torch.cat(self.loss_logps)).abs().max().item()
        metrics["scoring/other"] = (score(engine.module, other, 1.0, 3).logps[0] - own).abs().max().item()
        self.loss_logps = []


@pytest.mark.parametrize("column", ["image", "images"])
def test_scores_are_those_of_the_loss_image_by_image(processor, tmp_path, column):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    trainer = trainer_of(processor, tmp_path, questions(column=column), [Scoring()], **settings)
    trainer.train()
    for row in RunDirectory(tmp_path).metrics():
        assert row["scoring/error"] < 1e-5 < 1e-2 < row["scoring/other"]


def test_the_kl_to_the_start_is_0_at_the_start(processor, tmp_path):
    """It was that of completions without their images."""
    trainer_of(processor, tmp_path, kl_every=1).train()
    first, second = (row["kl"] for row in RunDirectory(tmp_path).metrics())
    assert abs(first) < 1e-9 < second


HELD_OUT = {"entropy_probe_completions": "held_out", "entropy_probe_num_completions": 8}
PROBES = {
    "held out": HELD_OUT | {"entropy_attribution": "token", "entropy_second_order": True},
    "next rollouts": {"entropy_probe_completions": "next_rollouts", "entropy_probe_num_completions": 16}
    | {"entropy_prediction": "linear"},
    "rollouts": {"entropy_probe_completions": "rollouts", "noise_scale_probe": True}
    | {"noise_scale_from": "micro_batches", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
    "control": HELD_OUT
    | {"entropy_control": "hold", "entropy_control_target": 3.0, "entropy_control_num_completions": 8},
    "control by own": {"entropy_probe_completions": "rollouts", "entropy_control": "report"}
    | {"entropy_control_completions": "rollouts", "token_control": "none"},
}


@pytest.mark.parametrize("name", PROBES)
def test_probes_and_controls_see_images(processor, tmp_path, name):
    trainer = trainer_of(processor, tmp_path, entropy_probe=True, learning_rate=1e-5, **PROBES[name])
    trainer.train()
    rows = RunDirectory(tmp_path).metrics()
    own = PROBES[name].get("entropy_probe_completions") == "rollouts"
    for row in rows:
        if own:  # the loss and the probe score the same completions
            assert row["entropy/probe_batch"] == pytest.approx(row["entropy/policy"], rel=1e-5)
        else:
            difference = row["entropy/delta_linear"] - row["entropy/delta_measured"]
            assert abs(difference) < 0.1 * abs(row["entropy/delta_measured"]) + 1e-6
            assert row["entropy/probe_batch"] == pytest.approx(row["entropy/policy"], rel=0.1)
    if own:
        assert rows[1]["entropy/rollouts_gradient_error"] < 1e-4
    if "entropy_attribution" in PROBES[name]:
        assert all(abs(row["entropy/attribution_rounding"]) < 1e-4 for row in rows)
    assert load_file(tmp_path / "probes/entropy/step_000001.safetensors")["input_ids"].shape[0] in (8, 16)


def test_a_prompt_is_known_by_its_image_too():
    one, other = (prompt_of(questions()[row]) for row in (0, 1))
    assert prompt_key(one) != prompt_key(other)
    assert prompt_key(one) == prompt_key(prompt_of(questions()[0]))


def test_the_probe_changes_nothing_in_training(processor, tmp_path):
    points = []
    for number, probe in enumerate([{}, {"entropy_probe": True, "kl_every": 1} | HELD_OUT]):
        trainer = trainer_of(processor, tmp_path / str(number), **probe)
        trainer.train()
        points.append(torch.cat([param.detach().flatten() for param in trainer.model.parameters()]))
    assert torch.equal(*points)
