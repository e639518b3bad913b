"""Models that a probe's equation does not cover are refused when the trainer is built, by name and in one line."""

import logging
import re

import pytest
import torch
from datasets import Dataset
from first_fast import first_fast
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.models.tiny import family_config, tiny_config, tiny_model
from trl_entropy.probes.entropy import EntropyProbe
from trl_entropy.probes.fisher import FisherProbe
from trl_entropy.probes.model_checks import (
    adapters_of,
    check_scoring,
    check_sequences,
    dropout_of,
)
from trl_entropy.probes.noise_scale import NoiseScaleProbe
from trl_entropy.runs.directory import RunDirectory

HELD_OUT = {"entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 4}
PROBES = {
    "held_out": HELD_OUT,
    "second order": HELD_OUT | {"entropy_second_order": True},
    "token": HELD_OUT | {"entropy_attribution": "token"},
    "sequence": HELD_OUT | {"entropy_attribution": "sequence"},
    "next_rollouts": {"entropy_probe": True},
    "rollouts": {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    "fisher": {"fisher_probe": True, "fisher_num_sequences": 12},
    "noise": {"noise_scale_probe": True},
    "within prompt": {"noise_scale_probe": True, "noise_scale_within_prompt": True},
    "micro-batches": {"noise_scale_probe": True, "noise_scale_from": "micro_batches"},
    "control": {"entropy_control": "report", "entropy_control_num_completions": 4},
    "control rollouts": {"entropy_control": "report", "entropy_control_completions": "rollouts"},
    "exchange": {"token_control": "exchange", "token_control_floor": 100.0},
    "kl": {"kl_every": 1},
    "likelihood": {"likelihood_probe": True},
    "ess": {"effective_sample_size_probe": True},
    "optimizer": {"optimizer_state_probe": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def build(tokenizer, tmp_path):
    """build(model, **settings): a trainer on prompts of different lengths; 4 groups of 4 a step."""

    def build(model=None, peft_config=None, callbacks=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "run"), "num_generations": 4, "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2, "max_completion_length": 8, "learning_rate": 1e-3, "max_steps": 2,
            "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no",
            "disable_tqdm": True, "report_to": "none",
        }  # fmt: skip
        prompts = [f"{name} has {i} apples{' and a pear' * (i % 3)}." for i, name in enumerate("ABCDEFGH")]
        return DrGRPOTrainer(
            model=build_model(tokenizer, seed=0) if model is None else model,
            reward_funcs=lambda completion_ids, **_: [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids],
            args=DrGRPOConfig(**(defaults | settings)),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer, peft_config=peft_config, callbacks=callbacks,
        )  # fmt: skip

    return build


@pytest.fixture
def refused_ones(build):
    """refused_ones(...): probe -> the message, for the probes that are refused when the trainer is built."""

    def refused_ones(make=lambda: None, peft_config=lambda: None, names=tuple(PROBES), **settings):
        found = {}
        for name in names:
            try:
                build(make(), peft_config(), **(PROBES[name] | settings))
            except ValueError as error:
                found[name] = str(error)
                assert "\n" not in found[name]
        return found

    return refused_ones


def rows(trainer):
    trainer.train()
    return RunDirectory(trainer.args.output_dir).metrics()


# ---- dropout

REBUILD = {"token", "sequence", "rollouts", "fisher", "within prompt", "control rollouts", "exchange"}


def lora(**more):
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | more))


def test_dropout_is_refused_where_the_gradient_of_training_is_computed_again(refused_ones):
    found = refused_ones(peft_config=lambda: lora(lora_dropout=0.1), disable_dropout=False)
    assert set(found) == REBUILD | {"next_rollouts"}  # whose completions would be drawn with it
    for message in found.values():
        assert message.startswith("lora_dropout=0.1: ") and "Set lora_dropout=0 (disable_dropout=True" in message
    assert not refused_ones(peft_config=lambda: lora(lora_dropout=0.1), names=set(found), disable_dropout=True)


def test_every_kind_of_dropout_is_found(tokenizer):
    model = build_model(tokenizer)
    assert dropout_of(model) == {}
    model.model.layers[1].self_attn.attention_dropout = 0.2  # handed to a function
    assert dropout_of(model) == {"attention_dropout": 0.2}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8, attn_pdrop=0.0))
    assert dropout_of(gpt2) == {"drop": 0.1, "resid_dropout": 0.1, "dropout": 0.1}
    jitter = MixtralForCausalLM(small(MixtralConfig, router_jitter_noise=0.3, num_local_experts=2))
    assert dropout_of(jitter) == {"jitter_noise": 0.3}
    adapted = get_peft_model(build_model(tokenizer), lora(lora_dropout=0.1))
    assert dropout_of(adapted) == {"lora_dropout": 0.1}
    assert dropout_of(nn.Sequential(nn.Dropout(0.4))) == {"dropout": 0.4}


