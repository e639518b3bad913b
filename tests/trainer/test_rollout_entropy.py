"""The entropy probe on the step's own rollouts: gradients of groups, (T17) and (T7) against slow recomputations."""

import math
import random

import pytest
import torch
from first_fast import first_fast
from safetensors import safe_open
from safetensors.torch import load_file
from slow_losses import drawing_with_logprobs, losses_of_completions

from trl_entropy import DrGRPOConfig
from trl_entropy.engine import trainable_parameters
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, delta_linear
from trl_entropy.estimators.entropy_change.step_change import point_terms
from trl_entropy.gradients.float64_reference import float64_reference
from trl_entropy.gradients.memory import halved_on_out_of_memory
from trl_entropy.gradients.scores import score
from trl_entropy.probes import PROBES, RolloutEntropyProbe
from trl_entropy.probes.rollout_entropy import groups_that_fit
from trl_entropy.runs.directory import RunDirectory

PROBE = {"entropy_probe": True, "entropy_probe_completions": "rollouts", "probe_batch_size": 16}
NEW_KEYS = {
    "entropy/delta_cross_prompt",
    "entropy/delta_cross_prompt_stderr",
    "entropy/delta_cross_prompt_stderr_unbiased",
    "entropy/delta_same_sample",
    "entropy/rollouts_gradient_error",
    "entropy/num_coordinates_without_metric",
}


class Keep(RolloutEntropyProbe):
    """Keeps what went into the last step's numbers."""

    def _group_rows(self, *args, **kwargs):
        self.rows = super()._group_rows(*args, **kwargs)
        return self.rows

    def on_before_update(self, args, state, control, *, update, engine, rollouts, metrics, **kwargs):
        super().on_before_update(
            args, state, control, update=update, engine=engine, rollouts=rollouts, metrics=metrics, **kwargs
        )
        names = list(trainable_parameters(engine.module))
        self.update, self.engine, self.rollouts, self.before_metrics = update, engine, rollouts, dict(metrics)
        self.gradient = torch.cat([update.gradient[name].flatten() for name in names]).double()
        self.exp_avg_sq = torch.cat([update.exp_avg_sq[name].flatten() for name in names]).double()
        self.params = {name: update.params_before[name].clone() for name in names}
        self.clip, self.step = update.clip_factor, update.optimizer_step

    def slope_along(self, direction, temperature=1.0):
        """R'(0) on U along a direction, by forward mode."""
        with self.engine.scoring_model(self.params) as model:
            scores = score(model, self._completions, temperature, 16, self.params, direction, order=1)
        terms = point_terms(scores.entropy, scores.logps, scores.logps[0], self._completions.completion_mask)
        return delta_linear(RatioTerms(*terms.terms), RatioTerms(*terms.tangents)).value.item()


@pytest.fixture
def trained(make_trainer, monkeypatch):
    """trained(**settings): 2 steps on completions of 1 to 12 random tokens; what the probe saw last, all metrics."""

    def train(factor=False, **settings):
        keep, draw = Keep(batch_size=settings.pop("probe_batch_size", 16)), random.Random(0)
        trainer = make_trainer(callbacks=[keep], **settings)

        def completions(prompt_ids, *args):
            return [[draw.randrange(2, 400) for _ in range(draw.randint(1, 12))] for _ in prompt_ids], None

        trainer.use_vllm = trainer.args.use_vllm = factor  # vLLM's importance factor, without vLLM
        given = drawing_with_logprobs(draw) if factor else completions
        monkeypatch.setattr(trainer, "_generate_single_turn", given)
        keep.start = {name: p.detach().clone() for name, p in trainable_parameters(trainer.model).items()}
        trainer.train()
        return keep, trainer, RunDirectory(trainer.args.output_dir).metrics()

    return train


def relative(error, reference):
    return (error.norm() / reference.norm()).item()


