"""The noise scale probe: prompt groups' gradients against slow recomputations, training untouched, refusals."""

import math
import random

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from first_fast import first_fast
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from slow_losses import drawing_with_logprobs, group_gradients
from variance_oracles import noise_parts

from trl_entropy import DrGRPOConfig
from trl_entropy.engine import trainable_parameters
from trl_entropy.estimators.noise.noise_scale import NoiseScaleRecord, jackknifed_parts
from trl_entropy.gradients.float64_reference import float64_reference
from trl_entropy.gradients.group_products import MicroBatchNorms
from trl_entropy.probes import PROBES, NoiseScaleProbe
from trl_entropy.probes import noise_scale as noise_scale_probe
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.metrics import METRICS

PROBE = {"noise_scale_probe": True, "probe_batch_size": 16}
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
MICRO = {"noise_scale_from": "micro_batches"}
RAW = ("grad_sq_norm", "grad_variance_trace")


class Keep(NoiseScaleProbe):
    """Keeps what the last step was made of."""

    def on_before_update(self, args, state, control, *, update, engine, rollouts, **kwargs):
        super().on_before_update(args, state, control, update=update, engine=engine, rollouts=rollouts, **kwargs)
        names = list(trainable_parameters(engine.module))
        self.rollouts, self.step = rollouts, update.optimizer_step
        self.by_extra_pass = getattr(self, "_by_extra_pass", None)
        self.params = {name: update.params_before[name].clone() for name in names}
        self.gradient, self.exp_avg_sq = (
            torch.cat([values[name].flatten() for name in names]).double()
            for values in (update.gradient, update.exp_avg_sq)
        )


@pytest.fixture
def trained(make_trainer, monkeypatch):
    """trained(**settings): 2 steps on completions of 1 to 12 random tokens; what the probe saw last, all metrics."""

    def train(lora=False, factor=False, **settings):
        own = {name: settings.pop(name) for name in ("halves", "source") if name in settings}
        keep = Keep(batch_size=settings.pop("probe_batch_size", 16), **own)
        draw = random.Random(0)
        trainer = make_trainer(callbacks=[keep], peft_config=LORA if lora else None, **settings)

        def completions(prompt_ids, *args):
            return [[draw.randrange(2, 400) for _ in range(draw.randint(1, 12))] for _ in prompt_ids], None

        trainer.use_vllm = trainer.args.use_vllm = factor  # vLLM's importance factor, without vLLM
        given = drawing_with_logprobs(draw) if factor else completions
        monkeypatch.setattr(trainer, "_generate_single_turn", given)
        keep.start = {name: p.detach().clone() for name, p in trainable_parameters(trainer.model).items()}
        trainer.train()
        return keep, trainer, RunDirectory(trainer.args.output_dir)

    return train


def rows_float64(model, keep, advantages=None, groups=None):
    """Y_n by loops over completions, one at a time and unpadded, in float64; or so for other weights of some rows."""
    u, rows = keep.rollouts, []
    advantages = u.advantages if advantages is None else advantages
    with float64_reference(model):
        params = trainable_parameters(model)
        for name, parameter in params.items():
            parameter.data.copy_(keep.params[name])
        for members in groups or members_of_groups(u):
            y = 0.0
            for i in members:
                length = int(u.lengths[i])
                prompt, completion = u.prompt_ids[i][u.prompt_mask[i].bool()], u.completion_ids[i, :length]
                logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
                logps = logits.log_softmax(-1)[torch.arange(length), completion]
                y = y - advantages[i].double() * logps.sum() / (int((u.prompt_index == u.prompt_index[i]).sum()) * 12)
            gradients = torch.autograd.grad(y, list(params.values()))
            rows.append(torch.cat([part.flatten() for part in gradients]))
    return torch.stack(rows)


