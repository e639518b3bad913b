"""The entropy probe in training: numbers against a recomputation, no trace in training, files to recompute it from."""

import math

import pytest
import torch
from datasets import Dataset
from first_fast import first_fast
from peft import LoraConfig
from run_rows import without_clocks
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from trl.trainer.utils import pad

from trl_entropy import DrGRPOTrainer
from trl_entropy.analysis.run import load_run
from trl_entropy.gradients.float64_reference import float64_reference
from trl_entropy.models.embedded import build_model
from trl_entropy.probes import EntropyProbe
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.step_files import completions_steps, probe_steps

PROBE = {
    "entropy_probe": True,
    "entropy_probe_completions": "held_out",
    "entropy_probe_num_completions": 8,
    "probe_batch_size": 5,
}


@pytest.fixture(scope="module")
def problems():
    return Dataset.from_dict(
        {"prompt": [f"{name} has {i} apples." for name in ("Ann", "Ben", "Cem", "Dia") for i in range(8)]}
    )


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


class KeepParameters(TrainerCallback):
    def __init__(self, model):
        self.model, self.points = model, []
        self.keep()

    def keep(self):
        self.points.append({n: p.detach().double().clone() for n, p in self.model.named_parameters()})

    def on_step_end(self, args, state, control, **kwargs):
        self.keep()


def probe_file(run, step):
    with safe_open(run.path / "probes" / "entropy" / f"step_{step:06d}.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def entropy_float64(model, point, rows, sampling=None):
    """(T6) by loops in float64, with the score of every token."""
    with float64_reference(model):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(point[name])
        with torch.no_grad():
            logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    width = rows["completion_mask"].shape[1]
    log_probs = logits[:, -width - 1 : -1].log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    logps = log_probs.gather(2, rows["input_ids"][:, -width:, None]).squeeze(2)
    sampling = logps if sampling is None else sampling
    numerator = denominator = 0.0
    for i, length in enumerate(rows["completion_mask"].sum(1).tolist()):
        log_weight = 0.0
        for k in range(length):
            numerator += math.exp(log_weight) * entropy[i, k].item()
            denominator += math.exp(log_weight)
            log_weight += (logps[i, k] - sampling[i, k]).item()
    return numerator / denominator, logps


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_changes_are_those_of_a_float64_recomputation(make_trainer, model_path, bf16):
    """In bf16 too: the parameters that the optimizer moves are float32, and the probe scores with those."""
    trainer = make_trainer(max_steps=2, entropy_second_order=True, bf16=bf16, **PROBE)
    keep = KeepParameters(trainer.model)
    trainer.add_callback(keep)
    trainer.train()
    run = RunDirectory(trainer.args.output_dir)
    model = AutoModelForCausalLM.from_pretrained(model_path)  # training's own computes in bf16, whatever it holds
    for step, row in enumerate(run.metrics(), start=1):
        rows, metadata = probe_file(run, step)
        assert metadata["step"] == str(step)
        before, after = keep.points[step - 1], keep.points[step]
        start, sampling = entropy_float64(model, before, rows)
        measured = entropy_float64(model, after, rows, sampling)[0] - start
        assert row["entropy/probe_batch"] == pytest.approx(start, rel=1e-5)
        assert row["entropy/delta_measured"] == pytest.approx(measured, rel=1e-3)

        def along(scale, before=before, after=after, rows=rows, sampling=sampling):
            point = {name: before[name] + scale * (after[name] - before[name]) for name in before}
            return entropy_float64(model, point, rows, sampling)[0]

        e = 1e-3
        slope = (along(e) - along(-e)) / (2 * e)
        slope_after = (along(1 + e) - along(1 - e)) / (2 * e)
        curvature = (along(e) - 2 * start + along(-e)) / e**2
        assert row["entropy/delta_linear"] == pytest.approx(slope, rel=1e-3)
        assert row["entropy/delta_trapezoid"] == pytest.approx((slope + slope_after) / 2, rel=1e-3)
        assert row["entropy/delta_second_order"] == pytest.approx(slope + curvature / 2, rel=3e-3)
        assert torch.allclose(rows["logps_before"].double(), sampling * rows["completion_mask"], atol=1e-4)
        if bf16:  # what training's own model does is rounding to some part
            model_change = row["entropy/delta_measured_model"]
            assert 1e-3 < abs(model_change / measured - 1) < 1
        else:
            assert "entropy/delta_measured_model" not in row


def test_probe_batch_is_independent_of_the_step(make_trainer, problems):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.step_prompts.all())

    trainer = make_trainer(max_steps=3, dataset=problems, callbacks=[Look()], **PROBE)
    trainer.train()
    for step in (1, 2, 3):
        rows, _ = probe_file(RunDirectory(trainer.args.output_dir), step)
        width = rows["input_ids"].shape[1] - rows["completion_mask"].shape[1]
        prompts = {
            trainer._tokenizer.decode(ids[:width][mask[:width].bool()])
            for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
        }
        assert len(prompts) == 8 and not prompts & seen[step - 1]
    tokens = load_run(trainer.args.output_dir).tokens_of("entropy", 1)  # save_strategy: no, so there is no checkpoint
    assert tokens["token"].tolist() == [trainer._tokenizer.decode([token]) for token in tokens["token_id"]]


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {},
            {"gradient_accumulation_steps": 2},
            {"gradient_checkpointing": True},
            {"lora": True, "lora_dropout": 0.1},
            {"num_iterations": 2},
            {"loss_type": "dapo"},
            {"optim": "sgd", "plain_optimizer": True},
        ],
        2,
    ),
    ids=str,
)
def test_probe_on_is_probe_off_bit_for_bit(make_trainer, problems, settings):
    settings = dict(settings)
    lora, dropout = settings.pop("lora", False), settings.pop("lora_dropout", 0.0)
    second_order = not settings.pop("plain_optimizer", False)
    runs = []
    for probes in ({}, PROBE | {"entropy_second_order": second_order, "entropy_placebo": True}):
        config = (
            LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM") if lora else None
        )
        trainer = make_trainer(
            max_steps=3, dataset=problems, peft_config=config, disable_dropout=False, **probes, **settings
        )
        trainer.train()
        runs.append((flat(trainer.model), without_clocks(RunDirectory(trainer.args.output_dir).metrics())))
    (off, off_rows), (on, on_rows) = runs
    assert torch.equal(off, on)
    for off_row, on_row in zip(off_rows, on_rows, strict=True):
        assert off_row.items() <= on_row.items()
        assert on_row["entropy/delta_measured_stderr"] > 0


