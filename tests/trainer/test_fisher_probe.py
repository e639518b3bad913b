"""The Fisher probe: kernel, predicted and measured changes against float64 loops; training untouched; refusals."""

import math
import random

import pytest
import torch
from datasets import Dataset
from first_fast import first_fast
from peft import LoraConfig
from safetensors.torch import load_file
from slow_losses import losses_of_completions

from trl_entropy import DrGRPOConfig
from trl_entropy.engine import trainable_parameters
from trl_entropy.gradients.float64_reference import float64_reference
from trl_entropy.gradients.group_gradients import token_scores
from trl_entropy.gradients.sequence_products import entropy_gradient
from trl_entropy.probes import PROBES, FisherProbe
from trl_entropy.probes.fisher import check_memory
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.metrics import METRICS

PROBE = {"fisher_probe": True, "fisher_num_sequences": 12, "probe_batch_size": 16}
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


class Keep(FisherProbe):
    """Keeps what the last step was made of."""

    def on_before_update(self, args, state, control, *, update, engine, rollouts, **kwargs):
        super().on_before_update(args, state, control, update=update, engine=engine, rollouts=rollouts, **kwargs)
        names = list(trainable_parameters(engine.module))
        self.rollouts, self.step, self.clip = rollouts, update.optimizer_step, update.clip_factor
        self.lr, self.decay = ({n: group[n] for n in names} for group in (update.learning_rate, update.weight_decay))
        self.params = {name: update.params_before[name].clone() for name in names}
        self.gradient, self.exp_avg, self.exp_avg_sq = (
            {name: values[name].double() for name in names}
            for values in (update.gradient, update.exp_avg, update.exp_avg_sq)
        )


@pytest.fixture
def trained(make_trainer, monkeypatch):
    """trained(**settings): 2 steps on completions of 1 to 12 random tokens; what the probe saw last, all metrics."""

    def train(lora=False, num_sequences=12, sketch_dim=0, num_rows=0, **settings):
        if num_rows:
            settings["dataset"] = Dataset.from_dict({"prompt": [f"Ann has {i} apples." for i in range(num_rows)]})
        keep, draw = Keep(num_sequences=num_sequences, sketch_dim=sketch_dim, batch_size=5), random.Random(0)
        trainer = make_trainer(callbacks=[keep], peft_config=LORA if lora else None, **settings)

        def completions(prompt_ids, *args):
            return [[draw.randrange(2, 400) for _ in range(draw.randint(1, 12))] for _ in prompt_ids], None

        monkeypatch.setattr(trainer, "_generate_single_turn", completions)
        keep.start = {name: p.detach().clone() for name, p in trainable_parameters(trainer.model).items()}
        trainer.train()
        run = RunDirectory(trainer.args.output_dir)
        file = load_file(run.path / "probes" / "fisher" / f"step_{trainer.state.global_step:06d}.safetensors")
        return keep, trainer, run.metrics(), file

    return train


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def scores_float64(model, keep, params, rows):
    """S_i and grad S_i by loops over completions, one at a time and unpadded, in float64."""
    u, sums, gradients = keep.rollouts, [], []
    with float64_reference(model):
        parameters = trainable_parameters(model)
        for name, parameter in parameters.items():
            parameter.data.copy_(params[name])
        for i in rows:
            length = int(u.lengths[i])
            prompt, completion = u.prompt_ids[i][u.prompt_mask[i].bool()], u.completion_ids[i, :length]
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            score = logits.log_softmax(-1)[torch.arange(length), completion].sum()
            gradients.append(flat(torch.autograd.grad(score, list(parameters.values()))))
            sums.append(score.item())
    return torch.tensor(sums, dtype=torch.float64), torch.stack(gradients)