def members_of_groups(rollouts):
    numbers = rollouts.prompt_index.unique().tolist()
    return [(rollouts.prompt_index == number).nonzero().flatten().tolist() for number in numbers]


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {"lora": True},
            {"lora": True, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 6, "num_generations": 3},
            {"lora": True, "gradient_accumulation_steps": 2, "length_normalizer": "group_max", "max_grad_norm": 0.01},
            {"gradient_accumulation_steps": 2, "probe_batch_size": 9},
            {"length_normalizer": "group_max", "max_grad_norm": 0.01},
        ],
        2,
    ),
    ids=str,
)
def test_numbers_are_those_of_float64_loops(trained, settings):
    keep, trainer, run = trained(**settings)
    assert keep.by_extra_pass == (not settings.get("lora", False))
    rows, row, args = rows_float64(trainer.model, keep), run.metrics()[-1], trainer.args
    mean = rows.mean(0)
    assert (mean - keep.gradient).norm() < 1e-4 * keep.gradient.norm() and row["noise_scale/gradient_error"] < 5e-5
    file = load_file(run.path / "probes" / "noise_scale" / "step_000002.safetensors")
    assert torch.equal(file["prompt_index"], keep.rollouts.prompt_index.unique())
    assert row["noise_scale/num_prompts"] == len(rows)
    known = keep.exp_avg_sq > 0
    metric = torch.zeros_like(keep.exp_avg_sq)
    v_hat = keep.exp_avg_sq[known] / (1 - args.adam_beta2 ** (keep.step - 1))
    metric[known] = 1 / (v_hat.sqrt() + args.adam_epsilon)
    assert row["noise_scale/num_coordinates_without_metric"] == (~known).sum()
    for suffix, prefix, m, rel in (("", "", torch.ones_like(metric), 1e-4), ("_adam", "adam_", metric, 1e-2)):
        norms = (rows.square() * m).sum(1)
        assert torch.allclose(file[f"group_sq_norms{suffix}"], norms, rtol=rel)
        batch_sq_norm = float(mean.square() @ m)
        assert file[f"batch_sq_norm{suffix}"].item() == pytest.approx(batch_sq_norm, rel=rel)
        num_prompts, mean_norm = len(rows), norms.mean().item()
        signal = (num_prompts * batch_sq_norm - mean_norm) / (num_prompts - 1)
        noise = num_prompts / (num_prompts - 1) * (mean_norm - batch_sq_norm)
        assert row[f"noise_scale/{prefix}grad_sq_norm"] == pytest.approx(signal, rel=rel, abs=rel * batch_sq_norm)
        assert row[f"noise_scale/{prefix}grad_variance_trace"] == pytest.approx(noise, rel=rel)
        assert row[f"noise_scale/{prefix}grad_sq_norm_stderr"] > 0