def test_every_promised_quantity_is_logged(make_trainer, problems):
    from trl_entropy.runs.metrics import METRICS, over_steps, unit

    trainer = make_trainer(
        max_steps=5, dataset=problems, entropy_second_order=True, entropy_placebo=True, probe_files_keep=2,
        log_completions=True, num_completions_to_print=0, completions_files_keep=3,
        change_of=["entropy", "reward", "length", "truncated", "odd_token_reward"], **PROBE,
    )  # fmt: skip
    trainer.train()
    run = RunDirectory(trainer.args.output_dir)
    rows = run.metrics()
    measured = ("entropy/", "reward/", "length/", "truncated/")
    promised = {name for name in METRICS if name.startswith(measured) and METRICS[name].reduce == "E"}
    promised -= {"entropy/noise_floor", "entropy/delta_measured_model", "entropy/sampler_ess"}
    promised -= {"entropy/precision_noise", "entropy/router_flip_share"}  # a CPU has no TF32, nor the model experts
    assert promised <= rows[-1].keys(), promised - rows[-1].keys()
    assert 0 <= rows[0]["entropy/noise_floor"] < 1e-5
    assert rows[0]["time/entropy"] > 0
    assert probe_steps(run.path, "entropy") == probe_steps(run.path, "rollouts") == [1, 5]
    assert completions_steps(run.path) == [1, 3, 5]
    for probe in ("entropy", "rollouts"):
        with safe_open(run.path / "probes" / probe / "step_000005.safetensors", "np") as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert types["input_ids"] == "I32" and types["attention_mask"] == types["completion_mask"] == "BOOL"
        assert not {"I64", "F64"} & {types[name] for name in types if name != "prompt_index"}
    with safe_open(run.path / "probes" / "rollouts" / "step_000005.safetensors", "pt") as file:
        assert torch.allclose(file.get_tensor("rewards").mean(), torch.tensor(rows[-1]["reward"]))
        assert file.get_tensor("input_ids").shape == file.get_tensor("attention_mask").shape
    total = rows[0]["entropy/probe_batch"] + sum(row["entropy/delta_linear"] for row in rows)
    assert rows[-1]["entropy/integral_linear"] == pytest.approx(total)
    assert all(  # one reward function: it is the reward
        row[f"rewards/odd_token_reward/{name}"] == row[f"reward/{name}"]
        for row in rows
        for name in ("probe_batch", "delta_measured", "delta_trapezoid_stderr", "integral_linear")
    )
    assert unit("rewards/odd_token_reward/delta_measured_stderr") == "reward"
    assert over_steps("rewards/odd_token_reward/integral_linear") == "last"


