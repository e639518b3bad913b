"""(T9) in training: parts sum to the whole, against float64, no trace in training, resumed, refused by name."""

import math

import pytest
import torch
from datasets import Dataset
from first_fast import first_fast
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from trl_entropy import DrGRPOConfig
from trl_entropy.estimators.attribution.shares import Attribution, token_contributions, update_products
from trl_entropy.estimators.entropy_change.delta_entropy import delta_linear
from trl_entropy.estimators.entropy_change.step_change import point_terms
from trl_entropy.estimators.optimizer.adamw import AdamWSettings, adamw_update_parts, gradient_metric
from trl_entropy.gradients.float64_reference import float64_reference
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_products import entropy_gradient, gradient_products, weighted_logps
from trl_entropy.models.embedded import build_model
from trl_entropy.probes.attribution import CATEGORIES
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.directory import RunDirectory

PARTS = ("momentum", "weight_decay", "gradient", "kl", "entropy_bonus")
PROBE = {
    "entropy_probe": True,
    "entropy_probe_completions": "held_out",
    "entropy_probe_num_completions": 8,
    "probe_batch_size": 5,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, tokenizer) -> str:
    """
    A random policy samples the padding token too, whose embedding torch gives no gradient (`padding_idx`), though the
    output depends on it: forward mode, which sees that, would attribute what training did not use.
    """
    path = tmp_path_factory.mktemp("policy_without_padding_index")
    model = build_model(tokenizer, seed=0)
    model.config.pad_token_id = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def problems():
    return Dataset.from_dict(
        {"prompt": [f"{name} has {i} apples." for name in ("Ann", "Ben", "Cem", "Dia") for i in range(8)]}
    )


def files(run, probe):
    return [load_file(path) for path in sorted((run.path / "probes" / probe).glob("*"))]