def test_with_dropout_the_probe_measures_the_policy_without_it(build, monkeypatch):
    """Drawn and scored in evaluation mode; the update is training's own, so the prediction holds to first order."""
    modes = []
    settings = HELD_OUT | {"kl_every": 1, "disable_dropout": False, "learning_rate": 1e-3}
    trainer = build(None, lora(lora_dropout=0.3), **settings)
    generate, model = trainer.model.generate, trainer.model

    def noting(*args, **kwargs):
        modes.append(model.training)
        return generate(*args, **kwargs)

    model.generate = noting
    first, second = rows(trainer)
    assert modes == [True, False, True, False] and model.training  # the step's rollouts, E, ...
    for row in (first, second):
        assert row["entropy/delta_measured"] == pytest.approx(row["entropy/delta_trapezoid"], rel=0.2, abs=1e-6)
    assert first["kl"] == pytest.approx(0.0, abs=1e-10)  # was the distance of two masks
    assert 0 < second["kl"] < 1e-3


def test_kl_every_draws_no_random_numbers(build, tmp_path):
    """It scored the start policy in training mode, so that training went another way."""
    found = []
    for settings in ({}, {"kl_every": 1}):
        trainer = build(
            None,
            lora(lora_dropout=0.3),
            disable_dropout=False,
            max_steps=3,
            output_dir=str(tmp_path / f"run {len(found)}"),
            **settings,
        )
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert torch.equal(*found)


# ---- adapters

PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
SCORING = {"held_out", "second order", "token", "sequence", "rollouts", "fisher", "within prompt"}
SCORING |= {"next_rollouts", "control", "control rollouts", "exchange", "likelihood"}
DORA = SCORING - {"fisher", "within prompt", "likelihood"}
FORWARD = {"next_rollouts", "held_out", "second order", "token", "sequence", "exchange"}


@pytest.mark.parametrize(
    ("config", "expected", "message"),
    [
        (lambda: PromptTuningConfig(**PROMPT), SCORING | {"noise"}, "virtual tokens|own gradient"),
        (lambda: PromptEncoderConfig(**PROMPT, encoder_hidden_size=8), SCORING | {"noise"}, "virtual tokens|own grad"),
        (lambda: PrefixTuningConfig(**PROMPT), SCORING, "PREFIX_TUNING, whose virtual tokens"),
        (lambda: lora(use_dora=True), DORA, "use_dora=True"),
        (lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]), set(), ""),
        (lambda: LoHaConfig(r=2, target_modules=["q_proj"]), FORWARD, "forward mode"),
        (lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]), set(), ""),
        (lambda: lora(use_rslora=True), set(), ""),
        (lambda: lora(modules_to_save=["norm"]), set(), ""),
        (lambda: lora(modules_to_save=["embed_tokens"]), set(), ""),
        (lambda: lora(modules_to_save=["lm_head"]), set(), ""),
    ],
    ids=["prompt", "p-tuning", "prefix", "DoRA", "IA3", "LoHa", "parameters", "rsLoRA", "norm", "embedding", "head"],
)
def test_adapters(refused_ones, config, expected, message):
    found = refused_ones(peft_config=config)
    assert set(found) == expected
    assert all(re.search(message, text) for text in found.values())