@pytest.mark.parametrize("lora", first_fast([True, False]))
def test_halves_split_the_noise_as_float64_loops_do(trained, lora):
    keep, trainer, run = trained(
        lora=lora, halves=True, num_generations=5, per_device_train_batch_size=20, max_steps=1, probe_batch_size=12
    )
    groups, row = members_of_groups(keep.rollouts), run.metrics()[-1]
    advantages = torch.zeros(20, dtype=torch.float64)
    halves = [half for group in groups for half in (group[:2], group[2:])]
    for half in halves:
        for i in half:
            others = [keep.rollouts.rewards[j].double() for j in half if j != i]
            own = keep.rollouts.rewards[i].double()
            advantages[i] = 4 / len(half) * (own - sum(others) / len(others))
    half_rows = rows_float64(trainer.model, keep, advantages, halves)
    products = (half_rows[0::2] * half_rows[1::2]).sum(1)
    between = products.mean().item() - row["noise_scale/grad_sq_norm"]
    trace = row["noise_scale/grad_variance_trace"]
    assert row["noise_scale/between_prompt_trace"] == pytest.approx(between, rel=1e-3, abs=1e-3 * trace)
    assert row["noise_scale/within_prompt_trace"] == pytest.approx(trace - between, rel=1e-3)
    assert row["noise_scale/between_prompt_share"] == pytest.approx(between / trace, rel=1e-3, abs=1e-3)
    file = load_file(run.path / "probes" / "noise_scale" / "step_000001.safetensors")
    whole = rows_float64(trainer.model, keep)
    norms = whole.square().sum(1)
    assert torch.allclose(file["group_sq_norms"], norms, rtol=1e-4)  # the order that the halves have too
    parts = jackknifed_parts(norms, whole @ whole.mean(0), products)
    assert row["noise_scale/between_prompt_trace_stderr"] == pytest.approx(
        parts.covariance[2, 2].item() ** 0.5, rel=1e-3
    )


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {"lora": True, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 8},
            {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 8, "max_grad_norm": 0.01},
            {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "gradient_checkpointing": True},
        ]
    ),
    ids=str,
)
def test_micro_batches_norms_are_those_of_float64_loops(trained, settings):
    """(T15) of a trained head too, without an extra pass; one group a micro-batch is (T14)."""
    keep, trainer, run = trained(source="micro_batches", max_steps=4, **settings)
    rows, row, num = rows_float64(trainer.model, keep), run.metrics()[-1], settings["gradient_accumulation_steps"]
    # Groups follow one another in a step's micro-batches
    order = keep.rollouts.prompt_index.unique_consecutive()
    small = rows[order.argsort().argsort()].view(num, -1, rows.shape[1]).mean(1)
    batch_sq_norm, norm = float(rows.mean(0).square().sum()), float(small.square().sum(1).mean())
    b = len(rows) // num
    wanted = (len(rows) * batch_sq_norm - b * norm) / (len(rows) - b), (norm - batch_sq_norm) / (1 / b - 1 / len(rows))
    assert [row[f"noise_scale/{name}"] for name in RAW] == pytest.approx(wanted, rel=1e-4, abs=1e-4 * norm)
    assert row["noise_scale/num_prompts"] == len(rows) and "noise_scale/gradient_error" not in row
    file = load_file(run.path / "probes" / "noise_scale" / "step_000004.safetensors")
    assert torch.allclose(file["micro_batch_sq_norms"], small.square().sum(1), rtol=1e-4)
    parts = torch.tensor([[r[f"noise_scale/{name}"] for name in RAW] for r in run.metrics()], dtype=torch.float64)
    signal, noise = parts[1:].sum(0)
    assert row["noise_scale/simple"] == pytest.approx(float(noise / signal), rel=1e-6)
    assert "noise_scale/simple" not in run.metrics()[0] and "noise_scale/simple_lower" in run.metrics()[1]
    resumed = NoiseScaleProbe(source="micro_batches")
    resumed.load_state_dict(keep.state_dict())
    assert str(resumed.state_dict()) == str(keep.state_dict()) and resumed._previous is not None


def test_pool_is_that_of_the_files(trained):
    _, _, run = trained(lora=True, max_steps=4, gradient_accumulation_steps=2)
    record = NoiseScaleRecord.empty()
    for step, row in enumerate(run.metrics(), start=1):
        file = load_file(run.path / "probes" / "noise_scale" / f"step_{step:06d}.safetensors")
        parts = noise_parts(file["group_sq_norms"], file["batch_sq_norm"].item())
        for name, value in zip(RAW, parts, strict=True):
            assert row[f"noise_scale/{name}"] == pytest.approx(value, rel=1e-9)
        record = record.update(jackknifed_parts(file["group_sq_norms"], file["group_dot_batch"]))
        ratio = record.parts.values[1] / record.parts.values[0]
        assert row["noise_scale/simple"] == pytest.approx(ratio.item(), rel=1e-9)
        assert row["noise_scale/signal_to_noise"] == pytest.approx(8 / ratio.item(), rel=1e-9)
        lower, upper = record.interval()
        assert row["noise_scale/simple_lower"] == pytest.approx(lower)
        assert row["noise_scale/suggested_prompts_lower"] == pytest.approx(lower)
        assert row["noise_scale/simple_upper"] == pytest.approx(upper)  # inf: |G|^2 is consistent with 0
        assert ("noise_scale/adam" in row) == (step > 1)
        assert {key for key in row if key.startswith("noise_scale/")} <= METRICS.keys() | {
            f"{key}_stderr" for key in METRICS
        }


