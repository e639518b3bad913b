"""What needs a GPU: `pytest -m gpu`. CI has none."""

import math

import pytest
import torch
from datasets import Dataset

from tests.benchmarks import gpu as benchmark
from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.runs.directory import RunDirectory


def train(folder, use_cpu, **settings):
    tokenizer = build_tokenizer()
    args = DrGRPOConfig(
        output_dir=str(folder), num_generations=4, per_device_train_batch_size=16, max_completion_length=12,
        learning_rate=1e-3, max_steps=3, bf16=False, use_cpu=use_cpu, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = DrGRPOTrainer(
        model=build_model(tokenizer, seed=0),
        reward_funcs=lambda completion_ids, **kwargs: [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"{i} and {j} are" for i in range(6) for j in range(6)]}),
        processing_class=tokenizer,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten().cpu() for p in trainer.model.parameters()])
    return weights, RunDirectory(folder).metrics()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_probe_on_is_probe_off_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    off, _ = train(tmp_path / "off", use_cpu=False)
    on, rows = train(
        tmp_path / "on",
        use_cpu=False,
        entropy_probe=True,
        entropy_probe_completions="held_out",
        entropy_probe_num_completions=8,
    )
    torch.use_deterministic_algorithms(False)
    assert torch.equal(off, on)
    for row in rows:  # the trapezoid is exact to third order: the two agree when both are right
        assert row["entropy/delta_trapezoid"] == pytest.approx(row["entropy/delta_measured"], rel=0.05, abs=1e-5)
        assert math.isnan(row["entropy/noise_floor"]) or row["entropy/noise_floor"] < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_benchmark_runs_on_the_gpu(capsys):
    benchmark.main(["--shape", "tiny", "--completions", "16", "--steps", "1", "--ranks", "4"])
    assert "| 4 | all |" in capsys.readouterr().out


def test_benchmark_runs_anywhere(capsys, monkeypatch):
    monkeypatch.setattr(benchmark.ReplayTrainer, "lengths", (8, 12))
    sizes = ["--completions", "16", "--micro-batch", "8", "--steps", "1", "--ranks", "4"]
    benchmark.main(["--shape", "tiny", "--device", "cpu", *sizes, "--only", "toggles off", "entropy_probe, |E| = 64"])
    assert "| 4 | toggles off |" in capsys.readouterr().out