@pytest.mark.parametrize(
    "config",
    first_fast(
        [
            lambda: lora(use_rslora=True, init_lora_weights=False),
            lambda: lora(modules_to_save=["norm"], init_lora_weights=False),
            lambda: lora(modules_to_save=["lm_head"], init_lora_weights=False),
            lambda: lora(modules_to_save=["embed_tokens"], init_lora_weights=False),
        ]
    ),
    ids=["rsLoRA", "norm", "head", "embedding"],
)
def test_adapters_that_are_not_refused_have_exact_numbers(build, config):
    settings = PROBES["sequence"] | PROBES["fisher"] | PROBES["noise"] | {"probe_batch_size": 3, "learning_rate": 2e-4}
    row = rows(build(None, config(), **settings))[-1]
    assert abs(row["entropy/attribution_rounding"]) < 1e-3
    assert row["noise_scale/gradient_error"] < 1e-4 and row["fisher/change_correlation"] > 0.99


# ---- models


def small(config, **more):
    sizes = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return config(**(sizes | {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2} | more))


def test_learned_positions(refused_ones, build, tokenizer):
    """GPT-2 scored 1.5 nats off where padding was trimmed; now with the positions of the loss."""

    def gpt2():
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))

    found = refused_ones(gpt2, disable_dropout=True)
    own = {"rollouts": "entropy_probe", "next_rollouts": "entropy_probe", "control rollouts": "entropy_control"}
    for name, setting in own.items():
        source = name.removeprefix("control ")
        assert found.pop(name).startswith(f"{setting}_completions='{source}' needs completions drawn from")
    assert found.pop("exchange").startswith("token_control='exchange' needs completions drawn from")
    assert not found
    settings = PROBES["token"] | {"probe_batch_size": 3, "disable_dropout": True}
    for row in rows(build(gpt2(), **settings)):
        assert abs(row["entropy/attribution_rounding"]) < 1e-3
        assert "entropy/router_flip_share" not in row


def test_a_model_whose_scores_depend_on_padding_is_refused(refused_ones, tokenizer):
    """As every model that counts positions in a way of its own, here one that shifts them."""

    def shifting():
        model = build_model(tokenizer)
        embed = model.model.embed_tokens
        embed.register_forward_hook(lambda module, args, output: output + torch.arange(output.shape[1])[None, :, None])
        return model

    found = refused_ones(shifting)
    assert set(found) >= SCORING and not {"ess", "kl", "micro-batches", "optimizer"} & set(found)
    assert all("depend on how far a row is padded" in text for text in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_and_a_diverged_model_are_no_dependence_on_padding(tokenizer, dtype):
    """bfloat16 rounds more than the check looks for; nan says nothing. The model is left as it was."""
    model = build_model(tokenizer).to(dtype)
    for param in model.parameters():
        param.data *= 3
    check_scoring(model, "a probe", derivatives=True)
    check_sequences(model, "a probe")
    assert model.training and all(param.requires_grad and param.grad is None for param in model.parameters())
    diverged = build_model(tokenizer).to(dtype)
    diverged.model.norm.weight.data.fill_(torch.nan)
    check_scoring(diverged, "a probe", derivatives=True)


def test_norms_of_a_family_are_known_by_what_they_compute(refused_ones, tokenizer):
    assert not refused_ones(lambda: Qwen3ForCausalLM(small(Qwen3Config, vocab_size=len(tokenizer), head_dim=8)))


def test_a_mixture_of_experts_is_measured(build, refused_ones, tokenizer):
    def mixture():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            small(MixtralConfig, vocab_size=len(tokenizer), num_local_experts=4, num_experts_per_tok=2)
        )

    balanced = refused_ones(mixture, lambda: lora())
    assert set(balanced) == REBUILD - {"token", "sequence"} | {"noise"}
    assert all("Set router_aux_loss_coef=0" in text for text in balanced.values())
    assert not refused_ones(mixture, lambda: lora(), router_aux_loss_coef=0.0)
    trainer = build(mixture(), lora(), router_aux_loss_coef=0.0, learning_rate=1e-4, **PROBES["sequence"])
    for row in rows(trainer):
        assert row["entropy/delta_measured"] == pytest.approx(row["entropy/delta_linear"], rel=0.3, abs=2e-6)
        assert abs(row["entropy/attribution_rounding"]) < 1e-3
        assert 0 <= row["entropy/router_flip_share"] < 0.2


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_kernels_of_attention(refused_ones, tokenizer, attention, monkeypatch):
    def model():
        model = build_model(tokenizer)
        model.config._attn_implementation_internal = attention
        return model

    assert not refused_ones(model)  # probes score with sdpa meanwhile
    monkeypatch.setattr(Qwen2ForCausalLM, "_can_set_attn_implementation", classmethod(lambda cls: False))
    found = refused_ones(model)
    assert set(found) == SCORING | {"noise"}  # which has a trained head, and so a pass of its own
    assert all(attention in text and "'sdpa' or 'eager'" in text for text in found.values())