@pytest.mark.parametrize("lora", first_fast([True, False]))
def test_micro_batches_do_not_matter(trained, lora):
    one, two, parts = (
        trained(lora=lora, per_device_train_batch_size=size, gradient_accumulation_steps=32 // size, max_steps=1)[
            2
        ].metrics()
        for size in (32, 16, 8)
    )
    keys = {key for key in one[0] if key.startswith("noise_scale/")} - {"noise_scale/gradient_error"}
    assert len(keys) > 8
    for key in keys:
        assert one[0][key] == pytest.approx(two[0][key], rel=1e-5) == pytest.approx(parts[0][key], rel=1e-5), key


def half_equal(prompts, completion_ids, **kwargs):
    odd = [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
    return [0.5 if prompt[0] in "ABCD" else value for prompt, value in zip(prompts, odd, strict=True)]


@pytest.mark.parametrize("lora", first_fast([True, False]))
def test_kept_groups_are_left_out(trained, lora):
    """The step has all eight prompts, so nothing can replace four of them; (T14a) on the others, by pairs."""
    settings = {"gradient_accumulation_steps": 2, "resample_uninformative_groups": True, "reward_funcs": half_equal}
    keep, trainer, run = trained(lora=lora, halves=True, probe_batch_size=12, **settings)
    row, accepted = run.metrics()[-1], keep.rollouts.accepted
    assert row["resampling/num_kept_uninformative"] == 4 == row["noise_scale/num_prompts"] == accepted.sum()
    rows = rows_float64(trainer.model, keep)[accepted]
    gram = rows @ rows.T
    signal = (gram.sum() - gram.trace()).item() / 12
    mean_norm = gram.trace().item() / 4
    assert row["noise_scale/grad_sq_norm"] == pytest.approx(signal, rel=1e-3, abs=1e-4 * mean_norm)
    assert row["noise_scale/grad_variance_trace"] == pytest.approx(mean_norm - signal, rel=1e-4)
    assert row["noise_scale/gradient_error"] < 5e-5 and row["noise_scale/between_prompt_trace_stderr"] > 0
    path = run.path / "probes" / "noise_scale" / "step_000002.safetensors"
    assert torch.equal(load_file(path)["prompt_index"], keep.rollouts.prompt_index.unique()[accepted])
    assert torch.allclose(load_file(path)["group_sq_norms"], gram.diagonal(), rtol=1e-4)
    with safe_open(path, "pt") as file:
        assert file.metadata()["distribution"] == "accepted groups"


@pytest.mark.parametrize("lora", first_fast([True, False]))
def test_groups_without_gradient_stay(trained, lora):
    _, _, run = trained(lora=lora, reward_funcs=half_equal, gradient_accumulation_steps=2)
    file = load_file(run.path / "probes" / "noise_scale" / "step_000001.safetensors")
    assert len(file["group_sq_norms"]) == 8 and (file["group_sq_norms"] == 0).sum() == 4
    assert run.metrics()[0]["noise_scale/gradient_error"] < 5e-5


def test_an_error_across_the_gradient_is_seen():
    """The mean of the rows has the gradient's component along it, and 0.72 of its length across it."""
    gradient, across = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 0.72 * 5])
    rows = torch.stack([gradient, across])
    found = noise_scale_probe._gradient_error([(rows, gradient)], Accelerator(cpu=True))
    assert found == pytest.approx(0.72)
    parts = zip(rows.split(2, dim=1), gradient.split(2), strict=True)
    assert noise_scale_probe._gradient_error(parts, Accelerator(cpu=True)) == pytest.approx(0.72)