@pytest.mark.parametrize(
    ("normalizer", "accumulation"), first_fast([("max_completion_length", 1), ("group_max", 1), ("group_max", 2)])
)
def test_rows_sum_to_the_gradients_of_loss_and_entropy(trained, normalizer, accumulation):
    keep, trainer, rows = trained(
        length_normalizer=normalizer,
        gradient_accumulation_steps=accumulation,
        probe_batch_size=16 if accumulation == 2 else 3,  # 3: a group in parts
        temperature=0.9,
        max_grad_norm=0.01,
    )
    assert (keep.rollouts.length_scale.max() > 1) == (normalizer == "group_max")
    num_prompts = 4 * accumulation
    assert keep.rows.loss.shape == keep.rows.entropy.shape == (num_prompts, len(keep.gradient))
    assert relative(keep.rows.loss.double().mean(0) - keep.gradient, keep.gradient) < 1e-5
    assert rows[-1]["entropy/rollouts_gradient_error"] < 1e-5
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(value.shape, generator=generator) for name, value in keep.params.items()}
    flat_direction = torch.cat([value.flatten() for value in direction.values()]).double()
    mean_row = keep.rows.entropy.double().mean(0)
    slope = keep.slope_along(direction, 0.9)
    assert (mean_row @ flat_direction).item() == pytest.approx(slope, abs=1e-4 * mean_row.norm().item())
    # Sign and coefficient: along the gradient part of (T5), M before the step, forward mode finds the same change.
    step = gradient_part(keep, trainer.args)
    assert rows[-1]["entropy/delta_same_sample"] == pytest.approx(keep.slope_along(step, 0.9), rel=1e-4)


def test_with_too_little_memory_pairs_are_formed_of_the_first_groups(trained):
    whole, _, _ = trained()
    two_groups = 2 * 2 * 4 * len(whole.gradient) / 2**30
    some, trainer, rows = trained(probe_rows_gib=1.01 * two_groups)
    assert torch.equal(some.rows.loss, whole.rows.loss[:2]) and torch.equal(some.rows.entropy, whole.rows.entropy[:2])
    assert relative(some.rows.loss_total - whole.rows.loss_total, whole.rows.loss_total) < 1e-6
    assert rows[-1]["entropy/rollouts_gradient_error"] < 1e-5  # of all groups
    assert rows[-1]["entropy/delta_cross_prompt_num_prompts"] == 2
    # -U of the two: the mean of both products of one with the other, with lr c (1-b1)/(1-b1^t) M
    part = torch.cat([value.flatten() for value in gradient_part(some, trainer.args).values()]).double()
    metric = (-part / some.gradient.double()).where(some.gradient != 0, 0.0)
    (x1, x2), (y1, y2) = some.rows.entropy.double(), some.rows.loss.double()
    expected = -((x1 * metric) @ y2 + (x2 * metric) @ y1).item() / 2
    assert rows[-1]["entropy/delta_cross_prompt"] == pytest.approx(expected, rel=1e-4)


def gradient_part(keep, args):
    """-lr c (1-b1)/(1-b1^t) M g at the second step, where M has a meaning."""
    part = {}
    for name, g in keep.update.gradient.items():
        v = keep.update.exp_avg_sq[name].double()
        metric = 1 / ((v / (1 - args.adam_beta2)).sqrt() + args.adam_epsilon)
        coefficient = keep.update.learning_rate[name] * keep.clip * (1 - args.adam_beta1) / (1 - args.adam_beta1**2)
        part[name] = (-coefficient * metric * g).where(v > 0, 0.0).float()
    return part


def rows_float64(model, keep, args):
    """X_n and Y_n by loops over completions, one at a time and unpadded, in float64."""
    u = keep.rollouts
    with float64_reference(model):
        losses, scored = losses_of_completions(model, u, args, keep.params, keep.start)
        weights = [weights_of(logps, u.sampling_logps, i) for i, (_, logps) in enumerate(scored)]
        num_tokens = sum(sum(row) for row in weights)
        weighted = [torch.tensor(row).to(entropy) @ entropy for row, (entropy, _) in zip(weights, scored, strict=True)]
        h, groups, x, y = sum(weighted).item() / num_tokens, u.prompt_index.unique().tolist(), [], []
        for group in groups:
            x_n = y_n = 0.0
            for i in (u.prompt_index == group).nonzero().flatten().tolist():
                (entropy, logps), w = scored[i], weights[i]
                y_n = y_n + losses[i] * len(groups)
                for k in range(len(logps)):
                    later = sum(w[j] * (entropy[j].item() - h) for j in range(k + 1, len(logps)))
                    x_n = x_n + (w[k] * entropy[k] + later * logps[k]) * len(groups) / num_tokens
            for rows, value in ((x, x_n), (y, y_n)):
                gradient = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
                rows.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(x), torch.stack(y)


def weights_of(logps, sampling_logps, i):
    """The per-decision weights (T6) of a completion's tokens."""
    if sampling_logps is None:
        return [1.0] * len(logps)
    ratios = (logps.detach() - sampling_logps[i, : len(logps)]).tolist()
    return [math.exp(sum(ratios[:k])) for k in range(len(ratios))]