def step_parts(keep, args):
    """M of the step, and momentum, decay and gradient parts of (T5), flat, in float64."""
    b1, b2, t = args.adam_beta1, args.adam_beta2, keep.step
    metric, parts = [], []
    for name, g in keep.gradient.items():
        v = b2 * keep.exp_avg_sq[name] + (1 - b2) * (keep.clip * g) ** 2
        m = torch.where(v > 0, 1 / ((v / (1 - b2**t)).sqrt() + args.adam_epsilon), 0.0)
        lr = keep.lr[name]
        momentum = -lr * b1 / (1 - b1**t) * m * keep.exp_avg[name]
        decay = -lr * keep.decay[name] * keep.params[name].double()
        metric.append(m)
        parts.append((momentum, decay, -lr * keep.clip * (1 - b1) / (1 - b1**t) * m * g))
    return flat(metric), *(flat(part) for part in zip(*parts, strict=True))


def split_by_parameter(keep, gradients, metric):
    sizes = [param.numel() for param in keep.params.values()]
    return zip(gradients.split(sizes, dim=1), metric.split(sizes), strict=True)


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {"lora": True, "max_grad_norm": 0.01},
            {"gradient_accumulation_steps": 2, "num_sequences": 16, "weight_decay": 0.1, "learning_rate": 1e-4},
            {"length_normalizer": "group_max", "num_sequences": 16, "max_steps": 1},
            # The second step is what is left of the epoch: half as many completions.
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_sequences": 16, "num_rows": 24},
        ],
        2,
    ),
    ids=str,
)
def test_numbers_are_those_of_float64_loops(trained, settings):
    keep, trainer, logged, file = trained(**settings)
    args, rows, row = trainer.args, file["rows"].tolist(), logged[-1]
    assert torch.equal(keep.rollouts.prompt_index[rows], file["prompt_index"])
    assert len(rows) == keep.num_sequences and len(file["prompt_index"].unique()) == len(rows) // 4
    after = {name: p.detach().clone() for name, p in trainable_parameters(trainer.model).items()}
    s_after, _ = scores_float64(trainer.model, keep, after, rows)
    s_before, gradients = scores_float64(trainer.model, keep, keep.params, rows)
    metric, momentum, decay, gradient = step_parts(keep, args)
    assert row["fisher/num_coordinates_without_metric"] == (metric == 0).sum()
    kernel = (gradients * metric) @ gradients.T
    scale = kernel.diagonal().sqrt().outer(kernel.diagonal().sqrt())
    assert ((file["kernel"] - kernel).abs() / scale).max() < 5e-4
    cosine = kernel / scale
    same = file["prompt_index"][:, None] == file["prompt_index"]
    off_diagonal = ~torch.eye(len(rows), dtype=torch.bool)
    assert row["fisher/cosine_same_prompt"] == pytest.approx(cosine[same & off_diagonal].mean().item(), abs=5e-4)
    assert row["fisher/cosine_cross_prompt"] == pytest.approx(cosine[~same].mean().item(), abs=5e-4)
    eigenvalues = torch.linalg.eigvalsh(kernel).flip(0)
    assert row["fisher/eigenvalue_1"] == pytest.approx(eigenvalues[0].item(), rel=1e-3)
    weights = eigenvalues / eigenvalues.sum()
    assert row["fisher/participation_ratio"] == pytest.approx((1 / weights.square().sum()).item(), rel=1e-3)
    # (T12): the parts sum to the derivative along the step, the step is what AdamW made, the own part is alpha_i K_ii
    predicted = gradients @ (momentum + decay + gradient)
    rms = predicted.square().mean().sqrt()
    assert (file["logps_change_predicted"] - predicted).abs().max() < 1e-3 * rms
    u, lr = keep.rollouts, next(iter(keep.lr.values()))
    coefficient = lr * keep.clip * (1 - args.adam_beta1) / (1 - args.adam_beta1**keep.step)
    alphas = u.advantages[rows].double() / (len(u.advantages) * 12)
    own = coefficient * kernel.diagonal() * alphas
    assert (file["logps_change_own"] - own).abs().max() < 1e-3 * rms
    same_prompt = coefficient * (kernel * same * off_diagonal) @ alphas
    assert (file["logps_change_same_prompt"] - same_prompt).abs().max() < 1e-3 * rms
    assert (file["logps_change_momentum"] - gradients @ momentum).abs().max() < 1e-3 * rms
    shares = [
        row[f"fisher/change_share_{p}"] for p in (*("own", "same_prompt", "other_prompts"), "momentum", "weight_decay")
    ]
    assert sum(shares) == pytest.approx(1)
    assert row["fisher/change_share_own"] == pytest.approx(
        (own @ predicted / (predicted @ predicted)).item(), abs=2e-3
    )
    # Measured, with the parameters after the step
    measured = s_after - s_before
    assert (file["logps_change_measured"] - measured).abs().max() < 1e-3 * rms + 1e-5
    slope = (measured @ predicted / (predicted @ predicted)).item()
    assert row["fisher/change_slope"] == pytest.approx(slope, abs=5e-3)
    by_parameter = [(part * m * part).sum(1) for part, m in split_by_parameter(keep, gradients, metric)]
    assert torch.allclose(file["parameter_norms"], torch.stack(by_parameter), rtol=1e-3)
    assert row.keys() >= {f"fisher/trace_share_lora_{x}" for x in "AB" if settings.get("lora")}
    assert {key.removesuffix("_stderr") for key in row if key.startswith("fisher/")} <= METRICS.keys()


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {"loss_type": "cispo", "epsilon_high": 2.0},
            {"loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.5},  # tokens of a completion are weighed differently
        ]
    ),
    ids=str,
)
def test_parts_of_other_losses_are_those_of_float64_loops(trained, settings):
    keep, trainer, _, file = trained(**settings)
    rows, u, args = file["rows"].tolist(), keep.rollouts, trainer.args
    _, gradients = scores_float64(trainer.model, keep, keep.params, rows)
    metric, momentum, decay, gradient = step_parts(keep, args)
    with float64_reference(trainer.model):
        losses, _ = losses_of_completions(trainer.model, u, args, keep.params, keep.start)
        parameters = list(trainable_parameters(trainer.model).values())
        made = torch.stack([flat(torch.autograd.grad(losses[i], parameters, retain_graph=True)) for i in rows])
    lr = next(iter(keep.lr.values()))
    coefficient = lr * keep.clip * (1 - args.adam_beta1) / (1 - args.adam_beta1**keep.step)
    products = -coefficient * (gradients * metric) @ made.T
    predicted = gradients @ (momentum + decay + gradient)
    rms = predicted.square().mean().sqrt()
    same = (file["prompt_index"][:, None] == file["prompt_index"]) & ~torch.eye(len(rows), dtype=torch.bool)
    for name, expected in (("own", products.diagonal()), ("same_prompt", (products * same).sum(1))):
        assert expected.abs().max() > 0.01 * rms
        assert (file[f"logps_change_{name}"] - expected).abs().max() < 1e-3 * rms
    assert (file["logps_change_predicted"] - predicted).abs().max() < 1e-3 * rms