@pytest.mark.parametrize("lora", first_fast([True, False]))
def test_a_zero_gradient_is_no_error_and_has_no_ratio(trained, lora):
    _, _, run = trained(lora=lora, reward_funcs=lambda completion_ids, **kwargs: [1.0] * len(completion_ids))
    row = run.metrics()[-1]
    assert row["noise_scale/grad_sq_norm"] == row["noise_scale/grad_variance_trace"] == 0
    assert math.isnan(row["noise_scale/simple"]) and math.isnan(row["noise_scale/gradient_error"])  # 0/0


@pytest.mark.slow
def test_a_large_adapter_takes_the_extra_pass_with_the_same_numbers(trained):
    from_training = trained(lora=True)[2].metrics()
    keep, _, run = trained(lora=True, probe_rows_gib=1e-6)
    assert keep.by_extra_pass
    for one, other in zip(from_training, run.metrics(), strict=True):
        rounding = 1e-5 * one["noise_scale/grad_variance_trace"]  # |G|^2 is a difference of numbers of that size
        for name in RAW:
            assert other[f"noise_scale/{name}"] == pytest.approx(one[f"noise_scale/{name}"], rel=1e-4, abs=rounding)


def test_without_adam_there_is_no_metric(make_trainer):
    trainer = make_trainer(peft_config=LORA, optim="sgd", **PROBE)
    trainer.train()
    row = RunDirectory(trainer.args.output_dir).metrics()[-1]
    assert "noise_scale/grad_sq_norm" in row and not any("adam" in key for key in row)


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {
                "lora": True,
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
                "noise_scale_probe_every": 2,
            },
            {"lora": True, "disable_dropout": False},
            {"lora": True, "disable_dropout": True, "noise_scale_within_prompt": True},
            {"gradient_accumulation_steps": 2, "length_normalizer": "group_max"},
            {"gradient_checkpointing": True},
            {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "noise_scale_from": "micro_batches"},
            {"lora": True, "gradient_accumulation_steps": 4, "noise_scale_from": "micro_batches"},
        ]
    ),
    ids=str,
)
def test_probe_on_is_probe_off_bit_for_bit(make_trainer, settings):
    settings = dict(settings)
    lora, every = settings.pop("lora", False), settings.pop("noise_scale_probe_every", 1)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM") if lora else None
    runs = []
    own = {name: settings.pop(name) for name in ("noise_scale_within_prompt", "noise_scale_from") if name in settings}
    micro_batches = "noise_scale_from" in own
    prompts = Dataset.from_dict({"prompt": [f"Ann has {i} apples." for i in range(16)]})  # 4 micro-batches' at most
    for probes in ({}, PROBE | {"noise_scale_probe_every": every} | own):
        trainer = make_trainer(peft_config=config, max_steps=3, dataset=prompts, **probes, **settings)
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        rows = RunDirectory(trainer.args.output_dir).metrics()
        runs.append((weights, [{k: v for k, v in row.items() if "time" not in k} for row in rows]))
    (off, off_rows), (on, on_rows) = runs
    assert torch.equal(off, on)
    for step, (off_row, on_row) in enumerate(zip(off_rows, on_rows, strict=True), start=1):
        assert off_row.items() <= on_row.items()
        assert ("noise_scale/simple" in on_row) == (step % every == 0 and step > micro_batches)
        if step % every == 0 and not micro_batches:  # training's own backward, with its dropout; not the extra pass
            assert on_row["noise_scale/gradient_error"] < 5e-5