def test_the_models_own_sampling_settings_are_refused(refused_ones, tokenizer):
    def model(**settings):
        model = build_model(tokenizer)
        model.generation_config.update(**settings)
        return model

    drawn = {"next_rollouts", "rollouts", "fisher", "control rollouts", "exchange"}  # the others draw from all tokens
    found = refused_ones(lambda: model(min_p=0.9))
    assert set(found) == drawn
    assert all("but min_p=0.9 of the model's generation_config changes it" in text for text in found.values())
    for name, value in {"typical_p": 0.5, "suppress_tokens": [3], "no_repeat_ngram_size": 2}.items():
        found = refused_ones(lambda name=name, value=value: model(**{name: value}), names=["rollouts"])
        assert f"but {name}={value} of the model's generation_config changes it" in found["rollouts"]
    rollouts = {"names": ["rollouts"]}
    assert not refused_ones(lambda: model(typical_p=0.5), generation_kwargs={"typical_p": 1.0}, **rollouts)
    assert not refused_ones(lambda: model(top_k=5, top_p=0.5, temperature=0.3), **rollouts)  # TRL sets these itself


def test_top_k_none_is_what_transformers_makes_of_it(build):
    with pytest.raises(ValueError, match="but top_k=50 changes it"):
        build(top_k=None, **PROBES["rollouts"])


def test_probes_in_callbacks_are_asked_too(build):
    for probe in (EntropyProbe(num_prompts=4, attribution="token"), FisherProbe(num_sequences=12)):
        with pytest.raises(ValueError, match=r"lora_dropout=0\.1: "):
            build(None, lora(lora_dropout=0.1), callbacks=[probe], disable_dropout=False)
    with pytest.raises(ValueError, match="noise_scale_within_prompt"):
        build(None, lora(lora_dropout=0.1), callbacks=[NoiseScaleProbe(halves=True)], disable_dropout=False)


def test_where_gradients_come_from_is_said_once(build, caplog):
    with caplog.at_level(logging.INFO, logger="trl_entropy"):
        build(None, lora(), **PROBES["noise"]).train()
    assert caplog.text.count("gradients of prompt groups come from") == 1


def test_a_model_without_an_adapter_has_none(tokenizer):
    assert adapters_of(build_model(tokenizer)) == {} and set(
        adapters_of(get_peft_model(build_model(tokenizer), lora()))
    )


def test_partitioned_modules_that_must_be_computed_again_are_refused():
    """As under ZeRO-3: a norm is not computed with its weights, a router is."""
    mixture, dense = (tiny_model(tiny_config(family_config(name))) for name in ("mixtral", "qwen3"))
    for param in (*mixture.parameters(), *dense.parameters()):
        param.ds_id = 0
    check_sequences(dense, "a probe")
    with pytest.raises(ValueError, match=r"a probe needs .* module 'model\.layers\.0\.mlp.*Set zero_stage: 2"):
        check_sequences(mixture, "a probe")