def u_by_loops(x, y, metric):
    """U, and the mean of all products, by a loop over pairs."""
    pairs = {(n, m): float((x[n] * metric) @ y[m]) for n in range(len(x)) for m in range(len(x))}
    crossed = [value for (n, m), value in pairs.items() if n != m]
    return sum(crossed) / len(crossed), sum(pairs.values()) / len(pairs), pairs


def variance_by_components(pairs, num_prompts):
    """Var(U) of (T17) and of the jackknife. zeta_2 of the pairs needs Var(U) itself: solved by repetition."""
    p = num_prompts
    kernel = {(n, m): (pairs[n, m] + pairs[m, n]) / 2 for n in range(p) for m in range(p) if n != m}
    u = sum(kernel.values()) / len(kernel)
    row_means = [sum(kernel[n, m] for m in range(p) if m != n) / (p - 1) for n in range(p)]
    s2 = sum((r - u) ** 2 for r in row_means) / (p - 1)
    q = sum((value - u) ** 2 for value in kernel.values()) / len(kernel)
    variance = 0.0
    for _ in range(200):
        zeta_2 = q + variance
        zeta_1 = ((p - 1) ** 2 * s2 / (p - 2) - zeta_2) / (p - 4)
        variance = 4 * (p - 2) * zeta_1 / (p * (p - 1)) + 2 * zeta_2 / (p * (p - 1))
    left_out = [(p * u - 2 * r) / (p - 2) for r in row_means]
    mean = sum(left_out) / p
    return variance, (p - 1) / p * sum((value - mean) ** 2 for value in left_out)


def metric_at_rate(learning_rate, keep, args):
    """lr c (1-b1)/(1-b1^t) M of before the step, 0 where there never was a gradient."""
    known = keep.exp_avg_sq > 0
    metric = torch.zeros_like(keep.exp_avg_sq)
    v_hat = keep.exp_avg_sq[known] / (1 - args.adam_beta2 ** (keep.step - 1))
    coefficient = learning_rate * keep.clip * (1 - args.adam_beta1) / (1 - args.adam_beta1**keep.step)
    metric[known] = coefficient / (v_hat.sqrt() + args.adam_epsilon)
    return metric


def test_change_is_that_of_float64_loops(trained):
    keep, trainer, logged = trained(gradient_accumulation_steps=2, learning_rate=1e-4, probe_batch_size=64)
    row, args = logged[-1], trainer.args
    assert keep.step == 2 and not NEW_KEYS & logged[0].keys()
    x, y = rows_float64(trainer.model, keep, args)
    assert relative(keep.rows.entropy.double() - x, x) < 1e-4
    assert relative(keep.rows.loss.double() - y, y) < 1e-4
    metric = metric_at_rate(1e-4 / 2, keep, args)
    assert row["entropy/num_coordinates_without_metric"] == (metric == 0).sum()
    assert keep.update.learning_rate[next(iter(keep.params))] == pytest.approx(1e-4 / 2)
    for rows, tolerance in ((keep.rows, 1e-6), ((x, y), 1e-2)):
        u, plain, pairs = u_by_loops(rows[0].double(), rows[1].double(), metric)
        assert row["entropy/delta_same_sample"] == pytest.approx(-plain, rel=tolerance)
        assert row["entropy/delta_cross_prompt"] == pytest.approx(-u, rel=tolerance, abs=tolerance * abs(plain))
        variance, jackknife = variance_by_components(pairs, 8)
        assert row["entropy/delta_cross_prompt_stderr"] == pytest.approx(jackknife**0.5, rel=tolerance)
        stderr = row["entropy/delta_cross_prompt_stderr_unbiased"]
        assert stderr is None if variance < 0 else stderr == pytest.approx(variance**0.5, rel=tolerance)
    check_in_sample_change(RunDirectory(args.output_dir), logged)


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {"loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.5},
            {"loss_type": "bnpo", "gradient_accumulation_steps": 2, "factor": True},
        ]
    ),
    ids=str,
)
def test_other_losses_and_what_vllm_draws_are_as_in_float64_loops(trained, settings):
    """KL term, entropy bonus and vLLM's importance factor are in Y_n; the weights (T6) of what vLLM drew in X_n."""
    keep, trainer, logged = trained(**settings, vllm_importance_sampling_mode="token_truncate")
    row, args = logged[-1], trainer.args
    x, y = rows_float64(trainer.model, keep, args)
    assert relative(y.mean(0) - keep.gradient, keep.gradient) < 1e-5
    assert row["entropy/rollouts_gradient_error"] < 1e-5
    assert relative(keep.rows.entropy.double() - x, x) < 1e-4
    assert relative(keep.rows.loss.double() - y, y) < 1e-4
    u, plain, _ = u_by_loops(x, y, metric_at_rate(1e-3 / 2, keep, args))
    assert row["entropy/delta_cross_prompt"] == pytest.approx(-u, rel=1e-2, abs=1e-2 * abs(plain))