def config(tmp_path, **settings):
    defaults = {"output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 16}
    return DrGRPOConfig(**(defaults | {"bf16": False, "use_cpu": True} | PROBE | settings))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"loss_type": "unheard of"}, "loss_type to one of dr_grpo, "),
        ({"scale_rewards": "batch"}, "scale_rewards='none'"),
        ({"num_iterations": 2}, "num_iterations=1"),
        ({"entropy_coef": 0.01, "resample_uninformative_groups": True}, "entropy_coef=0"),
        ({"noise_scale_within_prompt": True, "loss_type": "dapo"}, "loss_type='dr_grpo'"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=1"),
        ({"per_device_train_batch_size": 12}, "num_prompts_per_step=4"),
        ({"per_device_train_batch_size": 6, "steps_per_generation": 2}, "per_device_train_batch_size=8"),
        ({"noise_scale_probe_every": 0}, "noise_scale_probe_every is 0; use 1 or more"),
        (
            {"noise_scale_within_prompt": True, "length_normalizer": "group_max"},
            "length_normalizer='max_completion_length'",
        ),
        ({"noise_scale_within_prompt": True, "num_generations": 2}, "num_generations=4"),
        ({"noise_scale_from": "halves"}, "is 'halves'; use one of groups, micro_batches"),
        (MICRO | {"per_device_train_batch_size": 32}, "batch_size=16 with gradient_accumulation_steps=2"),
        (
            MICRO | {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4},
            "per_device_train_batch_size=4 with gradient_accumulation_steps=6",
        ),
        (
            MICRO | {"gradient_accumulation_steps": 2, "noise_scale_within_prompt": True},
            "noise_scale_within_prompt=False",
        ),
        (MICRO | {"gradient_accumulation_steps": 2, "resample_uninformative_groups": True}, "resample_unin"),
    ],
    ids=str,
)
def test_refused_settings_say_what_to_change(tmp_path, settings, remedy):
    with pytest.raises(ValueError, match="noise_scale_") as error:
        config(tmp_path, **settings)
    assert remedy in str(error.value)


def test_a_group_split_over_micro_batches_is_refused(make_trainer):
    norms = MicroBatchNorms(make_trainer().model, num_generations=4)
    micro_batch = norms.micro_batch(torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"has \[2, 2\] completions of its prompts: \(T15\) needs whole"), micro_batch:
        pass


def test_what_the_equation_allows_is_not_refused(tmp_path):
    config(tmp_path, loss_type="grpo", beta=0.1, scale_rewards="group", top_p=0.9, optim="sgd")
    config(tmp_path, loss_type="dapo", use_vllm=True, entropy_coef=0.1, off_policy_mask_threshold=0.5)


def test_halves_know_the_dr_grpo_loss_only(make_trainer):
    with pytest.raises(ValueError, match=r"noise_scale_within_prompt.*scale_rewards='none'"):
        make_trainer(scale_rewards="group", callbacks=[NoiseScaleProbe(halves=True)]).train()
    assert type(PROBES["noise_scale_probe"].from_config(make_trainer(**PROBE).args)) is NoiseScaleProbe


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {"loss_type": "dapo", "beta": 0.1, "lora": True},
            {"loss_type": "bnpo", "entropy_coef": 0.5, "gradient_accumulation_steps": 2},
            {
                "loss_type": "cispo",
                "epsilon_high": 2.0,
                "factor": True,
                "vllm_importance_sampling_mode": "token_truncate",
            },
        ]
    ),
    ids=str,
)
def test_groups_of_other_losses_are_those_of_float64_loops(trained, settings):
    keep, trainer, run = trained(**settings)
    row = run.metrics()[-1]
    rows = group_gradients(trainer.model, keep.rollouts, trainer.args, keep.params, keep.start)
    assert (rows.mean(0) - keep.gradient).norm() < 1e-5 * keep.gradient.norm()
    assert row["noise_scale/gradient_error"] < 1e-5
    file = load_file(run.path / "probes" / "noise_scale" / "step_000002.safetensors")
    assert torch.allclose(file["group_sq_norms"], rows.square().sum(1), rtol=1e-4)
    assert torch.allclose(file["group_dot_batch"], rows @ rows.mean(0), rtol=1e-4, atol=1e-5 * float(rows.norm() ** 2))


@pytest.mark.slow
def test_an_extra_pass_knows_the_clipping_of_a_step_off_policy(trained):
    keep, _, run = trained(steps_per_generation=2, learning_rate=1e-2, loss_type="grpo")
    assert keep.by_extra_pass and run.metrics()[-1]["clip_ratio/region_mean"] > 0.1
    assert all(row["noise_scale/gradient_error"] < 1e-5 for row in run.metrics())
