"""Supervised fine-tuning: what is taught, what is dropped, the command, and RL from what it leaves."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import WandbCallback

from trl_entropy import sft
from trl_entropy.config.command_line import parse
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.models.fine_tuning import tokenize_demonstrations, train_sft
from trl_entropy.models.warm_start import WARM_START_RECIPE, warm_start_config
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks.word_problems import load_demonstrations
from trl_entropy.train import build_trainer

REPOSITORY = Path(__file__).parents[2]
SFT_CONFIG = REPOSITORY / "configs" / "sft-qwen2.5-1.5b-gsm8k.yaml"
DEMONSTRATIONS = {"prompt": ["1+1", "2+2+2"], "completion": ["=2", "=6<|endoftext|>"]}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_only_completion_and_end_token_are_taught(tokenizer):
    dataset = tokenize_demonstrations(Dataset.from_dict(DEMONSTRATIONS), tokenizer)
    assert dataset.column_names == ["input_ids", "labels"]
    for row, prompt, text in zip(dataset, DEMONSTRATIONS["prompt"], ["1+1=2", "2+2+2=6"], strict=True):
        num_prompt = len(tokenizer(prompt)["input_ids"])
        assert tokenizer.decode(row["input_ids"]) == f"{text}<|endoftext|>"
        assert row["labels"] == [-100] * num_prompt + row["input_ids"][num_prompt:]


def test_demonstrations_that_do_not_fit_are_dropped(tokenizer, caplog):
    dataset = tokenize_demonstrations(Dataset.from_dict(DEMONSTRATIONS), tokenizer, max_length=6)
    assert [tokenizer.decode(ids) for ids in dataset["input_ids"]] == ["1+1=2<|endoftext|>"]
    assert "dropped 1 of 2 demonstrations longer than 6 tokens" in caplog.text
    with pytest.raises(ValueError, match="the shortest has 6"):
        tokenize_demonstrations(Dataset.from_dict(DEMONSTRATIONS), tokenizer, max_length=5)


def test_bad_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"missing: \['completion'\]"):
        tokenize_demonstrations(Dataset.from_dict({"prompt": ["a"]}), tokenizer)
    endless = build_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokenize_demonstrations(Dataset.from_dict(DEMONSTRATIONS), endless)


def test_without_a_gpu_the_command_names_both_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(SystemExit, match="On a CPU set use_cpu=True and bf16=False") as end:
        sft.main(["--config", str(SFT_CONFIG), "--output_dir", str(tmp_path), "--use_cpu", "false"])
    assert "\n" not in str(end.value)


def test_trackers_of_fine_tuning_get_numbers_only(tokenizer, monkeypatch, tmp_path):
    class Tracker(WandbCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(logs)

    class Trainer:
        def __init__(self, callbacks, **kwargs):
            self.callback_handler = SimpleNamespace(callbacks=callbacks)

        def train(self, resume_from_checkpoint):
            for callback in self.callback_handler.callbacks:
                callback.on_log(None, None, None, logs={"loss": float("nan"), "epoch": 1.0})

    monkeypatch.setattr("trl.SFTTrainer", Trainer)
    tracker, args = Tracker(), warm_start_config(tmp_path, 0)
    train_sft(None, tokenizer, Dataset.from_dict(DEMONSTRATIONS), args, callbacks=[tracker])
    assert tracker.logs == [{"epoch": 1.0}]


def test_fine_tuning_resumes(tokenizer, tmp_path):
    """It was trained anew, unsaid."""

    def trained(steps, folder, resume=None):
        args = dataclasses.replace(
            warm_start_config(tmp_path / folder, 0),
            **{"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": resume},
        )
        trainer = train_sft(build_model(tokenizer, 0), tokenizer, load_demonstrations(48), args)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), trainer.state.global_step

    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trained(2, "resumed", "latest")
    whole, _ = trained(2, "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-2")
    resumed, steps = trained(2, "whole", "latest")
    assert steps == 2 and torch.equal(resumed, whole)


def test_training_matches_a_plain_loop(tokenizer, tmp_path):
    """Three steps of `SFTTrainer` by the recipe against AdamW written out."""
    dataset = load_demonstrations(48)
    trained = train_sft(build_model(tokenizer, 0), tokenizer, dataset, warm_start_config(tmp_path, 0)).model
    model = build_model(tokenizer, 0)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    tokenized = tokenize_demonstrations(dataset, tokenizer)
    for step in range(3):
        rows = tokenized.select(range(16 * step, 16 * step + 16))
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows[name])), True, padding_value=value)
            for name, value in (("input_ids", 0), ("labels", -100))
        )
        logits = model(ids, attention_mask=(ids != 0).long()).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = WARM_START_RECIPE["learning_rate"] * step / 20
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter, atol=2e-5, rtol=0, msg=name)


# ---- the command, and RL from what it leaves


@pytest.fixture(scope="module")
def random_model(tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("random_model")
    build_model(tokenizer, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


SMALL = ["--task", "word_problems", "--num_demonstrations", "12", "--bf16", "False", "--use_cpu", "True",
         "--gradient_checkpointing", "False", "--dtype", "float32", "--lora_r", "4", "--max_steps", "3",
         "--per_device_train_batch_size", "4", "--report_to", "none", "--merge_adapter", "True"]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(random_model, tmp_path_factory) -> Path:
    """What `trl-entropy sft` leaves with the shipped config on a tiny model."""
    path = tmp_path_factory.mktemp("adapter")
    sft.main(["--config", str(SFT_CONFIG), "--model_name_or_path", random_model, "--output_dir", str(path), *SMALL])
    return path


def test_the_command_leaves_adapter_tokenizer_settings_and_the_merged_model(adapter, random_model, tokenizer):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == random_model and config["r"] == 4 and config["lora_dropout"] == 0.05
    assert set(config["target_modules"]) == set(yaml.safe_load(SFT_CONFIG.read_text())["lora_target_modules"])
    assert len(AutoTokenizer.from_pretrained(adapter)) == len(tokenizer)
    assert yaml.safe_load((adapter / "config.yaml").read_text())["num_demonstrations"] == 12
    ids = torch.arange(2, 20)[None]
    merged, base = (AutoModelForCausalLM.from_pretrained(path) for path in (adapter / "merged", random_model))
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_model), adapter)
    torch.testing.assert_close(merged(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)
    assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("more, message", [
    (["--merge_adapter", "True", "--use_peft", "False"], "merge_adapter=True needs an adapter"),
    (["--model_name_or_path", ""], "model_name_or_path is not set"),
])  # fmt: skip
def test_errors_of_the_command_come_before_anything_is_loaded(tmp_path, more, message, monkeypatch):
    monkeypatch.setattr("trl_entropy.sft.train_sft", lambda *a: pytest.fail("training"))
    with pytest.raises(SystemExit, match=message):
        sft.main(["--config", str(SFT_CONFIG), "--output_dir", str(tmp_path), *SMALL, *more])


@pytest.mark.parametrize("more, message", [
    (["--max_length", "5"], "no demonstration fits into max_length=5 tokens"),
    (["--num_demonstrations", "0"], "num_demonstrations is 0; use 1 or more"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0; use 1 or more"),
    (["--task", "gsm8k", "--dataset_name", "data/gsm8k"], "there is no file or folder data/gsm8k"),
])  # fmt: skip
def test_a_mistake_ends_in_one_line(random_model, tmp_path, more, message):
    arguments = ["--config", str(SFT_CONFIG), "--model_name_or_path", random_model, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=message) as end:
        sft.main([*arguments, *SMALL, *more])
    assert str(end.value).startswith("Error") and "\n" not in str(end.value)


def test_a_run_is_not_written_over(adapter):
    with pytest.raises(SystemExit, match="already holds a run"):
        sft.main(["--config", str(SFT_CONFIG), "--output_dir", str(adapter), *SMALL])


RL = ["--config", str(REPOSITORY / "configs" / "quickstart.yaml"), "--num_prompts_per_step", "2", "--max_steps", "2",
      "--per_device_train_batch_size", "8", "--num_generations", "4", "--num_eval_problems", "4", "--eval_strategy",
      "no", "--eval_on_start", "False", "--report_to", "none", "--entropy_probe_completions", "held_out",
      "--entropy_probe_num_completions", "8",
      "--entropy_probe_every", "1", "--disable_tqdm", "True", "--warmup_steps", "0"]  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rl_starts_from_the_adapter(adapter, tmp_path, beta, caplog):
    caplog.set_level("INFO", "trl_entropy")
    arguments = [*RL, "--model_name_or_path", str(adapter), "--output_dir", str(tmp_path), "--beta", str(beta)]
    trainer = build_trainer(*parse(arguments))
    saved = load_file(adapter / "adapter_model.safetensors")
    trainable = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable.keys() == {name.replace(".weight", ".default.weight") for name in saved}
    for name, value in saved.items():
        assert torch.equal(trainable[name.replace(".weight", ".default.weight")], value)
    dropouts = [m.p for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in n]
    assert not any(dropouts) and "dropout 0.05 is set to 0" in caplog.text
    trainer.reward_funcs = [lambda completion_ids, **kwargs: [float(sum(ids) % 2) for ids in completion_ids]]
    trainer.train()
    rows = RunDirectory(tmp_path).metrics()
    # With a penalty the reference is the adapter as it was: no divergence before the first step, some after it.
    assert rows[0]["kl" if beta else "loss"] == pytest.approx(0, abs=1e-6)
    assert not beta or rows[1]["kl"] > 1e-8
    assert all(row["entropy/delta_measured_stderr"] > 0 for row in rows)
    assert any(not torch.equal(trainable[n], p) for n, p in trainer.model.named_parameters() if n in trainable)


def test_rl_starts_from_the_merged_model_with_a_new_adapter_but_not_from_two(adapter, tmp_path):
    settings = [*RL, "--use_peft", "--lora_r", "4", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"holds an adapter, which RL would continue to train.*Set use_peft=False"):
        parse([*settings, "--model_name_or_path", str(adapter)])
    trainer = build_trainer(*parse([*settings, "--model_name_or_path", str(adapter / "merged")]))
    assert trainer.model.peft_config["default"].base_model_name_or_path == str(adapter / "merged")