def test_where_the_step_is_small_the_slope_is_one(trained):
    _, _, logged, _ = trained(learning_rate=1e-5, lr_scheduler_type="constant")
    for row in logged:
        assert row["fisher/change_slope"] == pytest.approx(1, abs=0.03)
        assert row["fisher/change_correlation"] > 0.999


def test_other_prompts_are_the_cross_prompt_entries_of_the_kernel_of_all_completions(trained):
    keep, trainer, _, file = trained(num_sequences=16)
    u, lr = keep.rollouts, next(iter(keep.lr.values()))
    coefficient = lr * keep.clip * (1 - trainer.args.adam_beta1) / (1 - trainer.args.adam_beta1**keep.step)
    cross = file["prompt_index"][:, None] != file["prompt_index"]
    expected = coefficient * (file["kernel"] * cross) @ (file["advantages"].double() / (16 * 12))
    assert (file["logps_change_other_prompts"] - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-7
    assert torch.equal(u.rewards[file["rows"]], file["rewards"])
    assert torch.equal(u.lengths[file["rows"]], file["lengths"])


def test_the_row_of_the_entropy_gradient_reproduces_the_attribution(trained):
    """(T12): one more row of the Gram, (grad h)' M grad S_j, times alpha_j is what (T9) gives completion j."""
    problems = Dataset.from_dict({"prompt": [f"{name} has {i} apples." for name in ("Ann", "Ben") for i in range(16)]})
    settings = {
        "entropy_probe": True,
        "entropy_probe_completions": "held_out",
        "entropy_probe_num_completions": 8,
        "entropy_attribution": "sequence",
    }
    keep, trainer, _, _ = trained(num_sequences=16, dataset=problems, **settings)
    folder = RunDirectory(trainer.args.output_dir).path / "probes"
    of_probe, of_update = (load_file(folder / name / "step_000002.safetensors") for name in ("entropy", "attribution"))
    masks = ("input_ids", "attention_mask", "completion_mask", "prompt_index")
    given = {name: of_probe[name].long() for name in masks}  # stored as bytes and int32
    probe = Completions(**given, loss_mask=given["completion_mask"])
    _, gradients = scores_float64(trainer.model, keep, keep.params, range(16))
    with float64_reference(trainer.model):
        for name, parameter in trainable_parameters(trainer.model).items():
            parameter.data.copy_(keep.params[name])
        entropy, _ = token_scores(trainer.model, probe, 1.0)
        mask = probe.completion_mask
        mean = ((entropy * mask).sum() / mask.sum()).item()
        grad_h = flat(entropy_gradient(trainer.model, probe, 1.0, 8, mean, int(mask.sum())).values())
    metric, *_ = step_parts(keep, trainer.args)
    u, lr, b1 = keep.rollouts, next(iter(keep.lr.values())), trainer.args.adam_beta1
    coefficient = lr * keep.clip * (1 - b1) / (1 - b1**keep.step)
    expected = coefficient * u.advantages.double() / (16 * 12) * (gradients @ (metric * grad_h))
    assert expected.abs().max() > 1e-6
    assert (of_update["attribution"] - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("lora", first_fast([True, False]))
def test_sketch_agrees_with_the_exact_kernel_within_its_error(trained, lora):
    files = [trained(lora=lora, sketch_dim=dim, max_steps=1)[3] for dim in (0, 4096)]
    exact, sketched = (file["kernel"] for file in files)
    torch.testing.assert_close(sketched.diagonal(), exact.diagonal(), rtol=1e-5, atol=0)  # exact beside the sketch
    torch.testing.assert_close(files[1]["parameter_norms"].sum(0), exact.diagonal(), rtol=1e-5, atol=0)
    scale = exact.diagonal().sqrt().outer(exact.diagonal().sqrt())
    error = ((sketched - exact) / scale)[~torch.eye(len(exact), dtype=torch.bool)].square().mean().sqrt()
    assert 1e-4 < error < 2 * (2 / 4096) ** 0.5


def test_sketch_goes_with_tokens_that_the_loss_weighs_differently(trained):
    """Then two rows of a completion are sketched, and their product, which is not on the kernel's diagonal."""
    unequal = {"loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.5}
    exact, sketched = (trained(sketch_dim=dim, max_steps=1, **unequal)[3] for dim in (0, 4096))
    scale = (2 / 4096) ** 0.5 * exact["logps_change_own"].square().mean().sqrt()
    for part, num_summed in (("own", 1), ("same_prompt", 3)):
        error = (sketched[f"logps_change_{part}"] - exact[f"logps_change_{part}"]).square().mean().sqrt()
        assert 0.1 * scale < error < 3 * num_summed**0.5 * scale
    torch.testing.assert_close(sketched["kernel"].diagonal(), exact["kernel"].diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {"lora": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
            {"gradient_accumulation_steps": 2, "length_normalizer": "group_max"},
            {"gradient_checkpointing": True, "fisher_sketch_dim": 64},
        ]
    ),
    ids=str,
)
def test_probe_on_is_probe_off_bit_for_bit(make_trainer, settings):
    settings, runs = dict(settings), []
    lora = settings.pop("lora", False)
    own = {name: settings.pop(name) for name in ("fisher_sketch_dim",) if name in settings}
    for probes in ({}, PROBE | own):
        trainer = make_trainer(peft_config=LORA if lora else None, **probes, **settings)
        trainer.train()
        weights = flat([p.detach() for p in trainer.model.parameters() if p.requires_grad])
        rows = RunDirectory(trainer.args.output_dir).metrics()
        runs.append((weights, [{k: v for k, v in row.items() if "time" not in k} for row in rows]))
    (off, off_rows), (on, on_rows) = runs
    assert torch.equal(off, on)
    assert all(off_row.items() <= on_row.items() for off_row, on_row in zip(off_rows, on_rows, strict=True))
    assert "fisher/change_slope" in on_rows[-1]


def test_where_nothing_ever_had_a_gradient_there_is_no_kernel(trained):
    _, _, logged, file = trained(reward_funcs=lambda completion_ids, **kwargs: [1.0] * len(completion_ids))
    assert logged[0]["fisher/num_coordinates_without_metric"] > 0
    assert logged[0]["fisher/diagonal"] == 0 and math.isnan(logged[0]["fisher/cosine_cross_prompt"])
    assert (file["logps_change_own"] == 0).all()


def config(tmp_path, **settings):
    defaults = {"output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 16}
    return DrGRPOConfig(**(defaults | {"bf16": False, "use_cpu": True} | PROBE | settings))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"num_iterations": 2}, "num_iterations=1"),
        ({"optim": "lion_32bit"}, "optim='adamw_torch_fused' (of lion_32bit: Lion's step is the sign"),
        ({"steps_per_generation": 2}, "steps_per_generation=1"),
        ({"top_p": 0.9}, "top_p=1"),
        ({"fisher_num_sequences": 13}, "fisher_num_sequences=12"),
        ({"fisher_num_sequences": 8}, "fisher_num_sequences=12"),
        ({"fisher_num_sequences": 32}, "fisher_num_sequences=16"),
        ({"fisher_sketch_dim": -1}, "fisher_sketch_dim is -1; use 0 or more"),
        ({"fisher_probe_every": 0}, "fisher_probe_every is 0; use 1 or more"),
    ],
    ids=str,
)
def test_refused_settings_say_what_to_change(tmp_path, settings, remedy):
    with pytest.raises(ValueError, match=r"fisher_|estimators hold") as error:
        config(tmp_path, **settings)
    assert remedy in str(error.value)


def test_toggle_gives_this_probe(tmp_path):
    probe = PROBES["fisher_probe"].from_config(config(tmp_path, fisher_sketch_dim=64, fisher_probe_every=3))
    assert (type(probe), probe.every, probe.num_sequences, probe.sketch_dim) == (FisherProbe, 3, 12, 64)


def test_a_callback_is_checked_too(make_trainer):
    with pytest.raises(ValueError, match="fisher_num_sequences is 32"):
        make_trainer(callbacks=[FisherProbe()]).train()


def test_too_many_parameters_are_refused():
    model = torch.nn.Linear(2**20, 1, bias=False, device="meta")
    check_memory(5, model, 5 * 4 * 2**20)
    with pytest.raises(ValueError, match="fisher_sketch_dim=4096"):
        check_memory(6, model, 5 * 4 * 2**20)
