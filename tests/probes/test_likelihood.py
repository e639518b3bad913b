"""The likelihood probe against plain forward passes in float64."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.analysis import views
from trl_entropy.analysis.run import load_run
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.runs.directory import RunDirectory


class KeepPolicies(TrainerCallback):
    """The policy before each step and after the last, in float64."""

    def __init__(self):
        self.policies = []

    def keep(self, model):
        self.policies.append({name: value.double().clone() for name, value in model.state_dict().items()})

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.keep(model)

    def on_train_end(self, args, state, control, model, **kwargs):
        self.keep(model)


def train(tmp_path, rewards, peft_config=None, **settings):
    tokenizer, kept = build_tokenizer(), KeepPolicies()
    args = DrGRPOConfig(
        output_dir=str(tmp_path / "run"), num_generations=4, per_device_train_batch_size=8, max_completion_length=8,
        gradient_accumulation_steps=2, learning_rate=1e-3, max_steps=2, bf16=False, use_cpu=True, report_to="none",
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, temperature=0.8, likelihood_probe=True,
        probe_batch_size=5, **settings,
    )  # fmt: skip
    trainer = DrGRPOTrainer(
        model=build_model(tokenizer, seed=0), reward_funcs=rewards, args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [f"{name} has {i} apples." for i, name in enumerate("ABCDEFGH")]}),
        callbacks=[kept], peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    return trainer, kept.policies


def odd_share(completion_ids, **kwargs):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def scored(model, policy, file):
    """Log-probabilities and entropies of the completions' tokens, by a loop over the rows, without padding."""
    model.load_state_dict(policy)
    width, found = file["completion_mask"].shape[1], {"logps": [], "entropy": []}
    for ids, attended, mask in zip(*(torch.tensor(file[name]) for name in (
        "input_ids", "attention_mask", "completion_mask")), strict=True):  # fmt: skip
        row, number = ids[attended.bool()].long(), int(mask.sum())
        with torch.no_grad():
            logs = (model(row[None]).logits[0, -number - 1 : -1] / 0.8).log_softmax(-1)
        ends = torch.zeros(2, width, dtype=torch.float64)
        ends[0, :number], ends[1, :number] = logs.gather(1, row[-number:, None])[:, 0], -(logs.exp() * logs).sum(-1)
        for name, values in zip(("logps", "entropy"), ends, strict=True):
            found[name].append(values)
        whole = torch.zeros(2, width, dtype=torch.float64)
        whole[0, :number] = logs.exp().square().sum(-1)
        whole[1, :number] = (logs.exp().square() * (logs + ends[1, :number, None])).sum(-1)
        for name, values in zip(("sum_squared", "mean_discriminator"), whole, strict=True):
            found.setdefault(name, []).append(values)
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)])
def test_files_and_metrics_are_those_of_plain_forward_passes(tmp_path, adapter):
    trainer, policies = train(tmp_path, odd_share, adapter, likelihood_probe_distribution=adapter is None)
    run = load_run(trainer.args.output_dir)
    model = trainer.model.double().eval()
    for step, row in enumerate(RunDirectory(run.path).metrics(), start=1):
        rollouts, file = run.probe_file("rollouts", step), run.probe_file("likelihood", step)
        ends = [scored(model, policies[at], rollouts) for at in (step - 1, step)]
        mask = torch.tensor(rollouts["completion_mask"]).bool()
        for name in ("logps", "entropy"):
            for when, end in zip(("before", "after"), ends, strict=True):
                torch.testing.assert_close(
                    torch.tensor(file[f"{name}_{when}"]).double()[mask], end[name][mask], rtol=1e-5, atol=1e-5
                )
        of_distribution = [name for name in ("sum_squared", "mean_discriminator") if f"{name}_before" in file]
        assert len(of_distribution) == (2 if adapter is None else 0)
        for name in of_distribution:
            torch.testing.assert_close(
                torch.tensor(file[f"{name}_before"]).double(), ends[0][name].where(mask, 0.0), rtol=1e-5, atol=1e-5
            )
        changes = [float((after - before)[kept].sum()) for before, after, kept in zip(
            ends[0]["logps"], ends[1]["logps"], mask, strict=True)]  # fmt: skip
        signs = [("above_mean", 1), ("below_mean", -1)]
        for name, sign in signs:
            chosen = [i for i, advantage in enumerate(rollouts["advantages"]) if sign * advantage > 0]
            expected = sum(changes[i] for i in chosen) / sum(int(mask[i].sum()) for i in chosen)
            assert row[f"likelihood/delta_{name}"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            if sign > 0:
                fell = sum(changes[i] < 0 for i in chosen) / len(chosen)
                assert row["likelihood/falling_above_mean"] == pytest.approx(fell)
        assert row["likelihood/delta_above_mean"] > row["likelihood/delta_below_mean"]
        table = views.completions(run, step)
        assert table["logp_change"].tolist() == pytest.approx(changes, rel=1e-3, abs=1e-5)
        assert {"logp_change", "entropy_change"} <= set(views.tokens(run, step))


def test_a_step_without_advantages_says_nothing_of_them(tmp_path):
    trainer, _ = train(tmp_path, lambda completion_ids, **kwargs: [0.0] * len(completion_ids))
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert len(rows) == 2 and not any(key.startswith("likelihood/") for row in rows for key in row)