def trained(make_trainer, problems, mode, off_reference=0.0, **settings):
    trainer = make_trainer(
        max_steps=settings.pop("max_steps", 3),
        dataset=problems,
        lr_scheduler_type="constant",
        weight_decay=settings.pop("weight_decay", 0.1),
        **({"entropy_attribution": mode} | PROBE | settings),
    )
    generator = torch.Generator().manual_seed(0)
    for param in trainer.model.parameters():
        if param.requires_grad and off_reference:
            param.data += off_reference * torch.randn(param.shape, generator=generator)
    trainer.train()
    return trainer, RunDirectory(trainer.args.output_dir)


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {},
            {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
            {"loss_type": "dapo", "num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
            {"length_normalizer": "group_max", "lora": True},
            {"beta": 0.1, "gradient_accumulation_steps": 2},
            {
                "beta": 0.1,
                "importance_sampling_level": "sequence",
                "num_iterations": 2,
                "loss_type": "grpo",
                "lora": True,
                "learning_rate": 1e-2,
            },  # the larger the step, the less of it float32 parameters round away
            {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 9.0, "top_entropy_quantile": 0.5},
        ],
        2,
    ),
    ids=str,
)
def test_parts_sum_to_the_whole(make_trainer, problems, settings):
    """By sequence and by token alike, for clipped and off-policy losses too; the whole is forward mode's number."""
    from peft import LoraConfig

    settings = dict(settings)
    if settings.pop("lora", False):
        settings["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    with_reward = not settings or "importance_sampling_level" in settings
    (_, by_sequence), (_, by_token) = (
        trained(make_trainer, problems, mode, max_grad_norm=0.1, reward_attribution=with_reward, **settings)
        for mode in ("sequence", "token")
    )
    if with_reward:
        check_parts_of_the_reward(by_sequence, by_token)
    contributions = [
        [file["attribution"].double() for file in files(run, "attribution")] for run in (by_sequence, by_token)
    ]
    for step, (row, other) in enumerate(zip(by_sequence.metrics(), by_token.metrics(), strict=True)):
        assert abs(row["entropy/attribution_rounding"]) < 1e-5 and abs(other["entropy/attribution_rounding"]) < 1e-5
        parts = [name for name in PARTS if f"entropy/delta_{name}" in row]
        assert ("kl" in parts, "entropy_bonus" in parts) == ("beta" in settings, "entropy_coef" in settings)
        shares = sum(row[f"entropy/share_{name}"] for name in parts)
        assert all(
            row[f"entropy/delta_{name}"] == pytest.approx(other[f"entropy/delta_{name}"], rel=1e-3, abs=1e-9)
            for name in parts
        )
        assert shares == pytest.approx(1, rel=1e-3)
        assert (row["entropy/delta_momentum"] == 0) == (step == 0)
        assert step == 0 or row["entropy/delta_weight_decay"] != 0  # LoRA's B is 0 at first
        sequences, tokens = (some[step] for some in contributions)
        assert torch.allclose(tokens.sum(1), sequences, rtol=1e-3, atol=1e-5 * float(sequences.abs().sum()))
        assert float(sequences.sum()) == pytest.approx(row["entropy/delta_gradient"])
        assert sum(other[f"entropy/share_{name}"] for name in CATEGORIES["token"]) == pytest.approx(1)
        incorrect = other["entropy/share_incorrect_rare"] + other["entropy/share_incorrect_common"]
        assert incorrect == pytest.approx(row["entropy/share_incorrect"], rel=1e-3)
        assert row["entropy/share_correct_low"] <= row["entropy/share_correct"] <= row["entropy/share_correct_high"]


@pytest.mark.parametrize("mode", first_fast(["sequence", "token"], 1))
def test_the_balance_of_experts_is_a_part(make_trainer, problems, tokenizer, mode):
    """A mixture's balancing loss, at coefficient 1, in two micro-batches: with its part nothing is left over."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "router_aux_loss_coef": 1.0}
    model = MixtralForCausalLM(config)
    _, run = trained(make_trainer, problems, mode, model=model, max_steps=2, learning_rate=1e-2, **settings)
    for row in run.metrics():
        assert abs(row["entropy/attribution_rounding"]) < 1e-4
        parts = [row[f"entropy/delta_{name}"] for name in ("momentum", "weight_decay", "gradient", "router_aux_loss")]
        assert sum(parts) == pytest.approx(row["entropy/delta_linear"], rel=1e-3)
        assert abs(row["entropy/delta_router_aux_loss"]) > 0.01 * sum(map(abs, parts))


def check_parts_of_the_reward(by_sequence, by_token):
    """(T22): by completion and by token alike the parts sum to the first-order change of the reward."""
    pairs = zip(by_sequence.metrics(), by_token.metrics(), strict=True)
    of_files = zip(files(by_sequence, "attribution"), files(by_token, "attribution"), strict=True)
    for (row, other), (sequences, tokens) in zip(pairs, of_files, strict=True):
        assert abs(row["reward/attribution_rounding"]) < 1e-5 and abs(other["reward/attribution_rounding"]) < 1e-5
        parts = [name for name in PARTS if f"reward/delta_{name}" in row]
        assert sum(row[f"reward/delta_{name}"] for name in parts) == pytest.approx(
            row["reward/delta_linear"], rel=1e-3
        )
        assert all(
            row[f"reward/delta_{name}"] == pytest.approx(other[f"reward/delta_{name}"], rel=1e-3, abs=1e-9)
            for name in parts
        )
        earned, by_completion = tokens["attribution_reward"].double().sum(1), sequences["attribution_reward"].double()
        assert torch.allclose(earned, by_completion, rtol=1e-3, atol=1e-5 * float(by_completion.abs().sum()))
        assert float(by_completion.sum()) == pytest.approx(row["reward/delta_gradient"])
    price = -other["entropy/mean_delta_all"] / other["reward/mean_delta_all"]
    assert other["reward/price_all"] == pytest.approx(price)
    by_outcome = [other[f"reward/mean_delta_{name}"] for name in CATEGORIES["token"]]
    assert sum(by_outcome) == pytest.approx(other["reward/mean_delta_all"])
    assert row["reward/mean_delta_all_low"] < row["reward/mean_delta_all"] < row["reward/mean_delta_all_high"]


def test_on_policy_coefficients_are_those_of_the_equation(make_trainer, problems):
    _, run = trained(make_trainer, problems, "sequence", gradient_accumulation_steps=2, max_steps=1)
    (file,), (rollouts,) = files(run, "attribution"), files(run, "rollouts")
    expected = rollouts["advantages"][:, None] * rollouts["completion_mask"] / (32 * 12)
    assert torch.allclose(file["loss_coefficients"], expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(file["prompt_index"], rollouts["prompt_index"])


@pytest.mark.parametrize("terms", first_fast([{}, {"beta": 0.1, "entropy_coef": 0.1, "num_iterations": 2}]), ids=str)
def test_probe_on_is_probe_off_bit_for_bit(make_trainer, problems, terms):
    points = []
    off = {"entropy_probe": False, "entropy_probe_completions": "next_rollouts", "entropy_probe_num_completions": None}
    for settings in (off, {"entropy_attribution": "sequence"}, {"entropy_attribution": "token"}):
        trainer, run = trained(make_trainer, problems, "none", **terms, **settings)
        points.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        logged = "entropy/share_momentum" in run.metrics()[-1]
        assert logged == ("entropy_attribution" in settings)
    assert torch.equal(points[0], points[1]) and torch.equal(points[0], points[2])


@pytest.mark.slow
def test_the_record_survives_a_resume(make_trainer, problems, tmp_path):
    rows = []
    for name, stops in (("straight", [4]), ("resumed", [2, 4])):
        for stop in stops:
            settings = {"output_dir": str(tmp_path / name), "save_strategy": "steps", "save_steps": 2}
            trainer = make_trainer(
                max_steps=stop, dataset=problems, lr_scheduler_type="constant",
                **(PROBE | {"entropy_attribution": "token"} | settings),
            )  # fmt: skip
            trainer.train(resume_from_checkpoint="latest" if stop > stops[0] else None)
        rows.append(RunDirectory(tmp_path / name).metrics()[-1])
    keys = [key for key in rows[0] if "share" in key]
    assert len(keys) == 3 + 4 * len(CATEGORIES["token"])
    assert {key: rows[0][key] for key in keys} == {key: rows[1][key] for key in keys}


def test_a_zero_gradient_has_no_shares(make_trainer, problems):
    _, run = trained(
        make_trainer, problems, "token", max_steps=1, weight_decay=0.0,
        reward_funcs=lambda completion_ids, **kwargs: [1.0] * len(completion_ids),
    )  # fmt: skip
    (row,) = run.metrics()
    assert row["entropy/delta_gradient"] == row["entropy/delta_momentum"] == 0
    assert math.isnan(row["entropy/share_momentum"])  # 0/0, not 0


@pytest.mark.parametrize(
    "mode, settings",
    first_fast(
        [
            ("token", {"beta": 0.1}),
            (
                "token",
                {"beta": 0.1, "num_iterations": 2, "importance_sampling_level": "sequence", "loss_type": "grpo"},
            ),
            ("token", {"beta": 0.1, "use_bias_correction_kl": False, "loss_type": "cispo"}),
            ("token", {"entropy_coef": 0.1, "loss_type": "grpo"}),
            ("sequence", {"beta": 0.1, "loss_type": "bnpo"}),
            ("sequence", {"entropy_coef": 0.1}),
        ]
    ),
    ids=str,
)
def test_without_advantages_all_is_kl_or_bonus(make_trainer, problems, mode, settings):
    """Equal rewards leave TRL's loss nothing else, whatever its type and its correction of the KL."""
    start = {"reward_funcs": lambda completion_ids, **kwargs: [1.0] * len(completion_ids)}
    _, run = trained(make_trainer, problems, mode, off_reference=0.01, learning_rate=1e-2, **start, **settings)
    name = "kl" if "beta" in settings else "entropy_bonus"
    for row in run.metrics():
        assert abs(row["entropy/delta_gradient"]) < 1e-5 * abs(row[f"entropy/delta_{name}"])
        assert abs(row["entropy/attribution_rounding"]) < 1e-5
    assert name == "kl" or row["entropy/delta_entropy_bonus"] > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optim": "lion_32bit"}, "optim='adamw_torch_fused'.*sign of momentum"),
        ({"entropy_attribution": "tokens"}, "use one of"),
        ({"entropy_probe_completions": "rollouts", "num_prompts_per_step": 4}, "entropy_attribution='none'"),
    ],
    ids=str,
)
def test_what_is_not_covered_is_refused(settings, message, tmp_path):
    defaults = {"output_dir": str(tmp_path), "entropy_probe": True, "entropy_attribution": "token", "use_cpu": True}
    sizes = {"bf16": False, "num_generations": 4, "per_device_train_batch_size": 16}
    with pytest.raises(ValueError, match=message):
        DrGRPOConfig(**(defaults | sizes | settings))