def check_in_sample_change(run, rows):
    """(T7) from the probe's files, on all of U."""
    for step, row in enumerate(rows, start=1):
        file = load_file(run.path / "probes" / "entropy" / f"step_{step:06d}.safetensors")
        mask = file["completion_mask"].double()
        log_ratio = (file["logps_after"] - file["logps_before"]).double() * mask
        weights = (log_ratio.cumsum(1) - log_ratio).exp() * mask
        before = (file["entropy_before"] * mask).sum() / mask.sum()
        after = (file["entropy_after"] * weights).sum() / weights.sum()
        assert row["entropy/delta_in_sample"] == pytest.approx((after - before).item(), rel=1e-6)
        assert row["entropy/probe_batch"] == pytest.approx(row["entropy/policy"], rel=1e-5)
        assert row["entropy/num_completions"] == 32 and 1 < row["entropy/importance_ess"] <= 32
        assert row["entropy/delta_in_sample_stderr"] > 0
        odd = file["input_ids"][:, -mask.shape[1] :] % 2 * mask  # as the fixture's reward has it
        rewards = odd.sum(1) / mask.sum(1)
        groups = rewards.view(-1, 4)
        others = ((groups.sum(1, keepdim=True) - groups) / 3).flatten()
        change = ((log_ratio.sum(1).exp() - 1) * (rewards - others)).mean()
        assert row["reward/delta_in_sample"] == pytest.approx(change.item(), rel=1e-6)


def half_equal(prompts, completion_ids, **kwargs):
    odd = [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
    return [0.5 if prompt[0] in "ABCD" else value for prompt, value in zip(prompts, odd, strict=True)]


def test_kept_groups_are_left_out(trained):
    """The step has all eight prompts, so nothing can replace four of them; (T14a) on the others, by loops."""
    keep, trainer, logged = trained(
        reward_funcs=half_equal, gradient_accumulation_steps=2, learning_rate=1e-4, resample_uninformative_groups=True
    )
    row, u, args = logged[-1], keep.rollouts, trainer.args
    assert row["resampling/num_kept_uninformative"] == 4 == u.accepted.sum() and len(u.accepted) == 8
    accepted = torch.isin(u.prompt_index, u.prompt_index.unique()[u.accepted])
    keep.rollouts = u.rows(accepted)
    x, y = rows_float64(trainer.model, keep, args)
    cross, plain, _ = u_by_loops(x, y, metric_at_rate(1e-4 / 2, keep, args))
    assert row["entropy/delta_cross_prompt"] == pytest.approx(-cross / 2, rel=1e-2, abs=1e-2 * abs(plain))
    assert row["entropy/delta_same_sample"] == pytest.approx(-plain / 2, rel=1e-2)
    assert row["entropy/rollouts_gradient_error"] < 1e-5 and row["entropy/num_completions"] == 16
    path = RunDirectory(args.output_dir).path / "probes" / "entropy" / "step_000002.safetensors"
    file, mask = load_file(path), accepted.double()
    weights = mask[:, None] * file["completion_mask"].double()
    assert torch.equal(file["accepted"], accepted)
    entropy = (weights * file["entropy_before"]).sum() / weights.sum()
    assert row["entropy/probe_batch"] == pytest.approx(entropy.item(), rel=1e-6) != row["entropy/policy"]
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["distribution"] == "accepted groups"


def test_groups_without_gradient_stay(trained):
    keep, _, rows = trained(reward_funcs=half_equal, gradient_accumulation_steps=2)
    is_zero = (keep.rows.loss == 0).all(1)
    assert len(is_zero) == 8 and is_zero.sum() == 4
    assert relative(keep.rows.loss.double().sum(0) / 8 - keep.gradient, keep.gradient) < 1e-5
    assert rows[-1]["entropy/delta_cross_prompt"] != 0


def test_a_zero_gradient_is_no_error(trained):
    _, _, rows = trained(reward_funcs=lambda completion_ids, **kwargs: [1.0] * len(completion_ids))
    assert rows[-1]["entropy/delta_cross_prompt"] == rows[-1]["entropy/delta_in_sample"] == 0
    assert math.isnan(rows[-1]["entropy/rollouts_gradient_error"])  # nan: 0/0


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "length_normalizer": "group_max"},
            {"lora": True},
        ]
    ),
    ids=str,
)
def test_probe_on_is_probe_off_bit_for_bit(make_trainer, settings):
    from peft import LoraConfig

    settings = dict(settings)
    lora = settings.pop("lora", False)
    runs = []
    for probes in ({}, PROBE):
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        trainer = make_trainer(peft_config=config if lora else None, **probes, **settings)
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        rows = RunDirectory(trainer.args.output_dir).metrics()
        runs.append((weights, [{k: v for k, v in row.items() if "time" not in k} for row in rows]))
    (off, off_rows), (on, on_rows) = runs
    assert torch.equal(off, on)
    for off_row, on_row in zip(off_rows, on_rows, strict=True):
        assert off_row.items() <= on_row.items()
    assert on_rows[-1].keys() - off_rows[-1].keys() >= NEW_KEYS
    assert on_rows[-1]["entropy/rollouts_gradient_error"] < 1e-4