def test_a_broken_step_is_said_and_training_goes_on(make_trainer, problems):
    """A step with a zero gradient moves nothing: the measured change is zero, not an error."""
    trainer = make_trainer(
        max_steps=3,
        dataset=problems,
        reward_funcs=lambda completion_ids, **kwargs: [1.0] * len(completion_ids),
        **PROBE,
    )
    trainer.train()
    for row in RunDirectory(trainer.args.output_dir).metrics():
        assert row["grad_norm"] == 0
        assert row["entropy/delta_linear"] == 0 and row["entropy/delta_measured"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 2, "top_p": 0.5, "min_p": 0.5, "mask_truncated_completions": True},
        {"generation_kwargs": {"typical_p": 0.3, "no_repeat_ngram_size": 1}},
        {"of_model": {"suppress_tokens": list(range(5, 300)), "typical_p": 0.3}},
        {"of_model": {"suppress_tokens": list(range(5, 300))}, "lora": True},
    ],
    ids=["settings", "generation_kwargs", "model", "model in peft"],
)
def test_a_probe_draws_from_all_tokens_whatever_training_samples_from(make_trainer, problems, settings):
    """The same completions as where training does so too; training's own settings are back afterwards."""
    settings = dict(settings)
    of_model, lora = settings.pop("of_model", {}), settings.pop("lora", False)
    drawn = []
    for narrowed in (False, True):
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        trainer = make_trainer(
            max_steps=1, dataset=problems, peft_config=config, **(settings if narrowed else {}), **PROBE
        )
        model = trainer.model.get_base_model() if lora else trainer.model
        model.generation_config.update(**(of_model if narrowed else {}))
        trainer.train()
        drawn.append(probe_file(RunDirectory(trainer.args.output_dir), 1)[0]["input_ids"])
        assert all((getattr(model.generation_config, name) == value) == narrowed for name, value in of_model.items())
        assert trainer.generation_config.top_k == (settings.get("top_k", 0) if narrowed else 0)
    assert torch.equal(*drawn)


class WithSampler(DrGRPOTrainer):
    """In vLLM's place: samples at another temperature, and says with which log-probabilities."""

    temperature_of_sampler = 0.7

    def _generate_single_turn(self, prompt_ids, *args):
        if not self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *args)
        ids = pad([torch.tensor(row) for row in prompt_ids], -1, "left")
        output = self.model.generate(
            input_ids=ids.clamp(min=0),
            attention_mask=(ids >= 0).long(),
            generation_config=GenerationConfig(
                max_new_tokens=self.max_completion_length, do_sample=True, temperature=self.temperature_of_sampler,
                top_k=0, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
            ),
        )  # fmt: skip
        drawn = output.sequences[:, ids.shape[1] :]
        log_probs = (torch.stack(output.logits, 1) / self.temperature_of_sampler).log_softmax(-1)
        return drawn.tolist(), log_probs.gather(2, drawn[:, :, None]).squeeze(2).tolist()


@pytest.fixture(scope="module")
def sharp_model_path(tmp_path_factory, tokenizer):
    """A random policy whose next token is far from uniform, so that temperatures differ."""
    path = tmp_path_factory.mktemp("sharp_policy")
    model = build_model(tokenizer, seed=0)
    model.model.norm.weight.data *= 4
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_batch_from_another_sampler_is_weighted(make_trainer, sharp_model_path):
    """vLLM and the model's own generate tell the same entropy and the same change; unweighted they would not."""
    prompts = Dataset.from_dict({"prompt": [f"{i} and {j} are" for i in range(40) for j in range(40)]})
    rows, files = {}, {}
    for sampler in ("vllm", "model"):
        probe = EntropyProbe(num_prompts=1024, batch_size=256, sampler=sampler)
        trainer = make_trainer(
            WithSampler,
            model=sharp_model_path,
            max_steps=1,
            dataset=prompts,
            max_completion_length=4,
            callbacks=[probe],
        )
        trainer.use_vllm = True
        trainer.train()
        rows[sampler] = RunDirectory(trainer.args.output_dir).metrics()[0]
        files[sampler], metadata = probe_file(RunDirectory(trainer.args.output_dir), 1)
        assert trainer.use_vllm and metadata["sampler"] == {"vllm": "vllm", "model": "policy"}[sampler]
    for name in ("entropy/probe_batch", "entropy/delta_linear", "entropy/delta_measured"):
        stderr = math.hypot(*(rows[sampler][f"{name}_stderr"] for sampler in rows))
        assert abs(rows["vllm"][name] - rows["model"][name]) < 4 * stderr, name
    mask = files["vllm"]["completion_mask"]
    unweighted = (files["vllm"]["entropy_before"].double().sum() / mask.sum()).item()
    assert abs(unweighted - rows["model"]["entropy/probe_batch"]) > 8 * rows["vllm"]["entropy/probe_batch_stderr"]
    assert 100 < rows["vllm"]["entropy/sampler_ess"] < 1000 and "entropy/sampler_ess" not in rows["model"]
    assert rows["vllm"]["sampling/importance_sampling_ratio/mean"] != 1  # TRL's factor in the loss is at work