def test_parts_sum_in_float64(model_path):
    """A third step of torch's AdamW on random coefficients: the parts miss the whole by 1e-12 of their sum."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    lr, betas, eps, decay = 1e-3, (0.9, 0.99), 1e-8, 0.1
    ids, mask = torch.randint(2, 300, (6, 14)), torch.ones(6, 14, dtype=torch.long)
    update_batch, probe_batch = (
        Completions(x, mask, mask[:, :8], torch.arange(6), loss_mask=mask[:, :8]) for x in (ids, ids.flip(0, 1))
    )
    coefficients = torch.randn(6, 8, dtype=torch.float64) / 50
    with float64_reference(model):
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(params.values(), lr, betas, eps, decay)
        for _ in range(3):
            before = {name: p.detach().clone() for name, p in params.items()}
            state = [optimizer.state.get(p, {}) for p in params.values()]
            moments = {
                name: tuple(
                    s[key].clone() if s else torch.zeros_like(params[name]) for key in ("exp_avg", "exp_avg_sq")
                )
                for name, s in zip(params, state, strict=True)
            }
            scores = score(model, update_batch, 1.0, 4, before, before, order=0)
            step = 1 + int(state[0]["step"] if state[0] else 0)
            optimizer.zero_grad()
            logits = model(input_ids=ids).logits[:, 5:-1].log_softmax(-1)
            logps = logits.gather(2, ids[:, 6:, None]).squeeze(2)
            assert torch.allclose(logps.detach(), scores.logps[0])
            (-(coefficients * logps).sum()).backward()
            gradient = {name: p.grad.clone() for name, p in params.items()}
            optimizer.step()
        dtheta = {name: p.detach() - before[name] for name, p in params.items()}
        for name, p in params.items():
            p.data.copy_(before[name])
        settings = AdamWSettings(lr, betas, eps, decay)
        scores = score(model, probe_batch, 1.0, 4, before, dtheta, order=1)
        terms = point_terms(scores.entropy, scores.logps, scores.logps[0], mask[:, :8])
        whole = float(delta_linear(terms.terms, terms.tangents).value)
        entropy = float(terms.terms.numerator.sum() / terms.terms.denominator.sum())
        grad_h = entropy_gradient(model, probe_batch, 1.0, 4, entropy, 48)
        pairs, direction = [], {}
        for name, g in gradient.items():
            parts = adamw_update_parts(before[name], g, *moments[name], step, settings)
            pairs.append((grad_h[name], parts))
            direction[name] = gradient_metric(g, moments[name][1], step, settings) * grad_h[name]
        products = update_products(pairs)
        by_sequence = -gradient_products(model, update_batch, weighted_logps(-coefficients), direction, 1.0, 4)
        derivatives = score(model, update_batch, 1.0, 4, before, direction, order=1).logps[1]
    by_token = token_contributions(coefficients, derivatives, mask[:, :8], 1.0)
    assert torch.allclose(by_token.sum(1), by_sequence, rtol=1e-9)
    for contributions in (by_sequence, by_token):
        found = Attribution(whole, products.momentum, products.weight_decay, contributions.flatten())
        assert abs(found.relative_rounding) < 1e-12
    assert abs(products.momentum) > 1e-6 < by_sequence.abs().min()


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_parts_add_up_on_the_next_steps_rollouts(make_trainer, problems, mode):
    """grad h is weighed back to the policy before the step, and M is read when the step is over."""
    own = {"entropy_probe_completions": "next_rollouts", "entropy_probe_num_completions": 16}
    _, run = trained(make_trainer, problems, mode, **own)
    for row in run.metrics():
        parts = sum(row[f"entropy/delta_{name}"] for name in ("momentum", "weight_decay", "gradient"))
        assert parts == pytest.approx(row["entropy/delta_linear"], rel=1e-3)
        assert abs(row["entropy/attribution_rounding"]) < 1e-4
    assert len(files(run, "attribution")) == 3