def test_every_key_has_its_row():
    from trl_entropy.runs.metrics import unit

    assert all(unit(key) for key in NEW_KEYS | {"entropy/delta_in_sample", "entropy/delta_in_sample_stderr"})


def config(tmp_path, **settings):
    defaults = {"output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 16}
    return DrGRPOConfig(**(defaults | {"bf16": False, "use_cpu": True} | PROBE | settings))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"loss_type": "unheard of"}, "loss_type to one of dr_grpo, "),
        ({"beta": 0.1, "resample_uninformative_groups": True}, "beta=0"),
        ({"num_iterations": 2}, "num_iterations=1"),
        ({"steps_per_generation": 2}, "steps_per_generation=1"),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 3}, "steps_per_generation=3"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=1"),
        ({"optim": "lion_32bit"}, "optim='adamw_torch_fused' (of lion_32bit: Lion's step is the sign"),
        ({"entropy_second_order": True}, "entropy_second_order=False"),
        ({"per_device_train_batch_size": 12}, "num_prompts_per_step=4"),
        ({"top_p": 0.9}, "top_p=1"),
    ],
    ids=str,
)
def test_refused_settings_say_what_to_change(tmp_path, settings, remedy):
    with pytest.raises(ValueError, match="entropy_probe") as error:
        config(tmp_path, **settings)
    assert remedy in str(error.value)


def test_a_group_on_two_processes_is_refused(tmp_path):
    args = config(tmp_path)
    args.per_device_train_batch_size = 6
    with pytest.raises(ValueError, match=r"Try per_device_train_batch_size=8"):
        args.check_rollouts_source()


def test_toggle_gives_this_probe_and_a_callback_is_checked_too(tmp_path, make_trainer):
    assert type(PROBES["entropy_probe"].from_config(config(tmp_path))) is RolloutEntropyProbe
    with pytest.raises(ValueError, match="top_entropy_quantile=1"):
        make_trainer(callbacks=[RolloutEntropyProbe()], top_entropy_quantile=0.5).train()


def test_a_batch_is_halved_on_out_of_memory_only():
    sizes = []

    def needs_memory(size, error="CUDA out of memory."):
        sizes.append(size)
        if size > 1:
            raise RuntimeError(error)
        return size

    assert halved_on_out_of_memory(needs_memory, 4) == 1 and sizes == [4, 2, 1]
    with pytest.raises(RuntimeError, match="other"):
        halved_on_out_of_memory(lambda size: needs_memory(size, "other"), 4)
    assert sizes == [4, 2, 1, 4]


def test_too_many_parameters_are_refused():
    model = torch.nn.Linear(2**20, 1, bias=False, device="meta")
    row = 4 * 2**20
    assert groups_that_fit(5, 1, model, 10 * row) == 5 and groups_that_fit(5, 1, model, 9 * row) == 4
    assert groups_that_fit(5, 2, model, 9 * row) == 3  # and the loss gradients of another process
    with pytest.raises(ValueError, match="entropy_probe_completions='held_out'"):
        groups_that_fit(5, 1, model, 4 * row - 1)
